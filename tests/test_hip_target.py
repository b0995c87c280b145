"""Code objects for AMD GPUs: compiled without ROCm, without spills, and with the instructions that they should have."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kogc.cache import Cache
from kogc.errors import KogcError
from kogc.plan.plan import Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.render import Rendered, render
from kogc.spec import load_spec
from kogc.targets import compile_binary, hip, hiprtc
from kogc.targets.code_object import Kernel, read_kernels

KERNELS = {"kogc_generate", "kogc_fill", "kogc_read_ceiling"}


def plan_of(model: str, gpu: str, **spec: object) -> Plan:
    profile = dataclasses.replace(load_profile(gpu), memory_bytes=1 << 40)  # whether it fits is not the question
    return make_plan(dataclasses.replace(load_spec(model), **spec), profile, Options())  # type: ignore[arg-type]


# `make matrix` compiles all models for all profiles: here each architecture, head size, dtype and kind of model once.
@pytest.mark.parametrize(
    ("model", "gpu", "spec"),
    [
        ("llama-3.1-8b", "mi300x", {}),
        ("qwen3-0.6b", "mi300x", {"dtype": "fp16"}),
        ("laneformer-2b", "mi325x", {}),
        ("qwen2.5-1.5b", "mi355x", {}),
        ("qwen3-8b", "mi355x", {}),
        ("smollm2-135m", "mi355x", {"sliding_window": 4096}),
        ("mistral-7b-v0.3", "rx-9070-xt", {}),
        ("qwen3-8b", "rx-9070-xt", {}),
        ("llama-3.2-1b", "rx-9070-xt", {"dtype": "fp16"}),
    ],
)
def test_sources_compile_without_rocm_and_without_spills(model: str, gpu: str, spec: dict) -> None:
    plan = plan_of(model, gpu, **spec)
    kernels = read_kernels(hip.compile_binary(render(plan), plan))  # refuses what spills or uses scratch
    assert set(kernels) == KERNELS
    kernel = kernels["kogc_generate"]
    assert (kernel.lanes, kernel.threads) == (plan.profile.lanes, plan.profile.threads)
    assert not kernel.spills
    assert kernel.blocks_resident(plan.memory.bytes, plan.profile.smem_per_block) >= 1
    assert plan.blocks <= plan.profile.sms


@functools.cache
def assembly(gpu: str) -> dict[str, str]:
    """The text of each kernel."""
    plan = plan_of("qwen3-0.6b", gpu)
    text = hip.assembly(render(plan), plan)
    return {name: text.split(f"\n{name}:")[1].split("\t.section")[0] for name in KERNELS}


# How weights are loaded, what multiplies them, what polls another block's word.
INSTRUCTIONS = {
    "mi300x": (
        r"global_load_dwordx4 v\[[0-9:]+\], .* nt\n",
        r"v_mfma_f32_16x16x16_bf16",
        r"global_load_dwordx2 .* sc1\n",
        r"global_store_dwordx2 .* sc1\n",
    ),
    "mi355x": (
        r"global_load_dwordx4 v\[[0-9:]+\], .* nt\n",
        r"v_mfma_f32_16x16x32_bf16",
        r"global_load_dwordx2 .* sc1\n",
        r"global_store_dwordx2 .* sc1\n",
    ),
    "rx-9070-xt": (
        r"global_load_b128 v\[[0-9:]+\], .* th:TH_LOAD_NT\n",
        r"v_wmma_f32_16x16x16_bf16",
        r"global_load_b64 .* scope:SCOPE_DEV\n",
        r"global_store_b64 .* scope:SCOPE_DEV\n",
    ),
}


@pytest.mark.parametrize("gpu", INSTRUCTIONS)
def test_machine_code_has_the_intended_loads_and_products(gpu: str) -> None:
    generate, loads = assembly(gpu)["kogc_generate"], plan_of("qwen3-0.6b", gpu).knobs.in_flight
    weights, product, poll, put = INSTRUCTIONS[gpu]
    assert len(re.findall(weights, generate)) == 2 * loads  # before the first part, and in the loop over rounds
    assert len(re.findall(product, generate)) > loads  # and those of attention
    assert re.search(poll, generate)
    assert re.search(put, generate)
    assert "s_sleep" in generate
    assert "flat_load" not in generate  # nothing that must find out whether it reads LDS, and hold up other loads
    assert len(re.findall(weights, assembly(gpu)["kogc_read_ceiling"])) == loads


@pytest.mark.parametrize("gpu", INSTRUCTIONS)
def test_a_product_waits_for_the_oldest_load_alone(gpu: str) -> None:
    """Between two loads of weights in the loop stands a wait that leaves all loads but one under way."""
    generate, loads = assembly(gpu)["kogc_generate"], plan_of("qwen3-0.6b", gpu).knobs.in_flight
    loop = re.split(INSTRUCTIONS[gpu][0], generate)[loads + 1 : 2 * loads]
    assert len(loop) == loads - 1
    one = rf"s_wait_loadcnt 0x{loads - 1:x}\n" if gpu.startswith("rx") else rf"s_waitcnt vmcnt\({loads - 1}\)\n"
    for slot in loop:
        assert re.search(one, slot)
        assert "v_wmma" in slot or "v_mfma" in slot
        assert not re.search(r"s_barrier|global_inv|buffer_inv", slot)


@pytest.mark.parametrize("gpu", INSTRUCTIONS)
def test_no_cache_is_written_back_or_invalidated_but_for_the_host(gpu: str) -> None:
    """Fences stand only where a stall is reported and where a record of log-probabilities is complete."""
    generate = assembly(gpu)["kogc_generate"]
    fences = re.findall(r"buffer_wbl2.*|buffer_inv.*|global_wb .*|global_inv .*", generate)
    assert fences
    for fence in fences:
        assert "sc0 sc1" in fence or "SCOPE_SYS" in fence, fence


def test_two_compiles_give_the_same_bytes(tmp_path: Path) -> None:
    plan = plan_of("smollm2-135m", "mi300x")
    first = hip.compile_binary(render(plan), plan)
    assert first == compile_binary(render(plan), plan, Cache(tmp_path))
    for place in (str(Path.cwd()), str(tmp_path), os.environ.get("TMPDIR", "/tmp")):
        assert place.encode() not in first


def test_a_source_that_spills_is_refused_with_its_place() -> None:
    plan = plan_of("llama-3.2-1b", "mi300x")
    rendered = render(plan)
    text = rendered.headers["hip/kernels.h"]
    hungry = text.replace(
        "  Stream<P> stream(args);", "  volatile int many[64]; many[block() % 64] = 1;\n  Stream<P> stream(args);"
    )
    stressed = dataclasses.replace(rendered, headers={**rendered.headers, "hip/kernels.h": hungry})
    with pytest.raises(KogcError, match="kogc_generate uses [0-9]+ bytes of scratch"):
        hip.compile_binary(stressed, plan)


def test_a_source_that_does_not_compile_is_refused_in_one_line() -> None:
    plan = plan_of("llama-3.2-1b", "mi300x")
    with pytest.raises(KogcError, match=r"^x.hip does not compile with ziglang .*error: ") as caught:
        hip.compile_binary(Rendered("x.hip", "int main() { return nothing; }\n", {}), plan)
    assert "\n" not in str(caught.value)


def test_what_is_no_code_object_is_refused() -> None:
    for bytes_ in (b"", b"\x7fELF\x02\x01" + bytes(100), Path(sys.executable).resolve().read_bytes()):
        with pytest.raises(KogcError, match="no AMD code object"):
            read_kernels(bytes_)


def test_occupancy_is_that_of_registers_and_lds() -> None:
    def resident(vgprs: int, lanes: int, lds: int) -> int:
        return Kernel("k", vgprs, 100, 0, 0, 0, 0, lanes, 8 * lanes).blocks_resident(lds, 65536)

    assert [resident(v, 64, 1024) for v in (257, 256, 129, 128, 64)] == [0, 1, 1, 2, 4]
    assert [resident(v, 32, 1024) for v in (256, 192, 96)] == [1, 2, 4]
    assert resident(64, 64, 40000) == 1


# --- hipRTC, in place of which a stand-in is found -------------------------------------------------------------------
HIPRTC = """
import os
class hiprtcResult: HIPRTC_SUCCESS = 0; HIPRTC_ERROR_COMPILATION = 6
def hiprtcVersion(): return 0, 7, 1
def hiprtcCreateProgram(source, name, count, headers, names): return 0, source
def hiprtcCompileProgram(program, count, flags):
    assert count == len(flags)
    if b"--offload-arch={unknown}" in flags: os.abort()
    include = [f for f in flags if f.startswith(b"-I")][0][2:].decode()
    if b"broken" in program: return 6,
    open(os.environ["SEEN"], "w").write(" ".join(sorted(os.listdir(include))))
    return 0,
def hiprtcGetProgramLogSize(program): return 0, 30
def hiprtcGetProgramLog(program, log): log[:] = b"x.hip:1: error: broken source\\0"; return 0,
def hiprtcGetCodeSize(program): return 0, os.path.getsize(os.environ["CODE"])
def hiprtcGetCode(program, code): code[:] = open(os.environ["CODE"], "rb").read(); return 0,
"""


def install_hiprtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: str) -> None:
    package = tmp_path / "python" / "hip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "hiprtc.py").write_text(HIPRTC.replace("{unknown}", unknown))
    code = tmp_path / "code.co"
    code.write_bytes(_small_code_object())
    path = os.pathsep.join([str(package.parent), str(Path(hip.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("CODE", str(code))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "hip"]:
        monkeypatch.delitem(sys.modules, name)
    hip._hiprtc.cache_clear()


@pytest.fixture(autouse=True)
def _ask_anew() -> object:
    yield
    hip._hiprtc.cache_clear()


@functools.cache
def _small_code_object() -> bytes:
    plan = plan_of("llama-3.2-1b", "mi300x")
    source = 'extern "C" __attribute__((global)) void small(int* p) { *p = 1; }\n'
    return hip.compile_binary(Rendered("small.hip", source, {}), plan)


def test_a_hiprtc_that_knows_all_architectures_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _small_code_object()
    install_hiprtc(tmp_path, monkeypatch, unknown="gfx000")
    plan = plan_of("llama-3.2-1b", "mi300x")
    assert hip.version() == "hiprtc 7.1"
    assert hip.compile_binary(render(plan), plan) == _small_code_object()
    assert (tmp_path / "seen").read_text() == "common hip"
    with pytest.raises(KogcError, match=r"^b.hip does not compile with hipRTC: x.hip:1: error: broken source$"):
        hip.compile_binary(Rendered("b.hip", "broken", {}), plan)


def test_an_old_hiprtc_that_dies_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _small_code_object()
    install_hiprtc(tmp_path, monkeypatch, unknown="gfx950")
    assert hiprtc.find(["gfx942"]) == "7.1"
    assert hiprtc.find(["gfx942", "gfx950"]) is None
    assert hip.version().startswith("ziglang ")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    with pytest.raises(KogcError, match="hipRTC: .*"):
        hiprtc.compile_in_process("k", "", {"a/b.h": ""}, ["--offload-arch=gfx950"])
    assert list(scratch.iterdir()) == []


def test_without_any_compiler_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hip, "ZIG", "ziglang-that-is-not-here")
    monkeypatch.setattr(hiprtc, "find", lambda archs: None)
    hip._hiprtc.cache_clear()
    with pytest.raises(KogcError, match=r"^no compiler for AMD GPUs: pip install 'kogc\[hip\]'.*gfx950") as caught:
        hip.version()
    assert "\n" not in str(caught.value)


def test_the_wheel_still_has_a_clang_for_amd() -> None:
    """`ziglang clang` is a sub-command that its documentation does not speak of."""
    command = [sys.executable, "-m", "ziglang", "clang", "--print-targets"]
    assert "amdgcn" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
