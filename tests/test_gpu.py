"""The kernel on a real GPU against Transformers in FP32: each family small, two models at full size; and the loader."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint
import torch
from fp8_cache import over_cache
from numpy.typing import NDArray
from sampling_reference import choice, processed

import kogc
from kogc.bench import run_bench
from kogc.build import BuildOptions, build
from kogc.errors import KogcError
from kogc.prefix_cache import shared_length
from kogc.runtime import Request
from kogc.sampling import Sampling
from kogc.session import Session
from kogc.targets.detect_cuda import detect_cuda_profile

PROFILE = detect_cuda_profile()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PROFILE is None, reason="no GPU that a shipped profile describes"),
]

F32 = NDArray[np.float32]

# Names of config.json. Sequences are longer than one chunk of the KV cache, and than the sliding windows.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-gqa8-hd64": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 8,
                                       "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 1009}),
    "llama-mha-hd96": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 96}),
    "llama3-rope-hd128": ("llama", {"head_dim": 128, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-fp16": ("llama", {"dtype": "float16", "head_dim": 64}),
    "llama-gqa16": ("llama", {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 32}),
    "llama-wide": ("llama", {"hidden_size": 1032, "intermediate_size": 2744, "vocab_size": 5003, "head_dim": 64}),
    "mistral-window": ("mistral", {"sliding_window": 37, "head_dim": 64}),
    "qwen2": ("qwen2", {"hidden_size": 192}),
    "qwen2-untied": ("qwen2", {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 2,
                               "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3-hd128": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}  # fmt: skip

# Shapes of the published models; the weights are random.
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("llama", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
    "qwen3-0.6b": ("qwen3", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}  # fmt: skip


@dataclass
class Model:
    """A checkpoint, and the artifact built from it, opened."""

    checkpoint: Path
    session: Session

    def reference(self, tokens: list[int], dtype: torch.dtype) -> F32:
        """Logits of Transformers on the GPU (on the CPU, if torch was built for that only)."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = random_checkpoint.load_reference(self.checkpoint, dtype).to(device)
        try:
            with torch.no_grad():
                out: F32 = model(torch.tensor([tokens], device=device)).logits[0].float().cpu().numpy()
            return out
        finally:
            del model
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def open_model(
    directory: Path, family: str, changes: dict[str, Any], max_context: int, kv_dtype: str = "bf16"
) -> Model:
    assert PROFILE is not None
    checkpoint = random_checkpoint.make(directory, family, **changes)
    build(str(checkpoint), PROFILE, directory / "artifact", BuildOptions(max_context=max_context, kv_dtype=kv_dtype))
    return Model(checkpoint, kogc.load(directory / "artifact"))


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    family, changes = SMALL[request.param]
    model = open_model(tmp_path_factory.mktemp("small"), family, changes, 400)
    with model.session:
        yield model


@pytest.fixture(scope="module", params=FULL)
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    family, changes = FULL[request.param]
    model = open_model(tmp_path_factory.mktemp("full"), family, changes, 1024)
    with model.session:
        yield model


# Several chunks of the cache in one block, one by one and in pairs; a window; each size of heads.
FP8: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "max_position_embeddings": 1024}),
    "mistral-window": ("mistral", {"sliding_window": 140, "head_dim": 96, "max_position_embeddings": 1024}),
    "qwen3-hd128": ("qwen3", {"head_dim": 128, "max_position_embeddings": 1024}),
    "llama-3.2-1b": FULL["llama-3.2-1b"],
}  # fmt: skip


@pytest.fixture(scope="module", params=FP8)
def fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    family, changes = FP8[request.param]
    model = open_model(tmp_path_factory.mktemp("fp8"), family, changes, 1024, "fp8")
    with model.session:
        yield model


def random_tokens(session: Session, count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, session.spec.vocab, count)]


def relative(ours: F32, exact: F32) -> float:
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def check_choices(chosen: NDArray[np.int64], exact: F32, error: float) -> int:
    """Where the reference's best two differ by more than `error`, its best is chosen. Returns how many places."""
    top = np.partition(exact, -2, axis=1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > error
    wrong = np.flatnonzero(clear & (chosen != exact.argmax(axis=1)))
    assert wrong.size == 0, f"tokens after positions {wrong[:8].tolist()} differ from the reference"
    return int(clear.sum())


def check_teacher_forced(model: Model, tokens: list[int]) -> None:
    """Logits no further from FP32 than those of Transformers in BF16, and the same choices where they are clear."""
    exact, bf16 = (model.reference(tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours = model.session.logits(tokens)
    print(f"relative logit error {relative(ours, exact):.2e}, Transformers in BF16 {relative(bf16, exact):.2e}")
    assert relative(ours, exact) <= relative(bf16, exact)
    assert check_choices(ours.argmax(axis=1), exact, float(np.abs(bf16 - exact).max())) > 0


def check_generated(model: Model, prompt: list[int], count: int) -> None:
    """Each generated token is what the reference would choose after the ones before it, where that is clear."""
    made = model.session.generate(prompt, count, stop=()).tokens
    assert len(made) == count
    exact, bf16 = (
        model.reference(prompt + made[:-1], dtype)[len(prompt) - 1 :] for dtype in (torch.float32, torch.bfloat16)
    )
    check_choices(np.array(made), exact, float(np.abs(bf16 - exact).max()))


def test_small_models_teacher_forced(small: Model) -> None:
    check_teacher_forced(small, random_tokens(small.session, 300))


def test_small_models_generate(small: Model) -> None:
    check_generated(small, random_tokens(small.session, 5), 200)


def test_small_models_after_other_prompts(small: Model) -> None:
    """What an earlier launch left in cache and exchange buffer does not show."""
    tokens = random_tokens(small.session, 20)
    first = small.session.logits(tokens)
    small.session.generate(random_tokens(small.session, 150, seed=1), 200, stop=())
    assert np.array_equal(small.session.logits(tokens), first)


def check_passes(model: Model, tokens: list[int]) -> None:
    """Logits after a prompt that went through the model in passes: as exact as BF16, and the same wherever cut."""
    exact, bf16 = (model.reference(tokens, dtype)[-1:] for dtype in (torch.float32, torch.bfloat16))
    runtime, last = model.session.runtime, len(tokens) - 1

    def after(*cuts: int) -> F32:
        for start, end in zip((0, *cuts), (*cuts, last), strict=True):
            runtime.run(Request(tuple(tokens[start : end + 1]), start, max_new=1))
        logits = runtime.run(Request((tokens[last],), last, logits=True)).logits
        assert logits is not None
        return np.array(logits)

    whole = after()
    print(f"relative logit error {relative(whole, exact):.2e}, Transformers in BF16 {relative(bf16, exact):.2e}")
    assert relative(whole, exact) <= 1.5 * relative(bf16, exact)  # of one position: both errors are noise
    assert np.array_equal(after(100).view(np.uint32), whole.view(np.uint32))


def test_small_models_in_passes(small: Model) -> None:
    check_passes(small, random_tokens(small.session, 300))


@pytest.mark.timeout(900)
def test_full_size_in_passes(full: Model) -> None:
    check_passes(full, random_tokens(full.session, 300))


@pytest.mark.timeout(900)
def test_an_fp8_cache_is_as_exact_as_what_it_stores(fp8: Model) -> None:
    """Teacher-forced and after passes; a second run gives the same bits, and tokens are those of the logits."""
    session, tokens = fp8.session, random_tokens(fp8.session, 600)
    plan, runtime = session.plan, session.runtime
    plain, half = (fp8.reference(tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
    logits = session.logits(tokens)
    over = over_cache(plan, fp8.checkpoint, tokens, runtime.download("kv", 0, plan.kv_bytes))
    print(f"relative logit error {relative(logits, over):.2e}, BF16 {relative(half, plain):.2e}; ", end="")
    print(f"of the FP8 cache {relative(logits, plain):.2e}")
    assert relative(logits, over) <= relative(half, plain)
    assert np.array_equal(session.logits(tokens).view(np.uint32), logits.view(np.uint32))
    made = session.generate(tokens[:100], 300, stop=()).tokens
    session.reset()
    assert session.generate(tokens[:100], 300, stop=()).tokens == made
    last = len(tokens) - 1
    runtime.run(Request(tuple(tokens), max_new=1))
    after = np.array(runtime.run(Request((tokens[last],), last, logits=True)).logits)
    over = over_cache(plan, fp8.checkpoint, tokens, runtime.download("kv", 0, plan.kv_bytes))
    assert relative(after, over[-1:]) <= 1.5 * relative(half[-1:], plain[-1:])  # of one position: both are noise


DRAWN = Sampling(seed=3, temperature=0.8)


def samples(model: Model, prompt: list[int], n: int, count: int, sampling: Sampling) -> tuple[list[list[int]], F32]:
    """Tokens of n samples, and float32[count][n][vocab] logits from which they were chosen."""
    runtime = model.session.runtime
    made: list[list[int]] = [[] for _ in range(n)]
    for sample, token in runtime.samples(Request(tuple(prompt), max_new=count, sampling=sampling, logits=True), n):
        made[sample].append(token)
    return made, np.array(runtime.sample_logits(n, count))


def check_samples(model: Model, length: int, n: int, count: int) -> None:
    """Each sample's logits as exact as BF16, and the same bits alone and again."""
    prompt = random_tokens(model.session, length)
    made, logits = samples(model, prompt, n, count, DRAWN)
    again, same = samples(model, prompt, n, count, DRAWN)
    assert again == made
    assert np.array_equal(same.view(np.uint32), logits.view(np.uint32))
    for i in (0, n - 1):
        tokens = prompt + made[i][:-1]
        exact, bf16 = (model.reference(tokens, dtype)[length - 1 :] for dtype in (torch.float32, torch.bfloat16))
        assert relative(logits[:, i], exact) <= 1.2 * relative(bf16, exact)
        alone, own = samples(model, prompt, 1, count, replace(DRAWN, seed=3 + i))
        assert alone == [made[i]]
        assert np.array_equal(own[:, 0].view(np.uint32), logits[:, i].view(np.uint32))


def test_small_models_in_samples(small: Model) -> None:
    """Past the end of a page, with half of the columns and with all of them."""
    if small.session.plan.samples is None:
        assert small.session.spec.dtype == "fp16"
        return
    check_samples(small, 120, 3, 20)
    check_samples(small, 250, 16, 12)


@pytest.mark.timeout(900)
def test_full_size_in_samples(full: Model) -> None:
    check_samples(full, 120, 8, 16)


def test_samples_take_little_longer_than_one_stream(full: Model) -> None:
    """Together many times the tokens per second of one, and what has ended costs nothing more."""
    prompt = random_tokens(full.session, 129)
    session = full.session
    one = min(session.generate(prompt, 256, stop=()).seconds for _ in range(3))
    for n, times in ((8, 2), (16, 4)):
        made = min(session.generate_many(prompt, n, 256, stop=())[0].seconds for _ in range(3))
        assert n * one / made > times
    drawn = session.generate_many(prompt, 4, 256, stop=(), sampling=DRAWN)
    stop = [row.tokens[5] for row in drawn]
    ended = session.generate_many(prompt, 4, 256, stop=stop, sampling=DRAWN)
    assert all(row.finish_reason == "stop" for row in ended)
    assert ended[0].seconds < drawn[0].seconds / 4


def test_samples_are_chosen_from_their_logits_by_their_seeds(full: Model) -> None:
    """By Transformers' processors and the noise of each seed, wherever that leaves no doubt."""
    prompt, n, count = random_tokens(full.session, 100), 16, 24
    everything = Sampling(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.001, repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.1, logit_bias=((5, 1.0),), seed=8,
    )  # fmt: skip
    made, logits = samples(full, prompt, n, count, everything)
    doubtful = 0
    for i, tokens in enumerate(made):
        for k, token in enumerate(tokens):
            scores = processed(logits[k, i], everything, prompt, tokens[:k])
            expected, lead = choice(scores, replace(everything, seed=8 + i), len(prompt) + k - 1)
            doubtful += lead <= 1e-3
            assert token == expected or lead <= 1e-3, (i, k, token, expected, lead)
    assert doubtful < 8
    alone = full.session.generate(prompt, count, stop=(), sampling=replace(everything, seed=8 + n - 1, logprobs=3))
    together = full.session.generate_many(prompt, n, count, stop=(), sampling=replace(everything, logprobs=3))[-1]
    assert together.tokens == made[-1]
    agreed = shared_length(
        together.tokens, alone.tokens
    )  # up to the first choice that the last bits of the logits decide
    for ours, theirs in zip(together.logprobs[:agreed], alone.logprobs, strict=False):
        assert abs(ours.chosen - theirs.chosen) < 0.1


def test_ten_turns_are_as_ten_cold_starts(full: Model) -> None:
    """The same tokens, and a turn costs what is new in it, not what came before."""
    session, turns = full.session, []
    history: list[int] = []
    for turn in range(10):
        history += random_tokens(session, 40, seed=turn)
        made = session.generate(history, 40, stop=())
        turns.append((list(history), made))
        history += made.tokens
    for prompt, made in turns:
        session.reset()
        cold = session.generate(prompt, 40, stop=())
        assert (cold.tokens, cold.cached_tokens) == (made.tokens, 0)
    for prompt, made in turns[1:]:
        assert made.cached_tokens == len(prompt) - 81  # run again: the last token before, the answer, the new words
    assert turns[9][1].seconds < 1.15 * turns[2][1].seconds


@pytest.mark.timeout(900)
def test_full_size_teacher_forced(full: Model) -> None:
    check_teacher_forced(full, random_tokens(full.session, 256))


@pytest.mark.timeout(900)
def test_full_size_generates(full: Model) -> None:
    check_generated(full, random_tokens(full.session, 8), 256)


def test_full_size_runs_are_bit_identical(full: Model) -> None:
    tokens = random_tokens(full.session, 256)
    first, second = full.session.logits(tokens), full.session.logits(tokens)
    assert np.array_equal(first.view(np.uint32), second.view(np.uint32))
    runs = [full.session.generate(tokens[:8], 256, stop=()).tokens for _ in range(2)]
    assert runs[0] == runs[1]


def test_full_size_tokens_stream_and_stop(full: Model) -> None:
    """Tokens arrive while the kernel runs, and closing the stream ends it long before its last token."""
    session = full.session
    session.generate([5], 8, stop=())
    whole = session.generate([5], 1000, stop=())
    with session.stream([5], 1000, stop=()) as stream:
        started = time.perf_counter()
        pieces = [next(stream).token for _ in range(10)]
    assert pieces == whole.tokens[:10]
    assert time.perf_counter() - started < whole.seconds / 2
    assert session.generate([5], 1000, stop=()).tokens == whole.tokens


def test_stop_tokens_end_a_generation(small: Model) -> None:
    tokens = small.session.generate([5, 6], 50, stop=()).tokens
    made = small.session.generate([5, 6], 50, stop=[tokens[20]])
    assert made.tokens == tokens[: tokens.index(tokens[20]) + 1]
    assert made.finish_reason == "stop"


@pytest.mark.parametrize("spec", ["smollm2-135m", "qwen2.5-1.5b"])
@pytest.mark.timeout(900)
def test_bench_of_dummy_weights(spec: str, tmp_path: Path) -> None:
    assert PROFILE is not None
    build(spec, PROFILE, tmp_path / "a", BuildOptions(max_context=1024, dummy_weights=True))
    result = run_bench(tmp_path / "a", 64, (0, 500), samples=(2, 16))
    assert result["comparison"]["passed"] is True
    assert 1e12 < result["ceiling_bytes_per_second"] < 6e12
    assert all(test["tokens_per_second"] > 100 for test in result["tests"])


@pytest.mark.parametrize("small", ["llama"], indirect=True)
def test_an_artifact_is_opened_and_closed_many_times(small: Model) -> None:
    """No memory is left behind."""
    free = [_free_memory()]
    for _ in range(3):
        with kogc.load(small.checkpoint.parent / "artifact") as session:
            session.logits([3, 4, 5])
        free.append(_free_memory())
    assert free[-1] == free[1]


@pytest.mark.parametrize("small", ["llama"], indirect=True)
def test_a_session_is_closed_under_a_stream(small: Model) -> None:
    """The kernel ends before its memory goes, and the next session finds a sound device."""
    artifact = small.checkpoint.parent / "artifact"
    session = kogc.load(artifact)
    stream = session.stream([5], 300, stop=())
    first = next(stream).token
    session.close()
    with pytest.raises(KogcError, match="closed"):
        while True:
            next(stream)
    with kogc.load(artifact) as again:
        assert again.generate([5], 1, stop=()).tokens == [first]


@pytest.mark.parametrize("small", ["llama", "llama-fp16", "qwen3-hd128"], indirect=True)
def test_numbers_that_are_none_end_with_their_text(small: Model) -> None:
    """A token whose embedding is infinite spoils its own text, run in passes, and none after it."""
    session, bad, good = small.session, 11, [5, 9, 2]
    infinity = np.full(1, 0x7C00 if session.spec.dtype == "fp16" else 0x7F80, np.uint16)
    row = session.runtime.program.operand("embedding").offset + bad * session.spec.hidden * 2
    before = session.runtime.download("embedding", row - session.runtime.program.operand("embedding").offset, 2)
    cold, tokens = session.logits(good), session.generate(good, 9, stop=()).tokens
    try:
        session.runtime.upload(row, memoryview(infinity.tobytes()))
        assert not np.isfinite(session.logits([*good, bad, 7, 8])).all()
        session.generate([*range(20, 60), bad, *range(20, 60)], 3, stop=())
        np.testing.assert_array_equal(session.logits(good), cold)
        assert session.generate(good, 9, stop=()).tokens == tokens
    finally:
        session.runtime.upload(row, memoryview(before.tobytes()))


def _free_memory() -> int:
    from cuda.bindings import driver

    status, free, _ = driver.cuMemGetInfo()
    assert status == driver.CUresult.CUDA_SUCCESS
    return int(free)
