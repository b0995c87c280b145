"""The CPU target's parts: features and profiles, the compiler, and what a library does besides decoding well."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kogc import rope
from kogc.errors import KogcError
from kogc.packing import operands
from kogc.plan.plan import Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.render import Rendered, render
from kogc.runtime import Program, Request, Runtime, open_runtime
from kogc.runtime.args import kernel_args
from kogc.spec import ModelSpec, Rope
from kogc.targets import cpu, cpu_features, detect

SPEC = ModelSpec(
    name="small", family="llama", layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=64, vocab=131,
    tied_embeddings=False, norm_eps=1e-5, max_context=512, qkv_bias=False, qk_norm=False, sliding_window=None,
    sliding_layers=None, rope=Rope(10000.0), dtype="bf16", bos_token=None, eos_tokens=(),
)  # fmt: skip
NUMBERS = """
#include "common/args.h"
#include "cpu/machine.hpp"
#define EXPORT extern "C" __attribute__((visibility("default")))
#define EACH(name, T, f) \\
  EXPORT void name(const float* x, T* y, int n) { for (int i = 0; i < n; i++) y[i] = kogc::f(x[i]); }
EACH(exp2_all, float, exp2_fast)
EACH(bf16_all, unsigned short, float_to_bf16)
EACH(half_all, unsigned short, float_to_half)
"""
avx2 = pytest.mark.skipif("avx2" not in cpu_features.cpu_features(), reason="needs x86-64 with AVX2")


def small_plan(blocks: int = 2, profile: str = "cpu-avx2") -> Plan:
    return make_plan(SPEC, load_profile(profile), Options(blocks=blocks))


def open_small(plan: Plan, rendered: Rendered, tmp_path: Path) -> Runtime:
    """A runtime of the small model with dummy weights."""
    binary = tmp_path / "kernel.so"
    binary.write_bytes(cpu.compile_binary(rendered, plan))
    frequencies = rope.inv_freq(plan.spec)
    table = rope.table(frequencies, plan.max_context)
    program = Program(plan, binary, tuple(operands(plan)), None, frequencies, table, {})  # type: ignore[arg-type]
    return open_runtime(program, oversubscribe=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    plan = small_plan()
    with open_small(plan, render(plan), tmp_path_factory.mktemp("small")) as runtime:
        yield runtime


# --- features and profiles


@avx2
def test_processor_tells_what_cpuinfo_lists() -> None:
    listed = cpu_features.read_cpuinfo(Path("/proc/cpuinfo"))
    if not listed:
        pytest.skip("this system lists no flags")
    assert cpu_features.ask_processor() == listed


def test_features_need_the_system() -> None:
    leaves = {(0, 0): (7, 0, 0, 0), (1, 0): (0, 0, 1 << 27 | 1 << 12 | 1 << 29, 0), (7, 0): (1, 1 << 5 | 1 << 16, 0, 0)}

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return leaves.get((leaf, subleaf), (1 << 5, 0, 0, 0))

    everything = {"fma", "f16c", "avx2", "avx512f", "avx512_bf16"}
    assert cpu_features.features_of(cpuid, lambda: 0xE7) == everything
    assert cpu_features.features_of(cpuid, lambda: 0x07) == {"fma", "f16c", "avx2"}  # no state for AVX-512
    assert cpu_features.features_of(cpuid, lambda: 0x03) == set()
    leaves[7, 0] = (0, *leaves[7, 0][1:])  # subleaf 1 does not exist: what it answers means nothing
    assert cpu_features.features_of(cpuid, lambda: 0xE7) == everything - {"avx512_bf16"}
    leaves[1, 0] = (0, 0, 1 << 12 | 1 << 29, 0)  # the system has not enabled XGETBV
    assert cpu_features.features_of(cpuid, lambda: 0xE7) == set()


def test_cpuinfo_without_flags(tmp_path: Path) -> None:
    assert cpu_features.read_cpuinfo(tmp_path / "none") == set()
    text = tmp_path / "cpuinfo"
    text.write_text("processor : 0\nflags\t\t: fpu avx2 fma f16c avx512_vnni\nbugs : x\n")
    assert cpu_features.read_cpuinfo(text) == {"avx2", "fma", "f16c"}


def test_best_profile() -> None:
    features = set(load_profile("cpu-avx512-bf16").flags)
    assert detect.best_profile(features) == "cpu-avx512-bf16"
    assert detect.best_profile(features - {"avx512_bf16"}) == "cpu-avx512"
    assert detect.best_profile(features - {"avx512vl"}) == "cpu-avx2"
    assert detect.best_profile(features - {"fma"}) is None
    assert detect.fitting_profiles(features) == ["cpu-avx2", "cpu-avx512", "cpu-avx512-bf16"]


def test_machine_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "cpu_features", lambda: frozenset({"fma"}))
    with pytest.raises(KogcError, match="AVX2"):
        detect.detect_cpu_profile()


# --- the compiler


@avx2
def test_same_bytes_everywhere() -> None:
    plan = small_plan()
    rendered = render(plan)
    first, second = (cpu.compile_binary(rendered, plan) for _ in range(2))
    assert first == second
    assert b"libstdc++" not in first
    assert b"kogc-" not in first


def test_instruction_sets() -> None:
    flags = {arch: " ".join(cpu.ARCH_FLAGS[arch]) for arch in ("avx2", "avx512", "avx512-bf16")}
    assert "avx512" not in flags["avx2"]
    assert "avx512f" in flags["avx512"]
    assert "bf16" not in flags["avx512"]
    assert "avx512bf16" in flags["avx512-bf16"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu._compiler.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KogcError, match="no C\\+\\+ compiler"):
        cpu.version()
    cpu._compiler.cache_clear()


@pytest.mark.parametrize("value", ["/no/such/c++", "'unfinished"])
def test_wrong_cxx(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(KogcError, match="CXX="):
        cpu.version()


def test_cxx_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$CXX may carry arguments; a compiler that fails is reported by its first error line."""
    script = tmp_path / "my compiler"
    lines = [
        "#!/bin/sh",
        'if [ "$2" = --version ]; then echo "clang version 17.0.1"; exit; fi',
        'echo note >&2; echo "k.h:1: error: $1" >&2; exit 1',
    ]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{script}' --fancy")
    assert cpu.version() == "clang 17.0.1"
    plan = small_plan()
    with pytest.raises(KogcError, match="clang 17.0.1: k.h:1: error: --fancy"):
        cpu.compile_binary(render(plan), plan)


# --- the library


@avx2
def test_numbers(tmp_path: Path) -> None:
    plan = small_plan()
    rendered = dataclasses.replace(render(plan), source=NUMBERS)
    (tmp_path / "numbers.so").write_bytes(cpu.compile_binary(rendered, plan))
    library = ctypes.CDLL(str(tmp_path / "numbers.so"))

    def call(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
        y = np.empty(len(x), dtype)
        getattr(library, name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), len(x))
        return y

    x = np.linspace(-125.9, 126.9, 200_001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(call("exp2_all", x, np.float32) / exact - 1)).max() < 2e-7
    ends = np.array([0, 1, -1e30, -150, 200, np.nan], np.float32)
    assert call("exp2_all", ends, np.float32)[:5].tolist() == [1, 2, 0, 0, 2.0**127]
    assert np.isnan(call("exp2_all", ends, np.float32)[5])
    some = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(300)
    values = np.concatenate([some, np.array([1 + 2**-8, 1 + 3 * 2**-8, 65520, 1e-7, np.inf, -0.0], np.float32)])
    with np.errstate(over="ignore"):
        assert np.array_equal(call("half_all", values, np.uint16), values.astype(np.float16).view(np.uint16))
    words = values.view(np.uint32).astype(np.uint64)
    nearest = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(call("bf16_all", values, np.uint16), nearest)
    assert call("bf16_all", np.array([np.nan], np.float32), np.uint16)[0] & 0x7FFF > 0x7F80


def hashed(seed: int, i: np.ndarray) -> np.ndarray:
    """Uniform in (-1, 1), as every target's kogc_fill makes it."""
    h = (i & 0xFFFFFFFF).astype(np.uint32) * np.uint32(0x9E3779B1)
    h ^= (i >> 32).astype(np.uint32) * np.uint32(0x85EBCA77) ^ np.uint32(seed * 0xC2B2AE3D & 0xFFFFFFFF)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return h.astype(np.float32) * np.float32(2.0 / 2**32) - np.float32(1)


@avx2
@pytest.mark.parametrize("count", [0, 1, 4099])
def test_fill(small: Any, count: int) -> None:
    out = np.full(count + 1, 7, np.uint16)
    small._library.kogc_fill(out.ctypes.data, count, 3, 0.5, 1)
    expected = hashed(3, np.arange(count, dtype=np.uint64)) * np.float32(0.5)
    assert np.array_equal(out[:count], expected.astype(np.float16).view(np.uint16))
    assert out[count] == 7


@avx2
@pytest.mark.parametrize("count", [0, 63, 1 << 20])
def test_read_ceiling_returns(small: Any, count: int) -> None:
    data = np.zeros(max(count, 1), np.uint8)
    small._library.kogc_read_ceiling(data.ctypes.data, count, 3)


@avx2
def test_dummy_model_decodes(small: Any) -> None:
    first = small.run(Request((1, 2, 3), max_new=9))
    assert len(first.tokens) == 9
    assert all(0 <= token < SPEC.vocab for token in first.tokens)
    assert small.run(Request((1, 2, 3), max_new=9)).tokens == first.tokens
    stop = first.tokens[4]
    until = first.tokens[: first.tokens.index(stop) + 1]
    assert small.run(Request((1, 2, 3), max_new=9, stop=(stop,))).tokens == until


@avx2
def test_continues_from_the_cache(small: Any) -> None:
    """Logits of a text in two launches are those of one."""
    text = tuple(range(1, 21))
    whole = small.run(Request(text, logits=True)).logits
    small.run(Request(text[:13]))
    assert np.array_equal(small.run(Request(text[13:], start=13, logits=True)).logits, whole[13:])


@avx2
def test_stops_within_a_prompt(small: Any) -> None:
    """The stop word counts before the first token too: nothing is made, and the status is that of a finished launch."""
    small.words.clear()
    small.words.stop_word[0] = 1
    prompt = np.ones(400, np.int32)
    small._launch(kernel_args(small._pointers(), 0, len(prompt), 100), prompt, False, np.empty((0, 2), np.int32))
    small._wait()
    assert small._done()
    assert small.words.ring[0] == -1
    assert len(small.run(Request((1,), max_new=2)).tokens) == 2


@avx2
def test_stall_is_reported(tmp_path: Path) -> None:
    """A thread that leaves early: the others give up, the report says who waited, and the process lives."""
    plan = small_plan(blocks=3)
    rendered = render(plan)
    step, limit = "if (!decoder.step(step)) break;", "SPIN_LIMIT = 5000000000ull"
    assert step in rendered.headers["cpu/kernels.hpp"]
    assert limit in rendered.headers["common/spin.h"]
    changes = {step: "if (block() == 1 && step == 2) break;\n" + step, limit: "SPIN_LIMIT = 20000000ull"}
    headers = {k: _replaced(text, changes) for k, text in rendered.headers.items()}
    with open_small(plan, dataclasses.replace(rendered, headers=headers), tmp_path) as runtime:
        with pytest.raises(KogcError, match="stalled.*'(qkv|partial attention)' in layer 0, step 2"):
            runtime.run(Request((1, 2, 3, 4), max_new=4))
        assert runtime.words.report[0] == 1
        assert len(runtime.run(Request((1, 2))).tokens) == 0  # two steps are fine


def _replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text
