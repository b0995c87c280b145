"""The kernel for AMD GPUs, run without one: right numbers on waves of 64 and 32 lanes, and bugs are noticed."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint as rc
import torch
from emulated_cases import SMALL, TINY, error, prompt
from emulator import Emulated, EmulatorError, planted
from fp8_cache import over_cache
from test_emulated_sampling import SAMPLED, sampled_as_the_reference

from kogc.importer import spec_from_dir
from kogc.plan.check import check
from kogc.plan.plan import Knobs, Options, Plan, make_plan
from kogc.plan.shared_memory import PARTIAL_UNITS
from kogc.profile import load_profile

CDNA3, CDNA4, RDNA4 = "mi300x", "mi355x", "rx-9070-xt"
WAIT_HIDDEN = 6  # site of a stall report


@dataclass(frozen=True)
class Case:
    """A small checkpoint and a plan for it. `tokens`: length of the sequence; `loads`: of a lane, under way."""

    gpu: str
    family: str
    blocks: int
    overrides: dict[str, Any] = field(default_factory=dict)
    tokens: int = 10
    seeds: tuple[int, ...] = (1, 2)
    loads: int = 4
    gather_splits: int = 2
    turn: int = 1
    kv_dtype: str = "bf16"


CASES = {
    "cdna-llama": Case(CDNA3, "llama", 4, seeds=(1, 2, 3)),
    "rdna-llama": Case(RDNA4, "llama", 4, seeds=(1, 2, 3)),
    # A queue deeper than any part of the slab, and one that no number of pieces fills evenly.
    "cdna-deep": Case(CDNA4, "llama", 5, TINY, loads=16),
    "rdna-odd": Case(RDNA4, "llama", 5, TINY, loads=3),
    "cdna-more-blocks-than-units": Case(
        CDNA3, "llama", 12, {**TINY, "num_key_value_heads": 6, "intermediate_size": 40}
    ),
    # Several attention units in a block, which therefore does not load keys ahead; many units of rows.
    "cdna-one-block": Case(CDNA3, "llama", 1, {**TINY, "vocab_size": 301}),
    "rdna-one-block": Case(RDNA4, "qwen3", 1, SMALL, tokens=140, seeds=(1,)),
    # Units with a fragment less than a wave of 64 lanes loads at once: they are padded.
    "cdna-padded": Case(CDNA3, "llama", 3, {**SMALL, "hidden_size": 544, "intermediate_size": 36}, tokens=3),
    "cdna-wide": Case(
        CDNA4, "llama", 7,
        {"num_hidden_layers": 1, "hidden_size": 768, "intermediate_size": 1152, "head_dim": 64, "vocab_size": 131},
        tokens=3,
    ),
    "cdna-fp16": Case(CDNA3, "llama", 4, {"dtype": "float16"}),
    "rdna-fp16": Case(RDNA4, "llama", 4, {"dtype": "float16"}),
    # Twelve query heads of one KV head: two tiles of attention.
    "cdna-two-tiles": Case(
        CDNA3, "llama", 5, {**TINY, "hidden_size": 288, "num_attention_heads": 12, "num_key_value_heads": 1}
    ),
    "cdna-window": Case(CDNA3, "mistral", 4, {**TINY, "sliding_window": 7}, tokens=20),
    "rdna-window": Case(RDNA4, "mistral", 6, {**SMALL, "sliding_window": 140}, tokens=300, gather_splits=1, seeds=(1,)),
    "cdna-planted": Case(CDNA3, "llama", 5, TINY, tokens=4),
    "rdna-planted": Case(RDNA4, "llama", 5, TINY, tokens=4),
    "cdna-sampled": Case(CDNA3, "llama", 3, {**TINY, "num_hidden_layers": 1, "vocab_size": 1103}, tokens=4),
    "rdna-sampled": Case(RDNA4, "llama", 18, {**TINY, "num_hidden_layers": 1, "vocab_size": 1103}, tokens=4),
    "cdna-combine": Case(CDNA3, "llama", 8, SMALL, tokens=262, gather_splits=1, seeds=(1,)),
    "rdna-gather-two": Case(RDNA4, "qwen3", 4, SMALL, tokens=270, seeds=(1,)),
    "cdna-turns": Case(
        CDNA4, "llama", 4, {**SMALL, "max_position_embeddings": 1024}, tokens=660, turn=2, seeds=(1,)
    ),
    "cdna-widest-head": Case(CDNA3, "qwen3", 2, {**SMALL, "head_dim": 128}, tokens=140, seeds=(1,)),
    "rdna-widest-head": Case(RDNA4, "qwen3", 2, {**SMALL, "head_dim": 128}, tokens=140, seeds=(1,)),
    "cdna-qwen2": Case(CDNA3, "qwen2", 6, {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 128}),
    "cdna-qwen3": Case(CDNA3, "qwen3", 5, {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "cdna-fp8": Case(CDNA3, "llama", 4, kv_dtype="fp8"),
    "rdna-fp8": Case(RDNA4, "llama", 4, kv_dtype="fp8"),
    "cdna-fp8-chunks": Case(CDNA4, "qwen3", 2, {**SMALL, "head_dim": 128}, tokens=150, seeds=(1,), kv_dtype="fp8"),
    "rdna-fp8-chunks": Case(
        RDNA4, "mistral", 2, {**SMALL, "head_dim": 64, "sliding_window": 140}, tokens=290, seeds=(1,), kv_dtype="fp8"
    ),
    "cdna-fp8-one-block": Case(CDNA3, "qwen3", 1, {**SMALL, "head_dim": 96}, tokens=20, kv_dtype="fp8"),
    "rdna-qwen3": Case(RDNA4, "qwen3", 5, {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2}),
}  # fmt: skip


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kogc-emulated-hip-")


@functools.cache
def planned(name: str) -> tuple[Plan, Path]:
    case = CASES[name]
    checkpoint = rc.make(Path(folder().name) / name, case.family, **case.overrides)
    profile = load_profile(case.gpu)
    knobs = Knobs(
        stage_bytes=16 * profile.threads, in_flight=case.loads, gather_splits=case.gather_splits, turn=case.turn
    )
    options = Options(blocks=case.blocks, knobs=knobs, kv_dtype=case.kv_dtype)
    plan = make_plan(spec_from_dir(checkpoint)[0], profile, options)
    return plan, checkpoint


@functools.cache
def emulated(name: str) -> Emulated:
    return Emulated(*planned(name))


def patched(case: str, file: str, old: str, new: str) -> Emulated:
    """A case's kernel with one text in one of its headers replaced."""
    return Emulated(*planned(case), planted(file, old, new))


def test_the_cases_cover_what_a_plan_can_hold() -> None:
    plans = [planned(name)[0] for name in CASES]
    phases = [phase for plan in plans for phase in plan.phases]
    assert {phase.unit for phase in phases} == {4, 8}
    assert {phase.base == 0 for phase in phases} == {True, False}
    assert any(phase.max_units > PARTIAL_UNITS for phase in phases)
    assert any(phase.fragments // phase.together < 8 for phase in phases)
    assert any(phase.columns_padded - phase.columns >= 32 and phase.columns > 512 for phase in phases)
    assert {plan.profile.lanes for plan in plans} == {32, 64}
    for plan in plans:
        if plan.blocks < 12:  # so many have work in every phase: the plan is one that a build would take
            check(plan)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_as_exact_as_the_weights_and_the_same_in_every_order(name: str) -> None:
    model, case = emulated(name), CASES[name]
    tokens = prompt(model.plan.spec.vocab, case.tokens)
    runs = [model.logits(tokens, seed) for seed in case.seeds]
    reference = rc.reference_logits(planned(name)[1], tokens)
    half = rc.reference_logits(planned(name)[1], tokens, torch.bfloat16)
    if case.kv_dtype == "fp8":
        reference_over = over_cache(model.plan, planned(name)[1], tokens, model.buffers["kv"].bytes)
    else:
        reference_over = reference
    assert error(runs[0], reference_over) <= error(half, reference)
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


@pytest.mark.parametrize("name", ["cdna-llama", "rdna-llama", "cdna-qwen2", "cdna-deep"])
def test_generation_follows_the_evaluated_logits(name: str) -> None:
    model = emulated(name)
    tokens = prompt(model.plan.spec.vocab, 5)
    made = model.generate(tokens, 6)
    logits = model.logits(tokens + made)
    assert made == logits[len(tokens) - 1 : -1].argmax(axis=1).tolist()
    assert model.generate(tokens, 6, stop=[made[2]]) == made[: made.index(made[2]) + 1]
    assert model.generate(tokens, 6, halt=True) == made[:1]


def test_a_step_at_a_time_gives_what_one_launch_gives() -> None:
    model = emulated("cdna-llama")
    tokens = prompt(model.plan.spec.vocab, 8)
    parts = [model.logits(tokens[:5]), model.logits(tokens[5:7], start=5), model.logits(tokens[7:], start=7)]
    np.testing.assert_array_equal(np.concatenate(parts), model.logits(tokens))


@pytest.mark.parametrize("sampling", SAMPLED)
@pytest.mark.parametrize("case", ["cdna-sampled", "rdna-sampled"])
def test_sampled_tokens_are_those_of_the_reference(case: str, sampling: str) -> None:
    sampled_as_the_reference(emulated(case), SAMPLED[sampling], 1)


@pytest.mark.parametrize("name", ["cdna-llama", "rdna-llama"])
def test_dummy_weights_are_those_of_every_target(name: str) -> None:
    filled = emulated(name).fill(1000, 3, 0.5)
    np.testing.assert_array_equal(filled, emulated("cdna-fp16").fill(1000, 3, 0.5))
    assert np.abs(filled).max() <= 0.5
    assert filled.std() == pytest.approx(0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("name", ["cdna-llama", "rdna-odd"])
def test_the_read_ceiling_reads_no_more_than_it_is_given(name: str) -> None:
    emulated(name).read_ceiling(3 * emulated(name).plan.knobs.in_flight)


# What would go wrong on a GPU now and then, or always. The compiler waits for loads; what the kernel itself waits for:
BUGS = {
    "a slot loaded again before it is multiplied": (
        "cdna-planted",
        "hip/stream.h",
        "if (slot >= skipped) use(queue_[slot]);",
        "Words early = queue_[slot]; queue_[slot] = load(from, left > 1 ? piece + slot : part_.index(slot), own); "
        "if (slot >= skipped) use(slot % 2 ? early : queue_[slot]);",
    ),
    "a piece in another's place": ("rdna-planted", "hip/stream.h", "slot > skipped ?", "slot > skipped + 1 ?"),
    "sums rewritten while they are read": ("cdna-sampled", "hip/matvec.h", "if (first) sync();", ""),
    "sums read before all waves have put them": (
        "cdna-planted",
        "hip/matvec.h",
        "multiply(stream);\n      sync();",
        "multiply(stream);",
    ),
    "a new key that only its cache sees": ("cdna-planted", "hip/attention.h", "insert_key(position - base);", ""),
    "a new value that only its cache sees": ("cdna-planted", "hip/attention.h", "insert_value(position - base);", ""),
    "a new exponent that only its cache sees": ("cdna-fp8", "hip/attention.h", "insert_scales(r);", ""),
    "a key with another's scale": ("rdna-fp8", "hip/attention.h", "scales_[which][i / 4]", "scales_[which][0]"),
    "a new value in its neighbour's byte": ("cdna-fp8", "hip/attention.h", "fp8_byte(r % 4) * 8", "r % 4 * 8"),
    "a value taken before it is ready": (
        "cdna-planted",
        "common/exchange.h",
        "(u32)ready<BIT>(v[i], parity) << i",
        "1u << i",
    ),
    "an exchange rewritten with the parity of its last use": (
        "rdna-planted",
        "common/exchange.h",
        "(as_word(v[0]) & ~1u) | parity",
        "(as_word(v[0]) & ~1u) | (parity ^ 1)",
    ),
    "a slot used again while another block still reads it": (
        "cdna-planted",
        "common/decoder.h",
        "P::X_DOWN",
        "P::X_O",
    ),
    "a gathered vector used before the barrier": (
        "cdna-planted",
        "common/residual.h",
        "sync();\n}\n\n}  // namespace",
        "}\n\n}  // namespace",
    ),
    "a block that puts before all its waves have read": (
        "cdna-combine",
        "common/splits.h",
        "parts[item] = p;\n    }\n    sync();",
        "parts[item] = p;\n    }",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str) -> None:
    case, file, old, new = BUGS[bug]
    sound, broken = emulated(case), patched(case, file, old, new)
    tokens = prompt(sound.plan.spec.vocab, max(6, CASES[case].tokens))
    assert broken.differs(tokens, sound.logits(tokens), orders=8)


@pytest.mark.parametrize("name", ["cdna-planted", "rdna-planted"])
def test_a_stall_is_reported_with_its_place(name: str) -> None:
    silent = "if (phase_ == GATE_UP && where_.layer == 1) return;\n"
    row = "if (phase_ == GATE_UP) {  // rows alternate"
    broken = patched(name, "common/decoder.h", row, silent + row)
    with pytest.raises(EmulatorError, match="stalled"):
        broken.logits(prompt(broken.plan.spec.vocab, 2))
    stalled, _block, _thread, site, layer, step, *_ = broken.report
    assert (stalled, site, layer, step) == (1, WAIT_HIDDEN, 1, 0)
