"""The CUDA kernel that ships, run without a GPU: right numbers in every order of its threads, and bugs are noticed."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint as rc
import torch
from emulator import FLAGS, Emulated, EmulatorError, compile_cpp

from kogc.importer import spec_from_dir
from kogc.plan.plan import Knobs, Options, Plan, make_plan
from kogc.profile import GpuProfile, load_profile
from kogc.resources import data_dir

STAGE = 4096
STAGE_EMPTY, WAIT_HIDDEN = 1, 6  # sites of a stall report


@dataclass(frozen=True)
class Case:
    """A small checkpoint and a plan for it. `stages`: how many ring stages fit; `tokens`: length of the sequence."""

    family: str
    blocks: int
    overrides: dict[str, Any] = field(default_factory=dict)
    stages: int = 6
    knobs: dict[str, int] = field(default_factory=dict)
    tokens: int = 10
    seeds: tuple[int, ...] = (1, 2)


TINY = {"num_hidden_layers": 2, "vocab_size": 131}
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 67,
}
CASES = {
    "llama": Case("llama", 4, seeds=(1, 2, 3, 4)),
    # Two stages, one in flight: the ring turns over all the time.
    "narrow-ring": Case("llama", 5, stages=2, knobs={"in_flight": 1, "in_flight_head": 1, "in_flight_exchange": 1, "stage_bytes": 8192}),
    "more-blocks-than-units": Case("llama", 12, {**TINY, "num_key_value_heads": 6, "intermediate_size": 40}, stages=3, knobs={"stage_bytes": 8192}),
    "one-block": Case("llama", 1, TINY),
    # Groups of 4 and 2 fragments, units of 4 rows.
    "wide": Case(
        "llama",
        7,
        {"num_hidden_layers": 1, "hidden_size": 768, "intermediate_size": 1152, "head_dim": 64, "vocab_size": 131},
        stages=4,
        knobs={"stage_bytes": 16384},
        tokens=3,
    ),
    "llama3-rope": Case(
        "llama",
        6,
        {
            **TINY,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        knobs={"stage_bytes": 16384},
    ),
    "fp16": Case("llama", 4, {"dtype": "float16"}),
    # Twelve query heads of one KV head: two tiles of attention.
    "two-tiles": Case("llama", 5, {**TINY, "num_attention_heads": 12, "num_key_value_heads": 1}),
    "mistral-window": Case("mistral", 4, {**TINY, "sliding_window": 7}, tokens=20),
    "planted": Case("llama", 5, TINY, stages=3, tokens=4, knobs={"stage_bytes": 8192}),
    # Splits that combine while gathering, then in a step of its own; a later chunk while an earlier one is used.
    "combine": Case("llama", 8, SMALL, tokens=262, knobs={"gather_splits": 1}),
    "gather-two": Case("qwen3", 4, SMALL, tokens=270, knobs={"gather_splits": 2}),
    # Two chunks a turn, so that a split meets both sides of a turn's end.
    "turns": Case(
        "llama", 4, {**SMALL, "max_position_embeddings": 1024}, tokens=660, knobs={"turn": 2}, seeds=(1,)
    ),
    "widest-head": Case(
        "qwen3", 2, {**SMALL, "head_dim": 128, "num_hidden_layers": 2}, tokens=140, knobs={"stage_bytes": 16384}, seeds=(1,)
    ),
    "one-split": Case("llama", 2, SMALL, tokens=270),
    # A window that leaves chunks behind, so that the first split is any of the three.
    "long-window": Case(
        "mistral", 6, {**SMALL, "sliding_window": 140}, tokens=400, knobs={"gather_splits": 1}, seeds=(1,)
    ),
    "qwen2": Case("qwen2", 6, {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 128}),
    "qwen3": Case(
        "qwen3",
        5,
        {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
        knobs={"in_flight": 3, "in_flight_head": 4, "stage_bytes": 16384},
    ),
}


def profile_with(stages: int, spec: Any, knobs: Knobs, blocks: int) -> GpuProfile:
    """A GPU with just the shared memory that this many stages need."""
    roomy = load_profile("h200-sxm")
    plan = make_plan(spec, roomy, Options(blocks=blocks, knobs=knobs))
    fixed = plan.memory.bytes - plan.memory.stages * (knobs.stage_bytes + 16)
    return dataclasses.replace(roomy, smem_per_block=fixed + stages * (knobs.stage_bytes + 16))


def plan_of(case: Case, checkpoint: Path) -> Plan:
    spec, _ = spec_from_dir(checkpoint)
    knobs = Knobs(**{"stage_bytes": STAGE, "in_flight": 2, "in_flight_head": 2, **case.knobs})
    plan = make_plan(
        spec, profile_with(case.stages, spec, knobs, case.blocks), Options(blocks=case.blocks, knobs=knobs)
    )
    assert plan.memory.stages == case.stages
    return plan


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kogc-emulated-checkpoints-")


@functools.cache
def planned(name: str) -> tuple[Plan, Path]:
    case = CASES[name]
    checkpoint = rc.make(Path(folder().name) / name, case.family, **case.overrides)
    return plan_of(case, checkpoint), checkpoint


@functools.cache
def emulated(name: str) -> tuple[Emulated, Path]:
    plan, checkpoint = planned(name)
    return Emulated(plan, checkpoint), checkpoint


def prompt(vocab: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(n).integers(3, vocab, n)]


def error(got: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def test_the_cases_cover_what_a_plan_can_hold() -> None:
    phases = [phase for name in CASES for phase in planned(name)[0].phases]
    assert {phase.unit for phase in phases} == {4, 8}
    assert {phase.group for phase in phases} == {1, 2, 4}
    assert {phase.fragments % 8 == 0 for phase in phases} == {True, False}
    assert {phase.base == 0 for phase in phases} == {True, False}
    assert any(phase.rotation and phase.remainder for phase in phases)
    assert any(phase.rows % phase.unit for phase in phases)
    assert any(phase.max_units > 32 for phase in phases)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_as_exact_as_the_weights_and_the_same_in_every_order(name: str) -> None:
    model, checkpoint = emulated(name)
    case, spec = CASES[name], model.plan.spec
    tokens = prompt(spec.vocab, case.tokens)
    runs = [model.logits(tokens, seed) for seed in case.seeds]
    reference = rc.reference_logits(checkpoint, tokens)
    half = rc.reference_logits(checkpoint, tokens, torch.bfloat16)
    assert error(runs[0], reference) <= error(half, reference)
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window"])
def test_greedy_tokens_are_those_of_the_reference(name: str) -> None:
    model, checkpoint = emulated(name)
    tokens = prompt(model.plan.spec.vocab, 6)
    got = model.generate(tokens, 8, seed=3)
    assert len(got) == 8
    reference = rc.reference_logits(checkpoint, tokens + got)
    half = rc.reference_logits(checkpoint, tokens + got, torch.bfloat16)
    for i, token in enumerate(got):
        row = reference[len(tokens) - 1 + i]
        assert row.max() - row[token] <= 2 * np.abs(half - reference).max()
    np.testing.assert_array_equal(model.generate(tokens, 8, seed=4), got)


def test_a_step_at_a_time_gives_what_one_launch_gives() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 8)
    whole = model.logits(tokens)
    parts = [model.logits(tokens[:5]), model.logits(tokens[5:7], start=5), model.logits(tokens[7:], start=7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_generation_follows_the_evaluated_logits() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 5)
    got = model.generate(tokens, 6)
    logits = model.logits(tokens + got)
    assert got == logits[len(tokens) - 1 : -1].argmax(axis=1).tolist()


def test_a_stop_token_is_written_and_ends_the_generation() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 5)
    free = model.generate(tokens, 6)
    stop = free[3]
    assert model.generate(tokens, 6, stop=[stop, 130]) == free[: free.index(stop) + 1]


def test_the_host_can_end_the_generation() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 5)
    assert model.generate(tokens, 6, halt=True) == model.generate(tokens, 6)[:1]


def test_fill_and_read_ceiling_run() -> None:
    model, _ = emulated("llama")
    filled = model.fill(10_001, seed=5, amplitude=0.25)
    assert 0.24 < np.abs(filled).max() <= 0.25
    assert abs(filled.mean()) < 0.01
    np.testing.assert_array_equal(filled, model.fill(10_001, seed=5, amplitude=0.25))
    assert (filled != model.fill(10_001, seed=6, amplitude=0.25)).any()
    model.read_ceiling(17)


def test_emulated_16_bit_numbers_round_as_numpy_does(tmp_path: Path) -> None:
    for name in ("common/args.h", "emulate/numbers.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((data_dir("templates") / name).read_text())
    source = tmp_path / "numbers.cpp"
    source.write_text(
        '#include "common/args.h"\n#define KOGC_DEVICE inline\n#include "emulate/numbers.h"\n'
        'extern "C" void convert(const float* from, unsigned short* half, unsigned short* bf16, float* back, int n) {\n'
        "  for (int i = 0; i < n; i++) {\n    half[i] = kogc::float_to_half(from[i]);\n"
        "    bf16[i] = kogc::float_to_bf16(from[i]);\n    back[i] = kogc::half_to_float(half[i]);\n  }\n}\n"
    )
    compile_cpp(source, FLAGS, tmp_path / "numbers.so")
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[~np.isnan(halves)]
    between = (halves.astype(np.float64) + np.append(halves[1:], 0)) / 2  # every tie, and numbers beside it
    odd = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.concatenate([halves, between, np.nextafter(between.astype(np.float32), 0), odd]).astype(np.float32)
        values = values[~np.isnan(values)]
        expected = values.astype(np.float16)
    half, bf16, back = np.empty(len(values), np.uint16), np.empty(len(values), np.uint16), np.empty_like(values)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (values, half, bf16, back)]
    ctypes.CDLL(str(tmp_path / "numbers.so")).convert(*pointers, len(values))
    np.testing.assert_array_equal(half, expected.view(np.uint16))
    np.testing.assert_array_equal(back, expected.astype(np.float32))
    np.testing.assert_array_equal(bf16, torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy())


# Each is one small change of the kernel that its tests must notice.
BUGS = {
    "a stage used before it has arrived": ("cuda/matvec.cuh", "if (taken_ == 0) wait_full<P>(stream, where);", ""),
    "a stage overwritten while it is read": ("cuda/stream.cuh", "if (!wait_empty(next)) return false;", ""),
    "a stage released before it is read": ("cuda/stream.cuh", "if (lane() == 0) barrier_arrive", "barrier_arrive"),
    "a tile used before it has arrived": ("cuda/attention.cuh", "wait_full<P, Tiles<P>::MOST_STAGES>(stream, stages, where);", ""),
    "a key copied before it is written": ("cuda/stream.cuh", "if (where_.layer == 0) wait_written();", ""),
    "a value taken before it is ready": ("common/exchange.h", " && ready<BIT>(v[i], parity)", ""),
    "a value with the parity of its last use": (
        "common/exchange.h",
        "(as_word(v) & ~1u) | parity",
        "(as_word(v) & ~1u) | (parity ^ 1)",
    ),
    "two vectors in one slot": ("common/decoder.h", "P::X_DOWN", "P::X_O"),
    "a gathered vector used before the barrier": (
        "common/residual.h",
        "sync();\n}\n\n}  // namespace",
        "}\n\n}  // namespace",
    ),
    "one byte count for two copies": (
        "cuda/stream.cuh",
        "barrier_expect(Ring<P>::full(head_.slot), bytes)",
        "barrier_expect(Ring<P>::full(head_.slot), 2 * bytes)",
    ),
    "a new key that only its cache sees": ("cuda/attention.cuh", "insert_key(position - base);", ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug: str) -> None:
    file, old, new = BUGS[bug]
    sound, checkpoint = emulated("planted")

    def patch(headers: dict[str, str]) -> dict[str, str]:
        assert old in headers[file], f"{file} has changed: plant the bug anew"
        return {**headers, file: headers[file].replace(old, new)}

    broken = Emulated(sound.plan, checkpoint, patch)
    tokens = prompt(sound.plan.spec.vocab, 6)
    expected = sound.logits(tokens)

    def seen(seed: int) -> bool:
        try:
            return not np.array_equal(broken.logits(tokens, seed), expected)
        except EmulatorError:
            return True

    assert any(seen(seed) for seed in range(1, 9))


def test_a_stall_is_reported_with_its_place() -> None:
    sound, checkpoint = emulated("planted")

    def patch(headers: dict[str, str]) -> dict[str, str]:
        file, old = "common/decoder.h", "if (phase_ == GATE_UP) {  // rows alternate"
        assert old in headers[file]
        silent = "if (phase_ == GATE_UP && where_.layer == 1) return;\n"
        return {**headers, file: headers[file].replace(old, silent + old)}

    broken = Emulated(sound.plan, checkpoint, patch)
    with pytest.raises(EmulatorError, match="stalled"):
        broken.logits(prompt(sound.plan.spec.vocab, 2))
    stalled, _block, _thread, site, layer, step, *_ = broken.report
    assert (stalled, layer, step) == (1, 1, 0)
    assert site in (STAGE_EMPTY, WAIT_HIDDEN)
