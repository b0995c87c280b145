"""Small checkpoints, plans for them, and their CUDA kernels on the emulated machine, each compiled once."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import random_checkpoint as rc
from emulator import Emulated, planted

from kogc.importer import spec_from_dir
from kogc.plan.plan import Knobs, Options, Plan, make_plan
from kogc.profile import GpuProfile, load_profile

STAGE = 8192


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
    arch: str = "sm_90a"
    kv_dtype: str = "bf16"


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
    "narrow-ring": Case(
        "llama",
        5,
        stages=2,
        knobs={"in_flight": 1, "in_flight_head": 1, "in_flight_exchange": 1, "stage_bytes": 8192},
    ),
    "more-blocks-than-units": Case(
        "llama",
        12,
        {**TINY, "num_key_value_heads": 6, "intermediate_size": 40},
        stages=3,
        knobs={"stage_bytes": 8192},
    ),
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
    "two-tiles": Case("llama", 5, {**TINY, "hidden_size": 288, "num_attention_heads": 12, "num_key_value_heads": 1}),
    "mistral-window": Case("mistral", 4, {**TINY, "sliding_window": 7}, tokens=20),
    "planted": Case("llama", 5, TINY, stages=3, tokens=4, knobs={"stage_bytes": 8192}),
    # So many rows in a block that several threads meet each, and bins of a search hold several.
    "sampled": Case("llama", 3, {**TINY, "num_hidden_layers": 1, "vocab_size": 1103}, tokens=4),
    # Lists shorter than a top-k, of blocks that have more rows; all of them are more than a block has threads.
    "listed": Case("llama", 18, {**TINY, "num_hidden_layers": 1, "vocab_size": 1103}, tokens=4),
    # Splits that combine while gathering, then in a step of its own; a later chunk while an earlier one is used.
    "combine": Case("llama", 8, SMALL, tokens=262, knobs={"gather_splits": 1}),
    "gather-two": Case("qwen3", 4, SMALL, tokens=270, knobs={"gather_splits": 2}),
    # More query rows than threads take at a time while they gather.
    "gather-wide": Case(
        "qwen3",
        4,
        {**SMALL, "head_dim": 128, "num_attention_heads": 10},
        tokens=140,
        knobs={"gather_splits": 2, "stage_bytes": 16384},
        seeds=(1,),
    ),
    # Two chunks a turn, so that a split meets both sides of a turn's end.
    "turns": Case("llama", 4, {**SMALL, "max_position_embeddings": 1024}, tokens=660, knobs={"turn": 2}, seeds=(1,)),
    "widest-head": Case(
        "qwen3",
        2,
        {**SMALL, "head_dim": 128, "num_hidden_layers": 2},
        tokens=140,
        knobs={"stage_bytes": 16384},
        seeds=(1,),
    ),
    # A ring that holds more than a step, so that the cache of the next one is copied while this one writes it.
    "step-in-ring": Case(
        "llama", 4, SMALL, stages=24, knobs={"in_flight": 8, "in_flight_head": 8, "in_flight_exchange": 8}
    ),
    "one-split": Case("llama", 2, SMALL, tokens=270),
    # A window that leaves chunks behind, so that the first split is any of the three.
    "long-window": Case(
        "mistral", 6, {**SMALL, "sliding_window": 140}, tokens=400, knobs={"gather_splits": 1}, seeds=(1,)
    ),
    # A chunk of keys and values that the ring does not hold.
    "chunk-over-ring": Case("llama", 4, {**SMALL, "head_dim": 64}, stages=3, tokens=150),
    # Copies of 16 bytes a lane, as on GPUs before Hopper, through the same rings.
    "async": Case("llama", 4, arch="sm_80"),
    "async-narrow": Case(
        "llama",
        5,
        TINY,
        stages=2,
        knobs={"in_flight": 1, "in_flight_head": 1, "in_flight_exchange": 1},
        tokens=4,
        arch="sm_89",
    ),
    "async-chunk-over-ring": Case(
        "qwen3", 2, {**SMALL, "head_dim": 128, "num_hidden_layers": 2}, stages=4, tokens=140, seeds=(1,), arch="sm_86"
    ),
    "async-step-in-ring": Case(
        "llama",
        4,
        SMALL,
        stages=24,
        knobs={"in_flight": 8, "in_flight_head": 8, "in_flight_exchange": 8},
        arch="sm_90",
    ),
    "async-planted": Case("llama", 5, TINY, stages=3, tokens=4, arch="sm_80"),
    "qwen2": Case("qwen2", 6, {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 128}),
    "qwen3": Case(
        "qwen3",
        5,
        {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
        knobs={"in_flight": 3, "in_flight_head": 4, "stage_bytes": 16384},
    ),
    # An FP8 cache: chunks one by one and in pairs, each head size, a window, tiles that come stage by stage.
    "fp8": Case("llama", 4, kv_dtype="fp8"),
    "fp8-pairs": Case("llama", 2, {**SMALL, "head_dim": 64}, tokens=150, kv_dtype="fp8"),
    "fp8-splits": Case("qwen3", 6, SMALL, tokens=270, knobs={"gather_splits": 1}, seeds=(1,), kv_dtype="fp8"),
    "fp8-window": Case("mistral", 2, {**SMALL, "sliding_window": 140}, tokens=400, seeds=(1,), kv_dtype="fp8"),
    "fp8-hd96": Case("qwen3", 5, {"head_dim": 96}, tokens=20, knobs={"stage_bytes": 16384}, kv_dtype="fp8"),
    "fp8-hd128": Case(
        "qwen3", 2, {**SMALL, "head_dim": 128}, tokens=140, knobs={"stage_bytes": 16384}, seeds=(1,), kv_dtype="fp8"
    ),
    "fp8-over-ring": Case("llama", 2, {**SMALL, "head_dim": 128}, stages=3, tokens=140, seeds=(1,), kv_dtype="fp8"),
    "fp8-weights-fp16": Case("llama", 4, {"dtype": "float16"}, kv_dtype="fp8"),
    "fp8-async": Case("llama", 4, {**SMALL, "head_dim": 64}, tokens=140, arch="sm_80", kv_dtype="fp8"),
    "fp8-step-in-ring": Case(
        "llama",
        4,
        SMALL,
        stages=24,
        knobs={"in_flight": 8, "in_flight_head": 8, "in_flight_exchange": 8},
        kv_dtype="fp8",
    ),
}


def profile_with(stages: int, spec: Any, options: Options, arch: str) -> GpuProfile:
    """A GPU with just the shared memory that this many stages need."""
    roomy = dataclasses.replace(load_profile("h200-sxm"), arch=arch)
    plan = make_plan(spec, roomy, options)
    fixed = plan.memory.bytes - plan.memory.stages * (plan.slot_bytes + 16)
    return dataclasses.replace(roomy, smem_per_block=fixed + stages * (plan.slot_bytes + 16))


def plan_of(case: Case, checkpoint: Path) -> Plan:
    spec, _ = spec_from_dir(checkpoint)
    knobs = Knobs(**{"stage_bytes": STAGE, "in_flight": 2, "in_flight_head": 2, **case.knobs})
    options = Options(blocks=case.blocks, knobs=knobs, kv_dtype=case.kv_dtype)
    plan = make_plan(spec, profile_with(case.stages, spec, options, case.arch), options)
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


def patched(case: str, file: str, old: str, new: str) -> Emulated:
    """A case's kernel with one text in one of its headers replaced."""
    return Emulated(*planned(case), planted(file, old, new))


def prompt(vocab: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(n).integers(3, vocab, n)]


def error(got: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))
