"""A checkpoint in Transformers, in FP32 on the CPU: the reference that `kogc eval` measures a build against."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import KogcError


class TransformersReference:
    """Feeds a sequence in parts, over Transformers' own KV cache. Its weights are widened from their type, exactly.

    KogcError where torch or transformers is missing, the directory holds no checkpoint that Transformers loads, or the
    vocabulary is not of `vocab` tokens.
    """

    def __init__(self, directory: str | Path, vocab: int) -> None:
        if not (Path(directory) / "config.json").is_file():
            raise KogcError(f"--reference {directory}: not a checkpoint directory: it has no config.json")
        try:
            torch, transformers = import_module("torch"), import_module("transformers")
        except ImportError as error:
            raise KogcError(f"--reference needs torch and transformers (install kogc[eval]): {error}") from None
        transformers.utils.logging.disable_progress_bar()
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the libraries raise anything
            why = " ".join(str(error).split())[:200]
            raise KogcError(f"--reference {directory}: Transformers does not load it: {why}") from None
        if model.config.vocab_size != vocab:
            sizes = f"a vocabulary of {model.config.vocab_size} tokens, the artifact one of {vocab}"
            raise KogcError(f"--reference {directory}: {sizes}")
        self._torch = torch
        self._model = model.float().eval()
        self._past: Any = None

    def begin(self) -> None:
        """The next part is the start of another sequence."""
        self._past = None

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of the sequence's next tokens: float32 [len(tokens), vocab]."""
        ids = self._torch.tensor([list(tokens)])
        with self._torch.no_grad():
            out = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        rows: NDArray[np.float32] = out.logits[0].numpy()
        return rows
