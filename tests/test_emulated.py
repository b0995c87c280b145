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
from fp8_cache import over_cache
from sampling_reference import choice, processed

from kogc.importer import spec_from_dir
from kogc.kv_numbers import DECODED, to_e4m3, to_fp8
from kogc.plan.plan import Knobs, Options, Plan, make_plan
from kogc.profile import GpuProfile, load_profile
from kogc.resources import data_dir
from kogc.sampling import Sampling

STAGE = 8192
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
    plan, checkpoint = planned(case)

    def patch(headers: dict[str, str]) -> dict[str, str]:
        assert old in headers[file], f"{file} has changed: plant the bug anew"
        return {**headers, file: headers[file].replace(old, new)}

    return Emulated(plan, checkpoint, patch)


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
    if case.kv_dtype == "fp8":
        over = over_cache(model.plan, checkpoint, tokens, model.buffers["kv"].bytes)
        assert error(runs[0], over) <= error(half, reference)
        reference = rc.reference_logits(checkpoint, tokens, kv_dtype="fp8")
        half = rc.reference_logits(checkpoint, tokens, torch.bfloat16, kv_dtype="fp8")
    assert error(runs[0], reference) <= error(half, reference)
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window", "async"])
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


@pytest.mark.parametrize("name", ["llama", "step-in-ring", "async-step-in-ring"])
def test_a_stop_token_is_written_and_ends_the_generation(name: str) -> None:
    """Also where the ring holds several steps, so that its producer is steps ahead of the end."""
    model, _ = emulated(name)
    tokens = prompt(model.plan.spec.vocab, 5)
    free = model.generate(tokens, 12)
    for stop in free[:4]:
        assert model.generate(tokens, 12, stop=[stop, 130]) == free[: free.index(stop) + 1]


def test_the_host_can_end_the_generation() -> None:
    model, _ = emulated("llama")
    tokens = prompt(model.plan.spec.vocab, 5)
    assert model.generate(tokens, 6, halt=True) == model.generate(tokens, 6)[:1]


# What of sampling takes different ways through the kernel.
SAMPLED = {
    "plain": Sampling(temperature=1.3, seed=5),
    "top-k": Sampling(temperature=9.0, top_k=2, seed=6),
    "all-filters": Sampling(temperature=5.0, top_k=90, top_p=0.7, min_p=0.01, seed=7),
    "everything": Sampling(
        temperature=1.5, top_k=60, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
        logit_bias=((7, 9.0), (30, -2.0)), seed=8, logprobs=4,
    ),
    "wide": Sampling(temperature=40.0, top_k=900, top_p=0.5, seed=9),
    # The best rows lie in one block, more than it lists.
    "crowded": Sampling(temperature=4.0, top_k=50, logit_bias=tuple((t, 30.0) for t in range(4, 58)), seed=10),
    "frozen": Sampling(temperature=0.01, top_k=40, top_p=0.9, seed=11),
    "greedy": Sampling(temperature=0, repetition_penalty=0.2, frequency_penalty=1.0, logprobs=0),
}  # fmt: skip


def sampled_as_the_reference(model: Emulated, sampling: Sampling, order: int) -> None:
    """Six tokens, each what Transformers' processors and the seed's noise choose from the kernel's own logits."""
    tokens = prompt(model.plan.spec.vocab, 5)
    made = model.generate(tokens, 6, seed=order, sampling=sampling)
    logprobs = model.logprobs
    assert len(made) == 6
    logits = model.logits(tokens + made)[len(tokens) - 1 : -1]
    for i, token in enumerate(made):
        scores = processed(logits[i], sampling, tokens, made[:i])
        expected, lead = choice(scores, sampling, len(tokens) - 1 + i)
        assert token == expected or (lead < 1e-3 and np.isfinite(scores[token]))
    if sampling.logprobs is not None:
        expected_logprobs = torch.log_softmax(torch.tensor(logits), dim=-1)
        for row, token, got in zip(expected_logprobs, made, logprobs, strict=True):
            assert got.chosen == pytest.approx(float(row[token]), abs=2e-5)
            assert [t for t, _ in got.top] == row.topk(sampling.logprobs).indices.tolist()


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("case", ["sampled", "listed", "more-blocks-than-units", "one-block"])
def test_sampled_tokens_are_those_of_the_reference(case: str, name: str) -> None:
    for order in (1, 2):
        sampled_as_the_reference(emulated(case)[0], SAMPLED[name], order)


LIST_CASES = ("sampled", "listed", "more-blocks-than-units", "one-block")


@pytest.mark.parametrize("case", LIST_CASES)
def test_short_lists_choose_what_a_search_chooses(case: str) -> None:
    listing = emulated(case)[0]
    searching = patched(case, "common/shortlist.h", "MOST_LISTED = 64;", "MOST_LISTED = 0;")
    tokens = prompt(listing.plan.spec.vocab, 4)
    filters = [(k, p, m) for k in (1, 2, 7, 40, 63, 64) for p, m in ((1.0, 0.0), (0.9, 0.0), (0.6, 0.03), (1.0, 0.1))]
    for i, (top_k, top_p, min_p) in enumerate(filters):
        for temperature in (0.02, 0.8, 6.0):
            sampling = Sampling(temperature, top_k, top_p, min_p, 1.2, logit_bias=((5, 3.0),), seed=i)
            made = [model.generate(tokens, 2, sampling=sampling) for model in (listing, searching)]
            assert made[0] == made[1], sampling


def test_a_search_follows_only_where_a_list_is_too_short() -> None:
    """A search that admits the best row alone changes nothing else."""
    sound = emulated("listed")[0]
    blind = patched("listed", "common/sampling.h", "end = threshold.find((u32)args.top_k, args.top_p);", "end = 1;")
    tokens = prompt(sound.plan.spec.vocab, 4)
    for name in ("top-k", "everything", "frozen"):
        assert blind.generate(tokens, 4, sampling=SAMPLED[name]) == sound.generate(tokens, 4, sampling=SAMPLED[name])
    crowded = SAMPLED["crowded"]
    assert blind.generate(tokens, 4, sampling=crowded) != sound.generate(tokens, 4, sampling=crowded)


def test_the_host_can_end_a_choice_by_short_lists() -> None:
    model = emulated("listed")[0]
    tokens = prompt(model.plan.spec.vocab, 5)
    free = model.generate(tokens, 4, sampling=SAMPLED["top-k"])
    assert model.generate(tokens, 4, sampling=SAMPLED["top-k"], halt=True) == free[:1]


def test_searches_beyond_what_a_tag_can_count() -> None:
    sound = emulated("sampled")[0]
    model = patched("sampled", "common/words.h", "w.level_searches[2] = 0;", "w.level_searches[2] = 2044;")
    tokens = prompt(sound.plan.spec.vocab, 2)
    made = sound.generate(tokens, 12, sampling=SAMPLED["all-filters"])
    assert model.generate(tokens, 12, sampling=SAMPLED["all-filters"]) == made


@pytest.mark.parametrize("name", ["llama", "async"])
def test_fill_and_read_ceiling_run(name: str) -> None:
    model, _ = emulated(name)
    filled = model.fill(10_001, seed=5, amplitude=0.25)
    assert 0.24 < np.abs(filled).max() <= 0.25
    assert abs(filled.mean()) < 0.01
    np.testing.assert_array_equal(filled, model.fill(10_001, seed=5, amplitude=0.25))
    assert (filled != model.fill(10_001, seed=6, amplitude=0.25)).any()
    model.read_ceiling(17)


def test_fp8_numbers_are_those_of_numpy(tmp_path: Path) -> None:
    """templates/common/fp8.h against kogc/kv_numbers.py: codes and exponents to the bit, and codes back by words."""
    source = tmp_path / "fp8.cpp"
    (tmp_path / "fp8.h").write_text((data_dir("templates") / "common" / "fp8.h").read_text())
    (tmp_path / "numbers.h").write_text((data_dir("templates") / "emulate" / "numbers.h").read_text())
    source.write_text(
        "#define KOGC_DEVICE inline\n"
        "namespace kogc { typedef unsigned char u8; typedef unsigned short u16; typedef unsigned u32;\n"
        "struct Words { u32 x, y, z, w; }; struct Quad { u32 low, high; }; }\n"
        '#include "numbers.h"\n#include "fp8.h"\n'
        'extern "C" void codes(const float* x, unsigned short* y, int n) {\n'
        "  for (int i = 0; i < n; i++) y[i] = kogc::float_to_fp8(x[i]); }\n"
        'extern "C" unsigned exponent(float x) { return kogc::fp8_exponent(x); }\n'
        'extern "C" float divisor(unsigned e) { return kogc::fp8_divisor(e); }\n'
        'extern "C" float scale(unsigned e) { return kogc::fp8_scale(e); }\n'
        'extern "C" void operands(unsigned low, unsigned high, unsigned* to) {\n'
        "  const kogc::Words w = kogc::operand(kogc::Quad{low, high});\n"
        "  to[0] = w.x; to[1] = w.y; to[2] = w.z; to[3] = w.w; }\n"
    )
    library = tmp_path / "fp8.so"
    compile_cpp(source, FLAGS, library)
    lib = ctypes.CDLL(str(library))
    lib.divisor.restype = lib.scale.restype = ctypes.c_float
    rng = np.random.default_rng(0)
    ends = np.concatenate([DECODED[:127], (DECODED[:126] + DECODED[1:127]) / 2, [447, 463, 500, 1e9]])
    x = np.concatenate([rng.normal(0, 1, 20000) * 2.0 ** rng.integers(-14, 9, 20000), ends, -ends]).astype(np.float32)
    got = np.zeros(len(x), np.uint16)
    lib.codes(x.ctypes.data_as(ctypes.c_void_p), got.ctypes.data_as(ctypes.c_void_p), len(x))
    np.testing.assert_array_equal(got, to_e4m3(x))
    for largest in (0.0, 1e-45, 1e-38, 3e-30, 0.99, 1.0, 255.9, 256.0, 3e30):
        vector = np.array([[largest, -largest / 3]], np.float32)
        codes, (exponent,) = to_fp8(vector)
        assert lib.exponent(ctypes.c_float(largest)) == exponent
        assert to_e4m3(vector * np.float32(lib.divisor(int(exponent)))).tolist() == codes.tolist()
        assert lib.scale(int(exponent)) == 2.0 ** (int(exponent) - 127 + 60)
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # of the codes in the bytes of two words
    for _ in range(50):
        codes = rng.choice([c for c in range(256) if c & 127 != 127], 8).astype(np.uint8)
        low, high = codes[order].view(np.uint32)
        words = (ctypes.c_uint32 * 4)()
        lib.operands(int(low), int(high), words)
        values = (np.array(words, np.uint32).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(values.astype(np.float64) * 2.0**120, DECODED[codes])


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
    "a stage used before it has arrived": (
        "cuda/matvec.cuh",
        "if (taken_ == 0 && !full_) wait_full<P>(stream, where);",
        "",
    ),
    "a stage overwritten while it is read": ("cuda/stream.cuh", "if (!wait_empty(next)) return false;", ""),
    "a stage released before it is read": ("cuda/stream.cuh", "if (lane() == 0) barrier_arrive", "barrier_arrive"),
    "a tile used before it has arrived": (
        "cuda/attention.cuh",
        "wait_full<P, Tiles<P>::MOST_STAGES>(stream, stages(chunk, position), where);",
        "",
    ),
    "a key copied before it is written": (
        "cuda/stream.cuh",
        "if (where_.layer == 0 && !wait_written()) return false;",
        "",
    ),
    "a value taken before it is ready": ("common/exchange.h", " && ready<BIT>(v[i], parity)", ""),
    "a value with the parity of its last use": (
        "common/exchange.h",
        "(as_word(v[0]) & ~1u) | parity",
        "(as_word(v[0]) & ~1u) | (parity ^ 1)",
    ),
    "a vector taken from another's slot": ("common/decoder.h", "P::X_DOWN", "P::X_O"),
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
    "a new key that only its cache sees": ("cuda/attention.cuh", "insert_key(scales[n], position - bases[n]);", "{}"),
    "a stage of a chunk used before it has arrived": (
        "cuda/attention.cuh",
        "wait_full<P>(stream, where);\n        if (seen",
        "if (seen",
    ),
}
# What copies of 16 bytes a lane can get wrong; the last one they alone can.
ASYNC_BUGS = {
    **{
        bug: BUGS[bug]
        for bug in (
            "a stage used before it has arrived",
            "a stage overwritten while it is read",
            "a key copied before it is written",
            "a stage of a chunk used before it has arrived",
        )
    },
    "a stage that is full when one lane has copied": (
        "cuda/stream.cuh",
        "barrier_init(full(i), COPIERS);",
        "barrier_init(full(i), 1);",
    ),
}
# What an FP8 cache adds, told from the model over the cache as stored: these are wrong in every order.
FP8_BUGS = {
    "a key with another's scale": ("fp8-pairs", "cuda/tiles.cuh", "bytes >> i / 2 * 8 & 0xff", "bytes & 0xff"),
    "a value without its scale": ("fp8-pairs", "cuda/attention.cuh", "scales[n].values(p[n]);", ""),
    "a new key with an old scale": (
        "fp8-pairs",
        "cuda/attention.cuh",
        "const u32 both = *",
        "return; const u32 both = *",
    ),
    "a new key in its neighbour's bytes": ("fp8-pairs", "cuda/attention.cuh", "key.low, r / 8 * 8,", "key.low, 0,"),
    "a new value in its neighbour's byte": ("fp8-pairs", "cuda/attention.cuh", "r % 2 * 16 + r / 8 * 8", "r % 2 * 16"),
    "the second chunk of a pair left out": ("fp8-pairs", "cuda/attention.cuh", "if (n) load_tile_keys(tiles[n]);", ""),
    "codes in the order of BF16": ("fp8", "common/fp8.h", "element % 2 * 2 + element / 2 % 2", "element % 4"),
    "numbers cut off, not rounded": ("fp8", "common/fp8.h", "(w + 0x7ffff + (w >> 20 & 1)) >> 20", "w >> 20"),
    "a sign that is lost": ("fp8", "common/fp8.h", "(w << 8 & 0x80008000u) | ", ""),
    "a vector that saturates": ("fp8", "common/fp8.h", "FP8_TOP = 7", "FP8_TOP = 11"),
    "the largest of one lane": ("fp8", "common/attention.h", "m = other > m ? other : m;", ""),
}
NEEDS = {  # what a bug needs besides the case `planted`, to show
    "a key copied before it is written": "step-in-ring",
    "a stage of a chunk used before it has arrived": "chunk-over-ring",
}
PLANTED = [*(("", bug, *BUGS[bug]) for bug in BUGS), *(("async-", bug, *ASYNC_BUGS[bug]) for bug in ASYNC_BUGS)]


@pytest.mark.parametrize(
    ("copies", "bug", "file", "old", "new"), PLANTED, ids=[kind + bug for kind, bug, *_ in PLANTED]
)
def test_a_planted_bug_is_noticed(copies: str, bug: str, file: str, old: str, new: str) -> None:
    case = copies + NEEDS.get(bug, "planted")
    sound, broken = emulated(case)[0], patched(case, file, old, new)
    tokens = prompt(sound.plan.spec.vocab, max(6, CASES[case].tokens))
    expected = sound.logits(tokens)

    def seen(seed: int) -> bool:
        try:
            return not np.array_equal(broken.logits(tokens, seed), expected)
        except EmulatorError:
            return True

    assert any(seen(seed) for seed in range(1, 41))


@pytest.mark.parametrize("bug", FP8_BUGS)
def test_a_planted_bug_of_an_fp8_cache_is_noticed(bug: str) -> None:
    case, file, old, new = FP8_BUGS[bug]
    broken, checkpoint = patched(case, file, old, new), planned(case)[1]
    tokens = prompt(broken.plan.spec.vocab, CASES[case].tokens)
    logits = broken.logits(tokens)
    half = rc.reference_logits(checkpoint, tokens, torch.bfloat16)
    try:
        over = over_cache(broken.plan, checkpoint, tokens, broken.buffers["kv"].bytes)
    except AssertionError:
        return
    assert error(logits, over) > error(half, rc.reference_logits(checkpoint, tokens))


# The same for sampling: what would go wrong on a GPU now and then, or always.
SAMPLING_BUGS = {
    "a word taken whatever its tag": ("common/choice.h", "&& ((u32)v[i] & TAG_MASK) == tag)", "&& (u32)v[i])"),
    "logits read before the barrier": ("common/sampling.h", "sync();  // the rows' logits are in memory", ""),
    "bins filled before they are cleared": (
        "common/threshold.h",
        "all[i] = 0;\n    sync();",
        "all[i] = 0;",
    ),
    "a block whose rows nobody counts": ("common/threshold.h", "int b0 = i / ITEMS;", "int b0 = i / ITEMS + 1;"),
    "one more than top-k": ("common/sampling.h", "find((u32)args.top_k,", "find((u32)args.top_k + 1,"),
    "top-p of all, not of what top-k admits": ("common/threshold.h", "top_k ? top_k : ~0ull", "~0ull"),
    "totals of another prefix": ("common/threshold.h", "area_prefix(level) != prefix", "area_prefix(level) == ~0u"),
    "noise by the row within the block": ("common/sampling.h", "const int row = rows.first + i;", "const int row = i;"),
    "noise that ignores the position": ("common/sampling.h", "(u32)(args.start + step)", "0"),
    "a penalty that forgets the prompt": ("common/sampling.h", "= IN_PROMPT;  //", "= 0;  //"),
    "tokens that are not counted": ("common/sampling.h", "rows.seen[token - rows.first]++", "(void)token"),
    "a bias that is lost": ("common/sampling.h", "from = rows.scores;", ""),
    "a block's largest logit in place of all blocks'": (
        "common/sampling.h",
        "largest = value_of(largest_of_blocks<P>(maxima, tag, where, WAIT_MAXIMA));",
        "largest = value_of(best);",
    ),
    "the log-probability of another block's candidate": (
        "common/logprobs.h",
        "without_tag(take_key((u64*)(args.exchange + P::X_KEYS) + b, tag, where, WAIT_KEYS)) == key",
        "b == 0",
    ),
    "likeliest tokens out of order": ("common/logprobs.h", "if (key < best) next", "next"),
}


@pytest.mark.parametrize("bug", SAMPLING_BUGS)
def test_a_planted_bug_of_sampling_is_noticed(bug: str) -> None:
    broken = patched("sampled", *SAMPLING_BUGS[bug])

    def seen(name: str, order: int) -> bool:
        try:
            sampled_as_the_reference(broken, dataclasses.replace(SAMPLED[name], seed=order), order)
        except AssertionError:  # an EmulatorError is one too
            return True
        return False

    assert any(seen(name, order) for order in range(1, 13) for name in SAMPLED)


# The same for short lists, where a block may have more good rows than it lists.
LIST_BUGS = {
    "a list that is too short, and trusted": ("| (own.last ? DOUBTFUL : 0)", ""),
    "a block whose rows nobody considers": ("store(larger, a.keys[i])", "store(larger, block() == 1 ? 0 : a.keys[i])"),
    "a list of the rows found so far": ("    sync();\n    const int found", "    const int found"),
    "rows kept after those of another stage": ("if (thread() == 0) area().count = 0;", ""),
    "one more than top-k": ("closer < args_.top_k;", "closer <= args_.top_k;"),
    "top-p that admits all": ("own.closer_mass >= wanted", "false"),
    "min-p that admits all": (" || own.distance > args_.reach", ""),
    "noise of a neighbouring row": ("own.row % 2 * 32", "0"),
    "distances before the barrier": ("    sync();\n    u32 farthest", "    u32 farthest"),
}
LISTED = {
    "hot": Sampling(temperature=8.0, top_k=64),
    "top-p": Sampling(temperature=6.0, top_k=50, top_p=0.3),
    "min-p": Sampling(temperature=3.0, top_k=50, min_p=0.5),
    "two": Sampling(temperature=20.0, top_k=2),
    "crowded": SAMPLED["crowded"],
}


@pytest.mark.parametrize("bug", LIST_BUGS)
def test_a_planted_bug_of_short_lists_is_noticed(bug: str) -> None:
    broken = patched("listed", "common/shortlist.h", *LIST_BUGS[bug])

    def seen(name: str, order: int) -> bool:
        try:
            sampled_as_the_reference(broken, dataclasses.replace(LISTED[name], seed=order), order)
        except AssertionError:  # an EmulatorError is one too
            return True
        return False

    assert any(seen(name, order) for order in range(1, 13) for name in LISTED)


@pytest.mark.parametrize("name", ["planted", "async-planted"])
def test_a_stall_is_reported_with_its_place(name: str) -> None:
    sound, checkpoint = emulated(name)

    def patch(headers: dict[str, str]) -> dict[str, str]:
        file, old = "common/decoder.h", "if (phase_ == GATE_UP) {  // rows alternate"
        assert old in headers[file]
        silent = "if (phase_ == GATE_UP && where_.layer == 1) return;\n"
        return {**headers, file: headers[file].replace(old, silent + old)}

    broken = Emulated(sound.plan, checkpoint, patch)
    with pytest.raises(EmulatorError, match="stalled"):
        broken.logits(prompt(sound.plan.spec.vocab, 2))
    stalled, _block, _thread, site, layer, step, *_ = broken.report
    # Who waits longest speaks: a consumer where nothing was put, or a producer, as far ahead as the ring holds stages.
    assert stalled == 1
    assert (site, step, layer) == (WAIT_HIDDEN, 0, 1) or (site == STAGE_EMPTY and (step, layer) >= (0, 1))
