"""The CUDA kernel that ships, run without a GPU: right numbers in every order of its threads."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import random_checkpoint as rc
import torch
from emulated_cases import CASES, emulated, error, planned, prompt
from emulator import FLAGS, compile_cpp
from fp8_cache import over_cache

from kogc.kv_numbers import DECODED, to_e4m3, to_fp8
from kogc.resources import data_dir


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
    ends = np.concatenate([DECODED[:127], (DECODED[:126] + DECODED[1:127]) / 2, [447, 463, 500, 1e9, np.inf, np.nan]])
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
