"""Passes of the CPU target: a prompt taken 16 tokens at a time leaves the bits of one taken token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import random_checkpoint as rc
from test_cpu_numerics import CASES, PROFILES, Case, make_program
from test_cpu_target import SPEC, avx2, open_small, small_plan

from kogc.errors import KogcError
from kogc.importer import spec_from_dir
from kogc.plan.check import check
from kogc.plan.cpu_passes import TOKENS
from kogc.plan.plan import Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.render import render
from kogc.runtime import Request, Runtime, open_runtime
from kogc.sampling import Sampling
from kogc.spec import load_spec
from kogc.targets.cpu_features import cpu_features

pytestmark = avx2

ALL = {
    case.name: case
    for case in (
        *CASES,
        # Heads of 32, units of 4 rows, tied weights, a window that passes cross.
        Case("mistral-small", "mistral", 2, 90, PROFILES, {"tie_word_embeddings": True, "sliding_window": 37}),
        Case("qwen2-fp16", "qwen2", 3, 90, PROFILES[:2], {"dtype": "float16"}),
    )
}
LENGTHS = (1, 2, TOKENS, TOKENS + 1, TOKENS + 2, 3 * TOKENS + 5)


def profile_of(case: Case) -> str:
    """One instruction set a case, each with several cases."""
    here = [name for name in case.profiles if cpu_features().issuperset(load_profile(name).flags)]
    return here[list(ALL).index(case.name) % len(here)]


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Case, Runtime]]:
    case = ALL[request.param]
    path = tmp_path_factory.mktemp(case.name)
    program = make_program(rc.make(path, case.family, **case.config), profile_of(case), case.blocks, path)
    with open_runtime(program, oversubscribe=True) as runtime:
        yield case, runtime


def text(runtime: Runtime, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(count).integers(0, runtime.plan.spec.vocab, count).tolist())


def kv_of(runtime: Runtime) -> np.ndarray:
    return runtime.download("kv", 0, runtime.plan.kv_bytes)


def clear(runtime: Runtime) -> None:
    runtime._kv[:] = 0  # type: ignore[attr-defined]


def one_by_one(runtime: Runtime, tokens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of each position, and the cache, of a text that goes token by token: a launch each, so no passes."""
    clear(runtime)
    rows = []
    for position, token in enumerate(tokens):
        logits = runtime.run(Request((token,), position, logits=True)).logits
        assert logits is not None
        rows.append(logits.copy())
    return np.concatenate(rows), kv_of(runtime)


def test_the_cases_cover_what_passes_meet() -> None:
    specs = [case.config for case in ALL.values()]
    assert {case.family for case in ALL.values()} == set(rc.FAMILIES)
    assert {config.get("head_dim", 32) for config in specs} >= {32, 64, 96, 128}
    profiles = {profile_of(case) for case in ALL.values()}
    assert profiles == {name for name in PROFILES if cpu_features().issuperset(load_profile(name).flags)}


def test_the_cases_have_units_of_both_sizes(tmp_path: Path) -> None:
    units = set()
    for case in ALL.values():
        spec, _ = spec_from_dir(rc.make(tmp_path, case.family, **case.config))
        units |= {p.unit for p in make_plan(spec, load_profile("cpu-avx2"), Options(blocks=case.blocks)).phases}
    assert units == {4, 8}


def test_a_pass_gives_the_bits_of_token_by_token(model: tuple[Case, Runtime]) -> None:
    case, runtime = model
    tokens = text(runtime, case.tokens)
    exact, cache = one_by_one(runtime, tokens)
    clear(runtime)
    logits = runtime.run(Request(tokens, logits=True)).logits
    np.testing.assert_array_equal(logits, exact)
    np.testing.assert_array_equal(kv_of(runtime), cache)
    # Cut anywhere, with launches that give no logits in between.
    for cut in (1, TOKENS - 1, TOKENS + 7, len(tokens) - 3):
        clear(runtime)
        runtime.run(Request(tokens[:cut]))
        runtime.run(Request(tokens[cut:-1], cut))
        np.testing.assert_array_equal(
            runtime.run(Request(tokens[-1:], len(tokens) - 1, logits=True)).logits, exact[-1:]
        )
        np.testing.assert_array_equal(kv_of(runtime), cache)


@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_of_every_length(model: tuple[Case, Runtime], length: int) -> None:
    _, runtime = model
    tokens = text(runtime, length)
    exact, cache = one_by_one(runtime, tokens)
    clear(runtime)
    made = runtime.run(Request(tokens, max_new=1)).tokens
    np.testing.assert_array_equal(kv_of(runtime), cache)
    assert made == [int(exact[-1].argmax())]


def test_penalties_know_the_whole_prompt(model: tuple[Case, Runtime]) -> None:
    _, runtime = model
    sampling = Sampling(temperature=0, repetition_penalty=4.0)
    tokens = text(runtime, 2 * TOKENS + 3)
    for i in range(2 * TOKENS):
        logits = runtime.run(Request(tokens, logits=True)).logits
        assert logits is not None
        plain = logits[-1].copy()
        if int(plain.argmax()) in tokens[:-1]:
            break
        tokens = (*tokens[:i], int(plain.argmax()), *tokens[i + 1 :])  # so that passes hold what would follow
    else:
        pytest.fail("no prompt holds its own likeliest continuation")
    seen, penalised = np.unique(tokens), plain.copy()
    penalised[seen] = np.where(plain[seen] > 0, plain[seen] / np.float32(4), plain[seen] * np.float32(4))
    assert runtime.run(Request(tokens, max_new=1, sampling=sampling)).tokens == [int(penalised.argmax())]


# --- a prompt is ended by its host


def test_the_host_ends_a_prompt_after_the_pass_at_hand(tmp_path: Path) -> None:
    """The stop word is set while the third pass is about to begin: two passes have left keys, and nothing follows."""
    plan = small_plan()
    rendered = render(plan)
    look = "if (block() == 0 && load_host(args.stop_word)) leave(STOPPED);"
    source = rendered.headers["cpu/kernels.hpp"]
    assert look in source
    host = "if (block() == 0 && step == 2 * P::TOKENS) store_host((void*)args.stop_word, 1);\n"
    headers = {**rendered.headers, "cpu/kernels.hpp": source.replace(look, host + look)}
    with open_small(plan, dataclasses.replace(rendered, headers=headers), tmp_path) as runtime:
        assert runtime.run(Request(tuple(range(100)), max_new=4)).tokens == []
        heads = kv_of(runtime).view(np.uint16).reshape(SPEC.layers * SPEC.kv_heads, -1)
        keys = heads[:, : 128 * SPEC.head_dim].reshape(len(heads), 128, SPEC.head_dim)
        assert keys[:, : 2 * TOKENS].any(axis=2).all()
        assert not keys[:, 2 * TOKENS :].any()
        assert runtime.words.report[0] == 0


# --- bugs

BUGS = {
    "a token sees the one after it": ("of_[i], position(i),", "of_[i], position(i) + (i < 5),"),
    "all tokens are rotated alike": (
        "int position(int i) const { return args_.start + where_.step + i; }",
        "int position(int i) const { return args_.start + where_.step + (i > 9 ? 9 : i); }",
    ),
    "two tokens share their exchanges": ("+= i * P::EXCHANGE_BYTES", "+= (i == 3 ? 4 : i) * P::EXCHANGE_BYTES"),
    "a token is scaled as the first": ("Residual<P>::scale(i)", "Residual<P>::scale(0)"),
}  # fmt: skip


def pass_is_exact(source: str, tmp_path: Path) -> bool:
    """Whether a decoder leaves the same cache after passes as token by token, on dummy weights."""
    plan = small_plan()
    rendered = render(plan)
    headers = {**rendered.headers, "common/decoder.h": source}
    tokens = tuple(range(1, 40))
    with open_small(plan, dataclasses.replace(rendered, headers=headers), tmp_path) as runtime:
        _, cache = one_by_one(runtime, tokens)
        clear(runtime)
        runtime.run(Request(tokens))
        return np.array_equal(kv_of(runtime), cache)


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_a_planted_bug_is_noticed(bug: str | None, tmp_path: Path) -> None:
    source = render(small_plan()).headers["common/decoder.h"]
    old, new = BUGS[bug] if bug else ("", "")
    assert old in source, "decoder.h has changed: plant the bug anew"
    assert pass_is_exact(source.replace(old, new) if bug else source, tmp_path) == (bug is None)


# --- the plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_bytes": 64}, "64 of .* bytes for an activation"),
        ({"exchange_bytes": 4096}, "exchange .* ends at .*, a token's at 4096"),
        ({"memory_bytes": 4096}, "ends after 4096 bytes"),
        ({"tokens": 32}, "activation has .* of .* bytes"),
    ],
)
def test_tokens_that_would_overlap_are_found(
    change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan() -> Plan:
        return make_plan(load_spec("llama-3.2-1b"), load_profile("cpu-avx2"), Options(blocks=2, max_context=1024))

    good = plan()
    check(good)
    assert good.cpu_passes
    monkeypatch.setattr(Plan, "cpu_passes", dataclasses.replace(good.cpu_passes, **change))
    with pytest.raises(KogcError, match=words):
        check(plan())
