"""The numpy reference against transformers in FP32, on random checkpoints of every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import random_checkpoint as rc

from kogc.checkpoint import open_checkpoint
from kogc.importer import spec_from_dir
from kogc.reference import Reference

PROMPT = [1, 17, 300, 5, 5, 42, 9, 330, 128, 77, 3, 250, 61]
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "llama": ("llama", {}),
    "llama-mha-tied-64": ("llama", {"head_dim": 64, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-96": ("llama", {"head_dim": 96, "num_key_value_heads": 1}),
    "llama-fp16": ("llama", {"dtype": "float16"}),
    "llama-fp32": ("llama", {"dtype": "float32"}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": {**DEFAULT, "rope_type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", {"head_dim": 128}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN, "head_dim": 128}),
}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def open_both(path: Path):
    spec, _ = spec_from_dir(path)
    return spec, open_checkpoint(path, spec)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    family, overrides = CASES[case]
    path = rc.make(tmp_path, family, **overrides)
    spec, checkpoint = open_both(path)
    with checkpoint:
        logits = Reference(spec, checkpoint).logits(PROMPT)
    if overrides.get("dtype") == "float32":
        # The spec rounds FP32 weights to BF16; so must the model that is compared.
        model = rc.load_reference(path)
        with rc.torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
            expected = model(rc.torch.tensor([PROMPT])).logits[0].numpy()
    else:
        expected = rc.reference_logits(path, PROMPT)
    assert logits.shape == expected.shape == (len(PROMPT), spec.vocab)
    assert relative(logits, expected) < 1e-5


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen2-windows", "qwen3"])
def test_continuing_from_a_past_gives_the_same_logits(tmp_path: Path, case: str) -> None:
    family, overrides = CASES[case]
    spec, checkpoint = open_both(rc.make(tmp_path, family, **overrides))
    with checkpoint:
        reference = Reference(spec, checkpoint)
        whole, kv = reference.forward(PROMPT)
        _, past = reference.forward(PROMPT[:8])
        rest, kv_again = reference.forward(PROMPT[8:], past)
        one = reference.logits(PROMPT[-1:], [(k[:, :-1], v[:, :-1]) for k, v in kv])
    assert relative(rest, whole[8:]) < 1e-5
    assert relative(one, whole[-1:]) < 1e-5
    for (k, v), (k2, v2) in zip(kv, kv_again, strict=True):
        assert k.shape == (spec.kv_heads, len(PROMPT), spec.head_dim)
        assert np.allclose(k, k2, atol=1e-4)
        assert np.allclose(v, v2, atol=1e-4)


def test_a_window_hides_what_lies_before_it(tmp_path: Path) -> None:
    spec, checkpoint = open_both(rc.make(tmp_path, "mistral", sliding_window=2, num_hidden_layers=1))
    with checkpoint:
        logits = Reference(spec, checkpoint).logits([7, 8, 9, 10])
        other = Reference(spec, checkpoint).logits([70, 80, 9, 10])
    assert np.array_equal(logits[3], other[3])
    assert not np.array_equal(logits[2], other[2])


def test_chunks_of_rows_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, checkpoint = open_both(rc.make(tmp_path, "llama"))
    with checkpoint:
        whole = Reference(spec, checkpoint).logits(PROMPT)
        monkeypatch.setattr("kogc.reference.CHUNK_WEIGHTS", 1)
        chunked = Reference(spec, checkpoint).logits(PROMPT)
    assert relative(chunked, whole) < 1e-5


def test_nonsense_arguments_are_refused(tmp_path: Path) -> None:
    spec, checkpoint = open_both(rc.make(tmp_path, "llama"))
    with checkpoint:
        reference = Reference(spec, checkpoint)
        for tokens in ([], [-1], [spec.vocab]):
            with pytest.raises(ValueError, match="tokens must be"):
                reference.logits(tokens)
        _, past = reference.forward([1, 2])
        with pytest.raises(ValueError, match="past must be"):
            reference.logits([1], past[:-1])
