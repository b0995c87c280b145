"""A loaded artifact: generate, stream, and teacher-forced logits.

Needs numpy, tokenizers and (for a GPU) cuda-bindings; nothing of the compiler.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from .artifact import GENERATION_CONFIG, TOKENIZER, read_manifest
from .errors import KogcError
from .runtime import Request, Runtime, open_runtime
from .runtime.args import STOP_TOKENS, Logprobs
from .runtime.program import open_program
from .sampling import GREEDY, Sampling, sampling_from_config
from .spec import ModelSpec

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256
CONTEXT_TOKENS = 32  # of the prompt that the text of the first new token may depend on
LOGIT_POSITIONS = 512  # of one launch
LOGIT_BYTES = 128 << 20  # of one launch's buffer on the device

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Piece:
    """A generated token, and the text that it completes (possibly empty); log-probabilities where asked for."""

    token: int
    text: str
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Generation:
    """A finished continuation. tokens includes the stop token, text does not. seconds: on the device, with the prompt.

    finish_reason: stop (a stop token came), length (max_new_tokens are made), context (the artifact's limit came).
    """

    tokens: list[int]
    text: str
    prompt_tokens: int
    seconds: float
    finish_reason: FinishReason
    logprobs: list[Logprobs] = field(default_factory=list)  # one a token, where asked for


def load(
    path: str | os.PathLike[str], device: int = 0, *, oversubscribe: bool = False, sampling: Sampling | None = None
) -> Session:
    """Open an artifact directory on GPU number `device`, or on this machine's CPU if it was built for one.

    The artifact and the machine are checked before anything large is allocated. KogcError says what to rebuild.
    oversubscribe (CPU): allow more blocks than cores, at a fraction of the speed.
    sampling: how tokens are chosen where a call does not say; None: as the model's generation_config.json asks.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if sampling is None:
        config = directory / GENERATION_CONFIG
        sampling = sampling_from_config(config) if config.is_file() else GREEDY
    with open_program(directory, manifest) as program:
        runtime = open_runtime(program, device, oversubscribe=oversubscribe)
    try:
        tokenizer = _open_tokenizer(directory)
    except BaseException:
        runtime.close()
        raise
    return Session(runtime, tokenizer, manifest.stop_tokens, sampling)


def _open_tokenizer(directory: Path) -> Tokenizer | None:
    if not (directory / TOKENIZER).is_file():
        return None
    from .tokenizer import Tokenizer

    return Tokenizer(directory)


class Session:
    """One model on one device. One generation at a time; each starts again from position 0."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        stop_tokens: Sequence[int],
        sampling: Sampling = GREEDY,
    ) -> None:
        self.runtime = runtime
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.stop_tokens = tuple(stop_tokens)

    @property
    def spec(self) -> ModelSpec:
        return self.runtime.plan.spec

    @property
    def max_context(self) -> int:
        """Tokens of prompt and continuation together."""
        return self.runtime.plan.max_context

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[int] | None = None,
        sampling: Sampling | None = None,
    ) -> Generation:
        """Continue a text, or token ids as they are. See `stream` for the arguments."""
        stream = self.stream(prompt, max_new_tokens, stop, sampling)
        text = "".join(piece.text for piece in stream)
        return stream.result(text)

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[int] | None = None,
        sampling: Sampling | None = None,
    ) -> Stream:
        """Yield each token with its text as it is made; closing the stream early ends the kernel.

        stop: token ids that end the continuation (at most 16); None: the model's own; (): none.
        sampling: how tokens are chosen; None: the session's own way.
        KogcError for an empty prompt of a model without a begin token, for token ids outside the vocabulary, and for
        a prompt that leaves no room in the context.
        """
        tokens = self._prompt(prompt)
        room = self.max_context - len(tokens)
        if room < 1:
            raise KogcError(f"the prompt has {len(tokens)} tokens, the context {self.max_context}: no room to continue")
        wanted = operator.index(max_new_tokens)
        if wanted < 1:
            raise KogcError(f"max_new_tokens: {wanted} must be at least 1")
        stops = self.stop_tokens if stop is None else self._ids(stop, "stop")
        if len(stops) > STOP_TOKENS:
            raise KogcError(f"stop: {len(stops)} tokens, the kernel watches for at most {STOP_TOKENS}")
        chosen = self.sampling if sampling is None else sampling
        chosen.check_tokens(self.spec.vocab)
        request = Request(tokens, 0, min(wanted, room), stops, sampling=chosen)
        return Stream(self, request, "context" if wanted > room else "length")

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits: row i, float32[vocab], is what follows token_ids[: i + 1]. Shape [n, vocab]."""
        tokens = self._ids(token_ids, "token_ids")
        if not tokens:
            raise KogcError("token_ids: empty")
        if len(tokens) > self.max_context:
            raise KogcError(f"token_ids: {len(tokens)} tokens, the context holds {self.max_context}")
        out = np.empty((len(tokens), self.spec.vocab), np.float32)
        step = max(1, min(LOGIT_POSITIONS, LOGIT_BYTES // (4 * self.spec.vocab)))
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            result = self.runtime.run(Request(part, start, logits=True))
            out[start : start + len(part)] = result.logits
        return out

    def close(self) -> None:
        """Stop what runs and free the device; a second call does nothing."""
        self.runtime.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prompt(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise KogcError("this artifact has no tokenizer: give the prompt as token ids")
            prompt = self.tokenizer.encode(prompt)
        tokens = self._ids(prompt, "prompt")
        if tokens:
            return tokens
        if self.spec.bos_token is None:
            raise KogcError("the prompt is empty, and the model has no begin-of-text token to start from")
        return (self.spec.bos_token,)

    def _ids(self, values: Sequence[int], what: str) -> tuple[int, ...]:
        """Checked token ids as plain integers."""
        try:
            tokens = tuple(operator.index(value) for value in values)
        except TypeError:
            raise KogcError(f"{what}: token ids must be integers") from None
        for token in tokens:
            if not 0 <= token < self.spec.vocab:
                raise KogcError(f"{what}: token {token} is outside the vocabulary (0 to {self.spec.vocab - 1})")
        return tokens


class Stream(Iterator[Piece]):
    """The pieces of one continuation, in order. After the end (or close) `result` tells how it went."""

    def __init__(self, session: Session, request: Request, at_limit: FinishReason) -> None:
        self.prompt_tokens = len(request.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason = at_limit
        self.seconds = 0.0  # on the device; known after the end
        self._runtime = session.runtime
        self._tokenizer = session.tokenizer
        self._pieces = self._make(request)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End the kernel, if it still runs, and wait for it."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def result(self, text: str) -> Generation:
        return Generation(self.tokens, text, self.prompt_tokens, self.seconds, self.finish_reason, self.logprobs)

    def _make(self, request: Request) -> Generator[Piece, None, None]:
        decoder = self._tokenizer.stream(request.prompt[-CONTEXT_TOKENS:]) if self._tokenizer else None
        made = self._runtime.tokens(request)
        try:
            for token in made:
                logprobs = None
                if request.sampling.logprobs is not None:
                    logprobs = self._runtime.logprobs(len(self.tokens))
                    self.logprobs.append(logprobs)
                self.tokens.append(token)
                stopped = token in request.stop
                if stopped:
                    self.finish_reason = "stop"
                text = decoder.push(token) if decoder and not stopped else ""
                # Bytes of a character that is never finished come out with the last token.
                if decoder and (stopped or len(self.tokens) == request.max_new):
                    text += decoder.finish()
                yield Piece(token, text, logprobs)
        finally:
            made.close()
            self.seconds = self._runtime.last_timing / 1e3
