"""Rendering: every shipped model on every profile, the same text each time, from headers that compile."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from emulator import EXCHANGED, FLAGS, compile_cpp, emulated_headers

from kogc.build import prepare
from kogc.plan.plan import Knobs, Options, Plan, make_plan
from kogc.profile import list_profiles, load_profile
from kogc.render import HEADERS, headers_of, render
from kogc.resources import data_dir
from kogc.spec import list_specs, load_spec
from kogc.targets import cuda

TEMPLATES = data_dir("templates")
OWN_HEADERS = sorted(path for path in TEMPLATES.glob("*/*") if path.suffix in (".h", ".cuh", ".hpp"))
MAX_LINES = 250
# What a machine's header keeps to itself: nothing above it calls these.
OWN_TO_A_MACHINE = re.compile(
    r" (shared_address|copy_16|launch|store_agent|load_agent|multiply_slices|multiply_whole|fmaxf)\("
)


def plan_of(model: str, profile: str = "h200-sxm", **spec: object) -> Plan:
    loaded = load_profile(profile)
    if loaded.memory_bytes:  # whether a model fits the memory is not what is tested here
        loaded = dataclasses.replace(loaded, memory_bytes=1 << 40)
    blocks = 3 if loaded.target == "cpu" else None
    return make_plan(dataclasses.replace(load_spec(model), **spec), loaded, Options(blocks=blocks))  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", list_profiles())
@pytest.mark.parametrize("model", list_specs())
def test_every_model_renders_for_every_profile_the_same_each_time(model: str, profile: str) -> None:
    first, second = render(plan_of(model, profile)), render(plan_of(model, profile))
    assert first == second
    assert first.name.startswith(model)
    included = re.findall(r'#include "([^"]+)"', first.source)
    assert included == list(first.headers) == list(headers_of(load_profile(profile)))


@pytest.mark.parametrize("profile", ["h200-sxm", "cpu-avx2"])
def test_the_source_names_nothing_of_this_machine(profile: str) -> None:
    rendered = render(plan_of("llama-3.2-1b", profile))
    for text in (rendered.source, *rendered.headers.values()):
        assert str(Path.home()) not in text
        assert str(TEMPLATES.parent) not in text


# Opcodes of SASS that a kernel must have, and must not have: products, copies into shared memory, prefetches into L2.
# A copy that may go to another block's memory is, on sm_120a, a call of what the driver links in (CALL.ABS).
BULK = (("UBLKCP", "UBLKPF", "HMMA"), ("LDGSTS", "CCTL.E.PF2", "CALL.ABS"))
ASYNC = (("LDGSTS", "ARRIVES.LDGSTSBAR", "CCTL.E.PF2", "HMMA"), ("UBLKCP", "UBLKPF", "CALL.ABS"))
# What the compiler writes where lanes of a warp may part: 20 to 30 ns each on an H200, in code that layers run through.
WARPS_PART = re.compile(r"\b(?:YIELD|BRA\.DIV)\b")
BLACKWELL = re.compile(r"sm_1\d\da")  # there the warps that copy samples' weights have some


@pytest.mark.parametrize(
    ("model", "profile", "spec"),
    [
        ("llama-3.2-1b", "h200-sxm", {}),
        ("llama-3.2-1b", "h100-sxm", {"dtype": "fp16"}),
        ("qwen3-0.6b", "h200-sxm", {}),
        ("qwen2.5-1.5b", "h100-sxm", {}),
        ("laneformer-2b", "h200-sxm", {}),
        ("mistral-7b-v0.3", "h100-sxm", {"sliding_window": 4096}),
        ("llama-3.1-8b", "h200-sxm", {}),
        ("llama-3.2-3b", "h200-sxm", {"max_context": 4864}),  # chunks that are no power of two: another multiplication
        ("qwen3-4b", "h200-sxm", {}),
        ("qwen3-8b", "h200-sxm", {}),
        ("smollm2-135m", "h200-sxm", {}),
        # One of each architecture, some of them models whose keys and values no ring there holds at once; `make matrix`
        # compiles all models for all profiles.
        ("llama-3.1-8b", "a100-sxm-80gb", {}),
        ("qwen3-8b", "rtx-3090", {}),
        ("llama-3.2-1b", "a10g", {"dtype": "fp16"}),
        ("llama-3.1-8b", "rtx-4090", {}),
        ("smollm2-135m", "l40s", {}),
        ("qwen3-0.6b", "b200", {}),
        ("llama-3.1-8b", "b300", {}),
        ("llama-3.1-8b", "rtx-5090", {}),
        ("laneformer-2b", "dgx-spark", {}),
    ],
)
def test_cuda_sources_compile_to_what_the_architecture_can(
    model: str, profile: str, spec: dict, tmp_path: Path
) -> None:
    """Without a GPU and without spills, with the copies and products that are meant."""
    plan = plan_of(model, profile, **spec)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(cuda.compile_binary(render(plan), plan))  # refuses what spills or uses local memory
    code = disassembled(cubin)
    for symbol in ("kogc_generate", "kogc_prompt", "kogc_fill", "kogc_read_ceiling"):
        assert f".text.{symbol}" in code
    present, absent = BULK if plan.profile.bulk_copies else ASYNC
    assert [opcode for opcode in present if opcode not in code] == []
    assert [opcode for opcode in absent if opcode in code] == []
    as_one = ["kogc_generate", "kogc_prompt", "kogc_samples"]
    if BLACKWELL.fullmatch(plan.profile.arch):
        as_one.remove("kogc_samples")
    for symbol in as_one:
        assert not WARPS_PART.findall(body(code, symbol)), f"{symbol}: a warp may not go as one"


def body(code: str, symbol: str) -> str:
    """The code of a kernel without the functions that lie behind it, and nothing where there is no such kernel."""
    after = code.partition(f".text.{symbol}:")[2].partition("//---")[0]
    return re.split(r"^\$kogc_", after, maxsplit=1, flags=re.MULTILINE)[0]


def disassembled(cubin: Path) -> str:
    found = find_spec("nvidia")
    places = found.submodule_search_locations if found else None
    tools = [tool for place in places or () for tool in Path(place).glob("*/bin/nvdisasm")]
    assert tools, "no nvdisasm: pip install nvidia-cuda-nvdisasm"
    return subprocess.run([tools[0], "-c", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-0.6b", "laneformer-2b"])
def test_tuned_settings_compile_without_spills(model: str) -> None:
    prepared = prepare(model, "h200-sxm")
    assert prepared.plan.knobs != Knobs()  # the tuned file was found
    assert cuda.compile_binary(render(prepared.plan), prepared.plan)


def test_a_source_that_spills_is_refused_with_its_place() -> None:
    plan = plan_of("llama-3.2-1b")
    rendered = render(plan)
    stressed = dataclasses.replace(
        rendered, headers={**rendered.headers, "cuda/kernels.cuh": _spilling(rendered.headers)}
    )
    with pytest.raises(cuda.KogcError, match="kogc_generate uses [0-9]+ bytes of local memory"):
        cuda.compile_binary(stressed, plan)


def test_a_function_that_a_kernel_calls_does_not_hide_its_memory() -> None:
    log = """ptxas info    : Compiling entry function 'kogc_generate' for 'sm_90a'
ptxas info    : Function properties for kogc_generate
ptxas         .     256 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 122 registers, used 2 barriers, 256 bytes cumulative stack size
ptxas info    : Function properties for _ZN4kogc7give_upEv
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    usage = cuda.resource_usage(log)
    assert usage["kogc_generate"] == {"stack": 256, "spill_stores": 8, "spill_loads": 4, "registers": 122}
    assert usage["_ZN4kogc7give_upEv"]["stack"] == 0


def _spilling(headers: dict[str, str]) -> str:
    """A kernel with an array that no register can hold, as it is indexed by what only the run knows."""
    old = "Ring<P>::init();\n  const int steps"
    text = headers["cuda/kernels.cuh"]
    assert old in text
    stress = (
        "volatile int held[64];\n"
        "  for (int i = 0; i < 64; i++) held[i] = thread() ^ i;\n"
        "  if (args.start < 0) args.tokens[0] = held[args.n_prompt & 63];\n  "
    )
    return text.replace(old, stress + old, 1)


def test_a_source_that_does_not_compile_is_refused() -> None:
    plan = plan_of("llama-3.2-1b")
    broken = dataclasses.replace(render(plan), source="int kogc_generate(")
    with pytest.raises(cuda.KogcError, match="does not compile"):
        cuda.compile_binary(broken, plan)


@pytest.mark.parametrize(
    ("profile", "count"),
    [
        *((p, n + 1) for p in ("h200-sxm", "mi300x") for n in range(len(HEADERS[load_profile(p).target]))),
        ("rtx-4090", 3),
    ],
)
def test_each_header_stands_on_those_before_it(profile: str, count: int, tmp_path: Path) -> None:
    files = emulated_headers(render(plan_of("llama-3.2-1b", profile)).headers)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source = tmp_path / "prefix.cpp"
    source.write_text("".join(f'#include "{name}"\n' for name in headers_of(load_profile(profile))[:count]))
    flags = [*(f for f in FLAGS if f != "-shared"), f"-DKOGC_LANES={load_profile(profile).lanes}"]
    compile_cpp(source, [*flags, "-Werror", "-fsyntax-only"], tmp_path / "none")


@pytest.mark.parametrize("path", OWN_HEADERS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_headers_are_short_and_included_once(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "#pragma once" in lines
    assert lines[0].startswith("// ")
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= 160


def test_inline_instructions_stay_in_the_headers_of_the_machine() -> None:
    for path in OWN_HEADERS:
        name = f"{path.parent.name}/{path.name}"
        if path.parent.name in ("common", "cuda", "hip") and name not in EXCHANGED:
            assert not re.search(r"\basm\b", path.read_text()), path.name


@pytest.mark.parametrize(
    ("header", "least"),
    [
        ("cuda/machine.cuh", 30),
        ("cuda/bulk_copies.cuh", 7),
        ("cuda/async_copies.cuh", 7),
        ("hip/machine.h", 30),
        ("hip/matrix.h", 2),
    ],
)
def test_the_emulated_machine_has_every_function_of_the_real_one(header: str, least: int) -> None:
    """The same signatures, but for what the real machine keeps to itself."""
    pattern = r"^(?:template <[^>]+> )?(?:\[\[noreturn\]\] )?(KOGC_DEVICE [^{;]+\))"
    real = set(re.findall(pattern, (TEMPLATES / header).read_text(), re.MULTILINE))
    names = {EXCHANGED[header], "emulate/machine.h", "emulate/numbers.h"}
    stand_in = "\n".join((TEMPLATES / name).read_text() for name in sorted(names))
    assert len(real) >= least
    assert {text for text in real if not OWN_TO_A_MACHINE.search(text)} <= set(re.findall(pattern, stand_in, re.M))


@pytest.mark.parametrize(
    ("window", "layers"),
    [(None, None), (64, None), (64, ()), (64, (0, 2)), (4096, (1, 63, 64, 69)), (7, tuple(range(70)))],
)
def test_the_window_of_each_layer_reaches_the_source(window: int | None, layers: tuple | None, tmp_path: Path) -> None:
    plan = plan_of("qwen3-0.6b", layers=70, sliding_window=window, sliding_layers=layers)
    line = next(x for x in render(plan).source.splitlines() if "int window(int layer)" in x)
    source = tmp_path / "window.cpp"
    source.write_text(line.replace("static KOGC_DEVICE", 'extern "C"'))
    compile_cpp(source, FLAGS, tmp_path / "window.so")
    compiled = ctypes.CDLL(str(tmp_path / "window.so")).window
    assert [compiled(layer) for layer in range(70)] == [plan.spec.window(layer) or 0 for layer in range(70)]
