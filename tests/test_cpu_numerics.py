"""The CPU target against Transformers in FP32, on small random checkpoints of every family.

The measure of each case is Transformers' own error when it computes in BF16: the kernel's logits may be no further from
FP32 than that, and its greedy tokens must be FP32's wherever FP32's first two differ by more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import random_checkpoint  # noqa: E402
from fp8_cache import over_cache  # noqa: E402

from kogc import rope  # noqa: E402
from kogc.cache import Cache  # noqa: E402
from kogc.checkpoint import open_checkpoint  # noqa: E402
from kogc.importer import spec_from_dir  # noqa: E402
from kogc.packing import operands, write_weights  # noqa: E402
from kogc.plan.plan import Options, make_plan  # noqa: E402
from kogc.profile import load_profile  # noqa: E402
from kogc.render import render  # noqa: E402
from kogc.runtime import Program, Request, Runtime, open_runtime  # noqa: E402
from kogc.targets import compile_binary  # noqa: E402
from kogc.targets.cpu_features import cpu_features  # noqa: E402

pytestmark = pytest.mark.skipif("avx2" not in cpu_features(), reason="needs x86-64 with AVX2")

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PROFILES = ("cpu-avx2", "cpu-avx512", "cpu-avx512-bf16")


@dataclass(frozen=True)
class Case:
    """A checkpoint, how many threads run it, and how long its text is (over 128 and 256: several chunks of context)."""

    name: str
    family: str
    blocks: int
    tokens: int
    profiles: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    kv_dtype: str = "bf16"


def _heads(heads: int, kv_heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, **more}


# Between them: GQA of 1, 2, 3, 4, 8 and 12 (two tiles of heads), each head_dim, one to four splits of the context.
CASES = (
    Case("llama-gqa1", "llama", 3, 140, PROFILES, _heads(3, 3, 64, rope_parameters=LLAMA3_ROPE)),
    Case("llama-gqa8-combine", "llama", 4, 400, PROFILES[::2], _heads(8, 1, 128, tie_word_embeddings=True)),
    Case("llama-gqa12-tiles", "llama", 2, 40, PROFILES[:1], _heads(12, 1, 64, vocab_size=1031)),
    Case("llama-fp16", "llama", 2, 150, PROFILES[:2], _heads(4, 2, 64, dtype="float16")),
    Case("mistral-window", "mistral", 6, 300, PROFILES[:2], _heads(6, 2, 96, sliding_window=150, vocab_size=509)),
    Case("qwen2-bias", "qwen2", 2, 150, PROFILES, {"hidden_size": 192, "intermediate_size": 500, "vocab_size": 517}),
    # Against Transformers with a cache that rounds to FP8.
    Case("llama-fp8-cache", "llama", 4, 280, PROFILES, _heads(6, 2, 64), "fp8"),
    Case("mistral-fp8-window", "mistral", 6, 300, PROFILES[:2], _heads(6, 2, 96, sliding_window=150), "fp8"),
    Case("qwen3-fp8-hd128", "qwen3", 8, 150, PROFILES[1:], _heads(4, 2, 128, vocab_size=777), "fp8"),
    Case("qwen3-norms", "qwen3", 8, 280, PROFILES[1:], _heads(4, 2, 128, vocab_size=777)),
)
RUNS = [pytest.param((case, profile), id=f"{case.name}-{profile}") for case in CASES for profile in case.profiles]


@dataclass(frozen=True)
class Expected:
    """A case's checkpoint, its text, and the reference: FP32 logits, and how far BF16 is from them."""

    path: Path
    tokens: list[int]
    exact: np.ndarray
    bf16: np.ndarray
    kv_dtype: str


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept: dict[str, Expected] = {}

    def make(case: Case) -> Expected:
        if case.name not in kept:
            tmp_path = tmp_path_factory.mktemp(case.name)
            path = random_checkpoint.make(tmp_path, case.family, seed=len(kept), **case.config)
            vocab = case.config.get("vocab_size", random_checkpoint.BASE["vocab_size"])
            tokens = np.random.default_rng(len(kept)).integers(0, vocab, case.tokens).tolist()
            exact = random_checkpoint.reference_logits(path, tokens, kv_dtype=case.kv_dtype)
            bf16 = random_checkpoint.reference_logits(path, tokens, torch.bfloat16, case.kv_dtype)
            kept[case.name] = Expected(path, tokens, exact, bf16, case.kv_dtype)
        return kept[case.name]

    return make


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, expected: Any, tmp_path: Path) -> Iterator[tuple[Expected, Runtime]]:
    case, profile = request.param
    if not cpu_features().issuperset(load_profile(profile).flags):
        pytest.skip(f"this CPU lacks features of {profile}")
    want = expected(case)
    program = make_program(want.path, profile, case.blocks, tmp_path, case.kv_dtype)
    with open_runtime(program, oversubscribe=True) as runtime:
        yield want, runtime


def make_program(checkpoint: Path, profile: str, blocks: int, tmp_path: Path, kv_dtype: str = "bf16") -> Program:
    spec, _ = spec_from_dir(checkpoint)
    plan = make_plan(spec, load_profile(profile), Options(blocks=blocks, kv_dtype=kv_dtype))
    weights, binary = tmp_path / "weights.bin", tmp_path / "kernel.so"
    with open_checkpoint(checkpoint, spec) as opened:
        write_weights(plan, opened, weights)
    binary.write_bytes(compile_binary(render(plan), plan, Cache(tmp_path / "cache")))
    frequencies = rope.inv_freq(spec)
    table = rope.table(frequencies, plan.max_context, rope.attention_scaling(spec))
    return Program(plan, binary, tuple(operands(plan)), weights, frequencies, table, {})  # type: ignore[arg-type]


def relative(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Error of each position's logits, relative to their norm."""
    return np.linalg.norm(ours - exact, axis=1) / np.linalg.norm(exact, axis=1)


def test_against_transformers(run: tuple[Expected, Runtime]) -> None:
    want, runtime = run
    logits = runtime.run(Request(tuple(want.tokens), logits=True)).logits
    assert logits is not None
    assert logits.shape == want.exact.shape
    ours, theirs = relative(logits, want.exact), relative(want.bf16, want.exact)
    assert ours.mean() <= theirs.mean()
    assert ours.max() <= theirs.max()
    check_greedy(want, runtime)
    if want.kv_dtype == "fp8":
        check_over_cache(want, runtime)
    # The same launch again gives the same bits: sums are added in a fixed order whatever the threads' timing.
    again = runtime.run(Request(tuple(want.tokens), logits=True)).logits
    assert np.array_equal(logits, again)


def check_over_cache(want: Expected, runtime: Runtime) -> None:
    """Over the keys and values as stored there is no rounding to differ by: logits are as exact as with any cache."""
    logits = runtime.run(Request(tuple(want.tokens), logits=True)).logits
    assert logits is not None
    cache = runtime.download("kv", 0, runtime.plan.kv_bytes)
    exact = over_cache(runtime.plan, want.path, want.tokens, cache)
    plain, half = (
        random_checkpoint.reference_logits(want.path, want.tokens, t) for t in (torch.float32, torch.bfloat16)
    )
    assert relative(logits, exact).max() <= relative(half, plain).max()


def check_greedy(want: Expected, runtime: Runtime) -> None:
    """A greedy continuation is FP32's, wherever FP32's first two differ by more than BF16's error."""
    prompt, count = want.tokens[:-24], 24
    made = runtime.run(Request(tuple(prompt), max_new=count)).tokens
    assert len(made) == count
    whole = random_checkpoint.reference_logits(want.path, prompt + made, kv_dtype=want.kv_dtype)
    exact = whole[len(prompt) - 1 : -1]
    top = np.sort(exact, axis=1)
    decided = top[:, -1] - top[:, -2] > np.abs(want.bf16 - want.exact).max()
    assert decided.any()
    assert (exact.argmax(axis=1) == made)[decided].all()
