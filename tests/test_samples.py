"""Samples: continuations made together are those made alone, each with its own seed, pages and end."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import emulated_cases as one_by_one
import numpy as np
import pytest
import random_checkpoint as rc
import test_passes as in_passes
import torch
from emulated_cases import SMALL, TINY, Case, error, prompt
from emulator import Emulated, EmulatorError, SampledTokens, planted

from kogc.errors import KogcError
from kogc.plan.check import check
from kogc.plan.plan import Options, Plan, make_plan
from kogc.plan.samples import COLUMNS, Samples, own_pages
from kogc.profile import load_profile
from kogc.sampling import GREEDY, Sampling
from kogc.spec import load_spec

EVEN = Case("llama", 3, TINY, stages=8)

# Name: the case, tokens of the prompt, samples, tokens of each.
CASES: dict[str, tuple[Case, int, int, int]] = {
    "llama": (in_passes.CASES["llama"], 5, 3, 4),
    "wide-tile": (in_passes.CASES["llama"], 5, 16, 3),
    "more-blocks-than-units": (in_passes.CASES["more-blocks-than-units"], 4, 11, 2),
    "one-block": (in_passes.CASES["one-block"], 4, 9, 2),
    # Units of 4 rows, so many tiles in a block that it reads the activations again.
    "wide": (in_passes.CASES["wide"], 3, 9, 2),
    "two-tiles": (in_passes.CASES["two-tiles"], 6, 3, 2),
    "mistral-window": (in_passes.CASES["mistral-window"], 5, 4, 6),
    # A window that leaves the prompt's first chunks behind.
    "long-window": (in_passes.CASES["long-window"], 300, 2, 3),
    # The prompt ends within a page, and each sample goes on in a second one of its own.
    "long": (in_passes.CASES["long"], 253, 3, 8),
    # The prompt ends with its page.
    "whole-page": (in_passes.CASES["long"], 129, 3, 3),
    "widest-head": (in_passes.CASES["widest-head"], 126, 2, 4),
    "qwen2": (in_passes.CASES["qwen2"], 5, 3, 2),
    "qwen3": (in_passes.CASES["qwen3"], 5, 9, 2),
    "one-layer": (in_passes.CASES["one-layer"], 1, 2, 3),
    "async-narrow": (in_passes.CASES["async-narrow"], 5, 9, 2),
    # Each block takes part in every phase, with the same rows of the residual stream: meetings release nothing.
    "even": (EVEN, 5, 3, 3),
    "even-wide": (EVEN, 4, 16, 2),
    # The same rows of the residual stream with other blocks in O and down: all see what was written before a meeting.
    "rotated": (Case("llama", 5, {**TINY, "hidden_size": 96, "intermediate_size": 100}, stages=8), 4, 3, 2),
}
DRAWN = Sampling(seed=11)


@functools.cache
def emulated(name: str) -> tuple[Emulated, str]:
    case = CASES[name][0]
    path = one_by_one.Path(one_by_one.folder().name) / f"samples-{name}"
    checkpoint = rc.make(path, case.family, **case.overrides)
    return Emulated(one_by_one.plan_of(case, checkpoint), checkpoint, samples=True), checkpoint


def samples_of(plan: Plan) -> Samples:
    assert plan.samples
    return plan.samples


def made(model: Emulated, tokens: list[int], n: int, new: int, **options: Any) -> SampledTokens:
    """Samples after a prompt that is taken in passes."""
    if len(tokens) > 1:
        model.prompt(tokens[:-1])
    options = {"sampling": DRAWN, "history": tokens[:-1], **options}
    return model.samples(tokens[-1], n, new, start=len(tokens) - 1, **options)


def same(a: SampledTokens, b: SampledTokens, which: list[int]) -> bool:
    """Whether samples `which` of a are the first ones of b, to the bit."""
    return all(
        a.tokens[i] == b.tokens[k] and np.array_equal(a.logits[i].view("u4"), b.logits[k].view("u4"))
        for k, i in enumerate(which)
    )


def test_the_cases_cover_what_a_plan_can_hold() -> None:
    plans = [emulated(name)[0].plan for name in CASES]
    products = [product for plan in plans for product in samples_of(plan).products]
    assert {product.phase.unit for product in products} == {4, 8}
    assert {product.split for product in products} == {True, False}
    assert any(product.most_tiles > product.sweep_tiles for product in products)
    assert any(product.phase.base == 0 for product in products)
    assert {product.phase.fragments % product.slice == 0 for product in products} == {True, False}
    o_and_down = [(plan.layer_phases[1], plan.layer_phases[3]) for plan in plans]
    assert {o.rotation == down.rotation for o, down in o_and_down} == {True, False}
    assert {n <= 8 for _, _, n, _ in CASES.values()} == {True, False}


@pytest.mark.parametrize("name", CASES)
def test_each_sample_is_as_exact_as_the_weights_and_the_same_alone(name: str) -> None:
    model, checkpoint = emulated(name)
    _, length, n, new = CASES[name]
    tokens = prompt(model.plan.spec.vocab, length)
    together = made(model, tokens, n, new)
    for sample in (0, n - 1):
        whole = tokens + together.tokens[sample][:-1]
        reference = rc.reference_logits(checkpoint, whole)[length - 1 :]
        half = rc.reference_logits(checkpoint, whole, torch.bfloat16)[length - 1 :]
        assert error(together.logits[sample], reference) <= error(half, reference)
    alone = made(model, tokens, 1, new, sampling=replace(DRAWN, seed=11 + n - 1), seed=3)
    assert same(together, alone, [n - 1])


def test_samples_over_an_fp8_cache_are_as_single_streams() -> None:
    """As close as two orders of adding up leave them, since a last bit may move a stored number to its neighbour."""
    case, tokens = replace(CASES["long"][0], kv_dtype="fp8"), prompt(67, 126)
    checkpoint = rc.make(one_by_one.Path(one_by_one.folder().name) / "samples-fp8", case.family, **case.overrides)
    model = Emulated(one_by_one.plan_of(case, checkpoint), checkpoint, samples=True)
    together = made(model, tokens, 3, 5)
    assert same(together, made(model, tokens, 1, 5, sampling=replace(DRAWN, seed=13)), [2])
    whole = tokens + together.tokens[2][:-1]
    model.prompt(tokens[:-1])
    single = model.logits(whole[len(tokens) - 1 :], start=len(tokens) - 1)
    assert error(together.logits[2], single) < 0.02
    assert not np.array_equal(together.logits[2], together.logits[1])


def test_a_sample_does_not_depend_on_how_many_there_are() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 6)
    sixteen = made(model, tokens, 16, 3)
    assert len({tuple(t) for t in sixteen.tokens}) > 8
    for n in (1, 5, 8, 9):
        assert same(sixteen, made(model, tokens, n, 3, seed=n), list(range(n)))


OPTIONS = {
    "greedy": GREEDY,
    "temperature": Sampling(temperature=0.7, seed=5),
    "top-k": Sampling(top_k=5, seed=5),
    "large top-k": Sampling(top_k=90, seed=5),
    "top-p": Sampling(top_p=0.8, seed=5),
    "min-p": Sampling(min_p=0.05, seed=5),
    "all": Sampling(
        temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.4, presence_penalty=0.3,
        frequency_penalty=0.4, logit_bias=((5, 4.0), (9, -2.0)), seed=(1 << 64) - 2, logprobs=3,
    ),
    "greedy with log-probabilities": Sampling(temperature=0.0, logprobs=0, repetition_penalty=1.3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "option"), [*(("llama", option) for option in OPTIONS), ("choosers", "large top-k"), ("choosers", "all")]
)
def test_tokens_are_chosen_as_for_a_single_stream(name: str, option: str) -> None:
    """With a seed more for each sample, over one block or several that choose together."""
    model, _ = emulated("llama") if name == "llama" else many_blocks()
    sampling, tokens = OPTIONS[option], prompt(model.plan.spec.vocab, 5)
    many = made(model, tokens, 4, 5, sampling=sampling)
    for i in range(4):
        seed = None if sampling.seed is None else (sampling.seed + i) % (1 << 64)
        alone = model.generate(tokens, 5, sampling=replace(sampling, seed=seed))
        assert many.tokens[i] == alone
        for ours, theirs in zip(many.logprobs[i], model.logprobs, strict=True):
            assert ours.chosen == pytest.approx(theirs.chosen, abs=0.05)
            assert len(ours.top) == len(theirs.top) == sampling.logprobs
        model.logprobs = []


@functools.cache
def many_blocks() -> tuple[Emulated, str]:
    """So many blocks that two choose each sample's token."""
    case = Case("llama", 35, {**SMALL, "vocab_size": 1103})
    checkpoint = rc.make(one_by_one.Path(one_by_one.folder().name) / "samples-choosers", case.family, **case.overrides)
    model = Emulated(one_by_one.plan_of(case, checkpoint), checkpoint, samples=True)
    assert samples_of(model.plan).choosers == 2
    return model, checkpoint


def test_a_stop_token_ends_its_sample_alone() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 5)
    free = made(model, tokens, 5, 5)
    stop = free.tokens[2][1]
    stopped = made(model, tokens, 5, 5, stop=[stop])
    for ours, whole in zip(stopped.tokens, free.tokens, strict=True):
        assert ours == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert sorted(map(len, stopped.tokens))[0] == 2 < sorted(map(len, stopped.tokens))[-1]


def test_the_host_can_end_one_sample_or_all() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 5)
    free = made(model, tokens, 3, 4)
    halted = made(model, tokens, 3, 4, halt=[1])
    assert halted.tokens == [free.tokens[0], free.tokens[1][:1], free.tokens[2]]
    assert made(model, tokens, 3, 4, halt=[0, 1, 2]).tokens == [row[:1] for row in free.tokens]


# What samples rely on, left out: the case that notices, where it stands, and what stands there then.
BUGS = {
    "blocks do not wait for one another": (
        "even",
        "cuda/pass_layout.cuh",
        "((RELEASED ? load_acquired(count) : load_word(count)) - needed) >= 0",
        "needed > 0",
    ),
    "activations are taken that have not come": (
        "even",
        "cuda/sample_product.cuh",
        "return ((w.x | w.z) & asked_[0]) | ((w.y | w.w) & asked_[1]);",
        "return 0;",
    ),
    "what is multiplied again is added twice": ("even", "cuda/sample_product.cuh", "clear<TILES>(d);", ""),
    "the next layer's results have the parity of this one's": (
        "even",
        "cuda/samples.cuh",
        "if (phase_ == QKV) of_layer_ ^= 1;",
        "",
    ),
    "attention begins where sums still lie": (
        "qwen2",
        "cuda/samples.cuh",
        "if (phase_ == QKV) sync();",
        "if (phase_ == QKV) {}",
    ),
    "padding is not put": ("even", "cuda/sample_residual.cuh", "if (block() != 0) return;", "return;"),
    "activations are copied before they are made": (
        "even",
        "cuda/sample_stream.cuh",
        "if (!all_lanes((i32)(published(&sample_words<P>().passed) - needed) >= 0)) return false;",
        "",
    ),
    "a stage is overwritten while it is read": (
        "even",
        "cuda/sample_stream.cuh",
        "return all_lanes(barrier_test(Ring::empty(at.slot), at.parity ^ 1));",
        "return true;",
    ),
    "weights are read before they have landed": (
        "even",
        "cuda/sample_product.cuh",
        " || !barrier_passed(Ring::landed(at.slot), at.parity)",
        "",
    ),
    "samples share their pages": (
        "even",
        "cuda/sample_attention.cuh",
        "args_.n_samples + sample_) *",
        "args_.n_samples) *",
    ),
    "a sample sees what the prompt's page holds beyond the prompt": (
        "even",
        "cuda/sample_attention.cuh",
        "own ? position_ : args_.start - 1",
        "own ? position_ : position_",
    ),
    "a column has another's scale": ("even", "cuda/samples.cuh", ": words().scales[column],", ": words().scales[0],"),
    "all samples draw with one seed": (
        "even",
        "cuda/sample_choice.cuh",
        "own.seed = args.seed + sample;",
        "own.seed = args.seed;",
    ),
    "a sample that has ended goes on": ("even", "cuda/samples.cuh", "(live_ & ~ended)", "live_"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str) -> None:
    name, file, old, new = BUGS[bug]
    good, checkpoint = emulated(name)
    bad = Emulated(good.plan, checkpoint, planted(file, old, new), samples=True)
    tokens = prompt(good.plan.spec.vocab, 7)
    stop = [made(good, tokens, 9, 3).tokens[4][0]]
    for model in (good, bad):  # what an earlier, longer prompt has left
        model.buffers["kv"].bytes[:] = 0
        good.prompt(prompt(good.plan.spec.vocab, 16))
        model.buffers["kv"].bytes[:] = good.buffers["kv"].bytes
    good.prompt(tokens[:-1])
    bad.buffers["kv"].bytes[:] = good.buffers["kv"].bytes
    right = good.samples(tokens[-1], 9, 3, start=6, sampling=DRAWN, stop=stop)
    for seed in range(1, 5):
        try:
            wrong = bad.samples(tokens[-1], 9, 3, start=6, sampling=DRAWN, stop=stop, seed=seed)
        except EmulatorError:
            return
        if wrong.tokens != right.tokens or not same(right, wrong, list(range(9))):
            return
    pytest.fail("four orders of threads did not show it")


@pytest.mark.parametrize("gpu", in_passes.GPUS)
@pytest.mark.parametrize("spec", in_passes.SPECS)
def test_every_model_is_cut_completely(spec: str, gpu: str) -> None:
    plan = make_plan(load_spec(spec), load_profile(gpu), Options(max_context=2048))
    check(plan)
    cut = samples_of(plan)
    assert cut.memory_bytes <= plan.profile.smem_per_block
    for product in cut.products:
        slices = -(-product.phase.fragments // product.slice)
        assert product.slice_bytes <= cut.stage_bytes
        assert (slices - 1) * product.slice < product.phase.fragments <= slices * product.slice
    for regions in (cut.memory, cut.scratch):
        assert all(a.offset + a.bytes <= b.offset for a, b in itertools.pairwise(regions))
    assert cut.choosers == 1 or cut.choosers * COLUMNS <= plan.blocks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cut: {"memory_bytes": 1 << 20}, "samples: 1048576 bytes of shared memory of 232448"),
        (lambda cut: {"stages": 1}, "a ring of 1 stages"),
        (lambda cut: {"stage_bytes": 4096}, "samples: qkv: a slice of .* in stages of 4096"),
        (lambda cut: {"choosers": 9}, "16 groups of 9 blocks need more than 128"),
        (lambda cut: {"scratch": cut.scratch[::-1]}, "overlaps"),
    ],
)
def test_a_cut_that_cannot_work_is_found(change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, same_plan = (
        make_plan(load_spec("llama-3.2-1b"), load_profile("h200-sxm"), Options(max_context=2048)) for _ in range(2)
    )
    cut = samples_of(same_plan)
    monkeypatch.setattr(Plan, "samples", replace(cut, **change(cut)))
    with pytest.raises(KogcError, match=words):
        check(plan)


def test_what_cannot_make_samples_together_has_none() -> None:
    fp16 = replace(load_spec("llama-3.2-1b"), dtype="fp16")
    assert make_plan(fp16, load_profile("h200-sxm"), Options(max_context=2048)).samples is None
    for profile, blocks in (("cpu-avx2", 2), ("mi300x", 64)):
        assert make_plan(load_spec("llama-3.2-1b"), load_profile(profile), Options(2048, blocks)).samples is None


@pytest.mark.parametrize(
    ("start", "new", "pages"), [(0, 1, 1), (0, 128, 1), (0, 129, 2), (127, 1, 1), (127, 2, 2), (300, 300, 3)]
)
def test_pages_hold_a_sample_and_no_more(start: int, new: int, pages: int) -> None:
    assert own_pages(start, new) == pages
