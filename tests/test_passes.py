"""Passes of many tokens: the plan cuts every phase completely, and the kernel leaves the right keys and values."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import emulated_cases as one_by_one
import numpy as np
import pytest
import random_checkpoint as rc
import torch
from emulated_cases import SMALL, TINY, Case, error, prompt
from emulator import Emulated, EmulatorError, planted
from fp8_cache import over_cache

from kogc.errors import KogcError
from kogc.plan.check import check
from kogc.plan.passes import Passes, passes
from kogc.plan.plan import Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.resources import data_dir
from kogc.spec import load_spec

SPECS = sorted(path.stem for path in data_dir("model_specs").glob("*.yaml"))
GPUS = ("h200-sxm", "a100-sxm-80gb", "rtx-4090", "dgx-spark")


def deep(name: str) -> Case:
    """A case with two layers: attention of the last, of which only keys and values are wanted, leaves no trace."""
    case = one_by_one.CASES[name]
    return replace(case, overrides={**case.overrides, "num_hidden_layers": 2})


CASES = {
    "llama": one_by_one.CASES["llama"],
    # Phases in which most blocks have no part.
    "more-blocks-than-units": one_by_one.CASES["more-blocks-than-units"],
    # So many tiles of rows in a block that it reads the activations twice.
    "one-block": one_by_one.CASES["one-block"],
    # Units of 4 rows, several fragments in a slice, last tiles that are not full.
    "wide": Case(
        "llama",
        7,
        {"num_hidden_layers": 2, "hidden_size": 768, "intermediate_size": 1152, "head_dim": 64, "vocab_size": 131},
        stages=8,
        knobs={"stage_bytes": 16384},
    ),
    "llama3-rope": one_by_one.CASES["llama3-rope"],
    "fp16": one_by_one.CASES["fp16"],
    "two-tiles": one_by_one.CASES["two-tiles"],
    "mistral-window": one_by_one.CASES["mistral-window"],
    "long-window": deep("long-window"),
    "long": deep("combine"),
    "widest-head": one_by_one.CASES["widest-head"],
    "qwen2": one_by_one.CASES["qwen2"],
    "qwen3": one_by_one.CASES["qwen3"],
    # A step that the ring of a pass holds several times.
    "roomy": one_by_one.CASES["step-in-ring"],
    "one-layer": Case("llama", 3, {**SMALL, "vocab_size": 101}, stages=8),
    "two-together": Case("llama", 2, {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, stages=8),
    "async": one_by_one.CASES["async"],
    "async-narrow": one_by_one.CASES["async-narrow"],
    "fp8": one_by_one.CASES["fp8"],
    "fp8-two-together": Case(
        "llama", 2, {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, stages=8, kv_dtype="fp8"
    ),
    "fp8-window": deep("fp8-window"),
    "fp8-hd96": one_by_one.CASES["fp8-hd96"],
    "fp8-hd128": deep("fp8-hd128"),
    "fp8-async": one_by_one.CASES["fp8-async"],
}


@functools.cache
def emulated(name: str) -> tuple[Emulated, str]:
    checkpoint = rc.make(
        one_by_one.Path(one_by_one.folder().name) / f"passes-{name}", CASES[name].family, **CASES[name].overrides
    )
    return Emulated(one_by_one.plan_of(CASES[name], checkpoint), checkpoint), checkpoint


def passes_of(plan: Plan) -> Passes:
    assert plan.passes
    return plan.passes


def length(name: str, model: Emulated) -> int:
    """Of a prompt: more than a pass, and more than a chunk of the cache where the case is about that."""
    return min(max(CASES[name].tokens, passes_of(model.plan).tokens + 11), model.plan.max_context - 2)


def test_the_cases_cover_what_a_pass_can_hold() -> None:
    plans = [emulated(name)[0].plan for name in CASES]
    products = [product for plan in plans for product in passes_of(plan).products]
    assert {product.phase.unit for product in products} == {4, 8}
    assert {product.splits > 1 for product in products} == {True, False}
    assert any(
        product.most_tiles > passes_of(plan).sweep_tiles for plan in plans for product in passes_of(plan).products
    )
    assert any(product.phase.units * product.phase.unit % 16 for product in products)
    assert any(product.tiles < product.groups for product in products)
    assert any(passes_of(plan).slice(product) > 1 for plan in plans for product in passes_of(plan).products)
    assert {passes_of(plan).tiles_together for plan in plans} == {1, 2}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_in_passes_is_as_exact_as_the_weights(name: str) -> None:
    """And gives the same bits in every order of blocks, and wherever it is cut."""
    model, checkpoint = emulated(name)
    tokens = prompt(model.plan.spec.vocab, length(name, model) + 1)
    cache = model.buffers["kv"].bytes
    cache[:] = 0
    model.prompt(tokens[:-1])
    whole = cache.copy()
    got = model.logits(tokens[-1:], start=len(tokens) - 1)[0]
    reference = rc.reference_logits(checkpoint, tokens)[-1]
    half = rc.reference_logits(checkpoint, tokens, torch.bfloat16)[-1]
    ours = reference if CASES[name].kv_dtype == "bf16" else over_cache(model.plan, checkpoint, tokens, cache)[-1]
    assert error(got, ours) <= error(half, reference)
    cache[:] = 0
    model.prompt(tokens[:21], seed=2)
    model.prompt(tokens[21:-1], seed=3, start=21)
    np.testing.assert_array_equal(cache, whole)


def test_the_host_can_end_a_prompt() -> None:
    model, _ = emulated("llama")
    cache = model.buffers["kv"].bytes
    cache[:] = 0
    model.prompt(prompt(model.plan.spec.vocab, 150), halt=True)
    assert not cache.any()


# What a pass relies on, left out.
BUGS = {
    "results are read before all blocks have met": (
        "cuda/pass_layout.cuh",
        "((RELEASED ? load_acquired(count) : load_word(count)) - needed) >= 0",
        "needed > 0",
    ),
    "activations are copied before they are made": ("cuda/pass_stream.cuh", "if (seen_ < needed) return false;", ""),
    "a stage is overwritten while it is read": (
        "cuda/pass_stream.cuh",
        "all_lanes(barrier_test(PassRing<P>::empty(weights_.at.slot), weights_.at.parity ^ 1))",
        "ahead_ < Q::STAGES",
    ),
    "a stage is read before it has landed": (
        "cuda/pass_product.cuh",
        "while (!barrier_passed(PassRing<P>::full(at.slot), at.parity)) spin.step(where, STAGE_FULL, at.parity);",
        "",
    ),
    "queries look past their own position": (
        "cuda/pass_attention.cuh",
        "&& at <= position_[tile][i % 2] ?",
        "&& at <= position_[tile][i % 2] + 1 ?",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str) -> None:
    good, checkpoint = emulated("llama")
    file, old, new = BUGS[bug]
    bad = Emulated(good.plan, checkpoint, planted(file, old, new))
    tokens = prompt(good.plan.spec.vocab, 75)
    good.buffers["kv"].bytes[:] = 0
    good.prompt(tokens)
    for seed in range(1, 5):
        bad.buffers["kv"].bytes[:] = 0
        try:
            bad.prompt(tokens, seed=seed)
        except EmulatorError:
            return
        if not np.array_equal(bad.buffers["kv"].bytes, good.buffers["kv"].bytes):
            return
    pytest.fail("four orders of threads did not show it")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("spec", SPECS)
def test_every_model_is_cut_completely(spec: str, gpu: str) -> None:
    """Each tile of rows and each fragment of columns is one block's, and what a block needs fits its memory."""
    plan = make_plan(load_spec(spec), load_profile(gpu), Options(max_context=2048))
    cut = passes_of(plan)
    assert cut.memory_bytes <= plan.profile.smem_per_block
    for product in cut.products:
        assert product.groups * product.splits <= plan.blocks
        shares = [g * product.tiles // product.groups for g in range(product.groups + 1)]
        assert (shares[0], shares[-1]) == (0, product.tiles)
        assert max(b - a for a, b in itertools.pairwise(shares)) == product.most_tiles
        assert product.splits <= product.phase.fragments
        assert product.slice_bytes(cut.slice(product)) <= cut.stage_bytes
        assert cut.slice(product) * -(-product.most_fragments // cut.slice(product)) >= product.most_fragments
    for regions in (cut.memory, cut.scratch):
        assert all(a.offset + a.bytes <= b.offset for a, b in itertools.pairwise(regions))
    assert cut.scratch[-1].offset + cut.scratch[-1].bytes <= cut.scratch_bytes


def test_a_cut_fits_memory_of_any_size() -> None:
    """Also where less is left over than the last region is rounded up by."""
    h200, spec = load_profile("h200-sxm"), load_spec("llama-3.2-1b")
    for size in range(h200.smem_per_block - 1024, h200.smem_per_block, 16):
        plan = make_plan(spec, replace(h200, smem_per_block=size), Options(max_context=2048, blocks=8))
        assert passes_of(plan).memory_bytes <= size
        assert plan.samples
        assert plan.samples.memory_bytes <= size


def check_with(changed: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(load_spec("llama-3.2-1b"), load_profile("h200-sxm"), Options(max_context=2048))
    monkeypatch.setattr(Plan, "passes", changed)
    check(plan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cut: {"memory_bytes": 1 << 20}, "bytes of shared memory of 232448"),
        (lambda cut: {"stage_bytes": 4096}, "in stages of 4096"),
        (lambda cut: {"scratch": (cut.scratch[1], cut.scratch[0])}, "barrier at 0 overlaps residual"),
        (lambda cut: {"products": (replace(cut.products[0], groups=129),)}, "516 parts for 128 blocks"),
        (lambda cut: {"products": (replace(cut.products[2], splits=2, groups=64),)}, "gate and up meet in one block"),
    ],
)
def test_a_cut_that_cannot_work_is_found(change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = passes_of(make_plan(load_spec("llama-3.2-1b"), load_profile("h200-sxm"), Options(max_context=2048)))
    check_with(cut, monkeypatch)
    with pytest.raises(KogcError, match=words):
        check_with(replace(cut, **change(cut)), monkeypatch)


def test_passes_of_a_cpu_are_others() -> None:
    plan = make_plan(load_spec("llama-3.2-1b"), load_profile("cpu-avx2"), Options(blocks=2))
    assert passes(plan) is None
    assert plan.cpu_passes
