"""The session and the bench over a real binary: small models built for this machine's CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint

import kogc
from kogc.bench import run_bench
from kogc.build import BuildOptions, build
from kogc.compare import compare
from kogc.errors import KogcError
from kogc.reference import KeyValue
from kogc.sampling import Sampling
from kogc.session import Session
from kogc.targets.detect import detect_cpu_profile
from kogc.tokenizer import Tokenizer


def build_small(directory: Path, family: str, kv_dtype: str = "bf16", **changes: Any) -> Path:
    checkpoint = random_checkpoint.make(directory, family, tokenizer=True, **changes)
    options = BuildOptions(max_context=400, kv_dtype=kv_dtype)
    build(str(checkpoint), detect_cpu_profile(), directory / "artifact", options)
    return directory / "artifact"


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small(tmp_path_factory.mktemp("llama"), "llama", request.param)


@pytest.fixture(scope="module")
def small(artifact: Path) -> Iterator[Session]:
    with kogc.load(artifact) as session:
        yield session


def test_text_is_that_of_the_tokens(small: Session, artifact: Path) -> None:
    made = small.generate("def f(", 40, stop=())
    tokenizer = Tokenizer(artifact)
    assert made.prompt_tokens == len(tokenizer.encode("def f("))
    assert len(made.tokens) == 40
    assert made.text == tokenizer.decode(made.tokens)


def test_generation_follows_from_teacher_forced_logits(small: Session) -> None:
    """Ties aside, the token made is the best of the logits of all before it."""
    prompt = [1, 5, 9]
    made = small.generate(prompt, 60, stop=()).tokens
    logits = small.logits(prompt + made[:-1])[len(prompt) - 1 :]
    assert logits.argmax(axis=1).tolist() == made


def test_logits_do_not_depend_on_where_launches_are_cut(small: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, small.spec.vocab, 150)]
    whole = small.logits(tokens)
    monkeypatch.setattr("kogc.session.LOGIT_POSITIONS", 37)
    assert np.array_equal(small.logits(tokens), whole)


def test_a_known_beginning_gives_what_a_cold_start_gives(small: Session) -> None:
    small.reset()
    first = small.generate([1, 5, 9, 40], 150, stop=())
    prompt = [1, 5, 9, 40, *first.tokens[:140], 7, 8]
    warm = small.generate(prompt, 40, stop=())
    small.reset()
    cold = small.generate(prompt, 40, stop=())
    assert (warm.tokens, warm.cached_tokens, cold.cached_tokens) == (cold.tokens, 144, 0)


def test_samples_are_those_of_one_stream_each(small: Session) -> None:
    drawn = Sampling(seed=(1 << 64) - 2, top_k=50, repetition_penalty=1.2)
    made = small.generate_many([1, 5, 9], 3, 20, stop=(), sampling=drawn)
    for one, seed in zip(made, ((1 << 64) - 2, (1 << 64) - 1, 0), strict=True):
        alone = small.generate([1, 5, 9], 20, stop=(), sampling=replace(drawn, seed=seed))
        assert (one.tokens, one.text) == (alone.tokens, alone.text)
    assert len({tuple(one.tokens) for one in made}) == 3
    assert {one.seconds for one in made} == {made[0].seconds} != {0}


def test_samples_in_a_bench_need_a_build_that_makes_them_together(artifact: Path) -> None:
    with pytest.raises(KogcError, match="--samples: .* makes samples one after the other"):
        run_bench(artifact, 4, (0,), samples=(2,))


def test_closing_a_stream_ends_the_kernel(small: Session) -> None:
    whole = small.generate([1, 5], 390, stop=()).tokens
    with small.stream([1, 5], 390, stop=()) as stream:
        first = [next(stream).token for _ in range(3)]
        before = time.perf_counter()
    assert first == whole[:3]
    assert time.perf_counter() - before < 5
    assert small.generate([1, 5], 390, stop=()).tokens == whole


def test_stop_token_ends_a_generation(small: Session) -> None:
    tokens = small.generate([1, 5], 50, stop=()).tokens
    made = small.generate([1, 5], 50, stop=[tokens[20]])
    assert made.tokens == tokens[: tokens.index(tokens[20]) + 1]
    assert made.finish_reason == "stop"


def test_bench_passes_its_own_comparison(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench(artifact, 8, (0, 200), repeat=1)
    assert result["comparison"]["passed"] is True
    assert all(test["tokens_per_second"] > 1 for test in result["tests"])
    printed = capsys.readouterr().out
    assert "tg8 @ d200" in printed
    fp8 = result["kv_dtype"] == "fp8"
    assert (result["comparison"]["cache_error"] is not None) == ("costs a relative logit error" in printed) == fp8


def test_bench_times_sampling(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench(artifact, 8, (0, 200), repeat=1, sample=True)
    assert [test["test"] for test in result["tests"]] == ["tg8", "tg8 @ d200", "tg8 sampled"]
    assert "tg8 sampled" in capsys.readouterr().out


def test_comparison_sees_a_lost_position(small: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The depth check is sensitive: one key and value that the reference reads as zero is far beyond the limit."""
    from kogc import compare as module

    honest = module._cached

    def cached(runtime: object, start: int, count: int) -> list[KeyValue]:
        layers = honest(small.runtime, start, count)
        if count == 40:
            for _, values in layers:
                values[:, 20] = 0
        return layers

    assert compare(small.runtime, (40,)).problems == []
    monkeypatch.setattr(module, "_cached", cached)
    assert any("depth 40: relative" in problem for problem in compare(small.runtime, (40,)).problems)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 37, "head_dim": 64}),
        ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
        ("qwen2", {"hidden_size": 192}),
        ("llama", {"dtype": "float16", "head_dim": 96}),
        ("mistral", {"sliding_window": 37, "head_dim": 64, "kv_dtype": "fp8"}),
        ("qwen3", {"head_dim": 128, "tie_word_embeddings": True, "kv_dtype": "fp8"}),
        ("llama", {"dtype": "float16", "head_dim": 96, "kv_dtype": "fp8"}),
    ],
)
def test_families_agree_with_the_reference_at_depth(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with kogc.load(build_small(tmp_path, family, **changes)) as session:
        assert compare(session.runtime, (1, 36, 38, 130, 300)).problems == []


def test_a_closed_session_refuses(artifact: Path) -> None:
    session = kogc.load(artifact)
    session.close()
    with pytest.raises(KogcError, match="closed"):
        session.logits([1, 2])
