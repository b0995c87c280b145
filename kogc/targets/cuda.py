"""NVRTC: a rendered source becomes a cubin, with no GPU, driver or toolkit on the machine."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

from ..errors import KogcError
from ..plan.plan import Plan
from ..render import Rendered


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        _call(nvrtc, nvrtc.nvrtcVersion)
    except (ImportError, RuntimeError) as error:
        raise KogcError(f"NVRTC is not usable ({error}): pip install cuda-bindings nvidia-cuda-nvrtc") from None
    return nvrtc


def _call(nvrtc: Any, function: Any, *args: Any) -> Any:
    status, *values = function(*args)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KogcError(f"{function.__name__}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else values


def version() -> str:
    """NVRTC's version, as it enters cache keys and manifests."""
    nvrtc = _nvrtc()
    major, minor = _call(nvrtc, nvrtc.nvrtcVersion)
    return f"nvrtc {major}.{minor}"


def options(plan: Plan) -> list[str]:
    """Compiler options that change the binary."""
    return [f"--gpu-architecture={plan.profile.arch}", "--std=c++17", "--ptxas-options=-v"]


def compile_binary(rendered: Rendered, plan: Plan) -> bytes:
    """Compile to a cubin. Raises KogcError with the compiler's first error, or naming a kernel that spills."""
    cubin, log = compile_logged(rendered, plan)
    _refuse_spills(log, rendered.name)
    return cubin


def compile_logged(rendered: Rendered, plan: Plan) -> tuple[bytes, str]:
    """The cubin, and what the compiler says of its kernels (see resource_usage)."""
    nvrtc = _nvrtc()
    names = list(rendered.headers)
    program = _call(
        nvrtc,
        nvrtc.nvrtcCreateProgram,
        rendered.source.encode(),
        rendered.name.encode(),
        len(names),
        [rendered.headers[n].encode() for n in names],
        [n.encode() for n in names],
    )
    try:
        with tempfile.TemporaryDirectory() as bundled:
            flags = [o.encode() for o in options(plan)] + [
                f"--include-path={d}".encode() for d in _include_directories(nvrtc, Path(bundled))
            ]
            status = nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]
        log = _log(nvrtc, program)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KogcError(f"{rendered.name} does not compile: {_first_error(log)}")
        cubin: bytes = b" " * _call(nvrtc, nvrtc.nvrtcGetCUBINSize, program)
        _call(nvrtc, nvrtc.nvrtcGetCUBIN, program, cubin)
        return cubin, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def resource_usage(log: str) -> dict[str, dict[str, int]]:
    """Stack and spill bytes of each kernel and each function that it calls, and the kernels' registers: a ptxas log."""
    usage: dict[str, dict[str, int]] = {}
    kernel = ""
    for line in log.splitlines():
        if entry := re.search(r"(?:Compiling entry function '|Function properties for )(\w+)", line):
            kernel = entry[1]
            usage.setdefault(kernel, {})
        elif spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usage[kernel] |= {"stack": int(spill[1]), "spill_stores": int(spill[2]), "spill_loads": int(spill[3])}
        elif registers := re.search(r"Used (\d+) registers", line):
            usage[kernel]["registers"] = int(registers[1])
    return usage


def _refuse_spills(log: str, name: str) -> None:
    for kernel, used in resource_usage(log).items():
        if used.get("stack") or used.get("spill_stores"):
            registers = f" at {used['registers']} registers" if "registers" in used else ""
            spilled = f"{used['stack']} bytes of local memory ({used['spill_stores']} spilled)"
            raise KogcError(f"{name}: {kernel} uses {spilled}{registers}")


def _log(nvrtc: Any, program: Any) -> str:
    log: bytes = b" " * _call(nvrtc, nvrtc.nvrtcGetProgramLogSize, program)
    _call(nvrtc, nvrtc.nvrtcGetProgramLog, program, log)
    return log.decode(errors="replace").rstrip("\0")


def _first_error(log: str) -> str:
    """The line that says what is wrong."""
    lines = log.strip().splitlines()
    errors = [line for line in lines if "error" in line]
    return (errors or lines or ["NVRTC gives no reason"])[0].strip()


def _include_directories(nvrtc: Any, scratch: Path) -> list[Path]:
    """Where cuda_fp16.h and cuda_bf16.h lie: the runtime wheel, or the headers that newer NVRTCs carry inside."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found:
        return [Path(found)]
    install = getattr(nvrtc, "nvrtcInstallBundledHeaders", None)
    if install is None:
        raise KogcError("cuda_bf16.h not found: pip install nvidia-cuda-runtime")
    _call(nvrtc, install, str(scratch).encode(), 0)
    return [scratch]
