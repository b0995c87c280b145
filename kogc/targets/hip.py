"""AMD GPUs: a rendered source becomes a code object, by hipRTC where a ROCm has one, else by the clang in a wheel.

Neither a GPU nor ROCm is needed: `ziglang` brings a clang and a linker that know AMD's architectures, and the source
stands on compiler builtins alone (templates/hip/machine.h).
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import tempfile
from pathlib import Path

from ..errors import KogcError
from ..files import write_tree
from ..plan.plan import Plan
from ..profile import HIP_ARCHS
from ..render import Rendered
from . import hiprtc
from .code_object import read_kernels
from .process import run

ZIG = "ziglang"
SECONDS = 900  # a compile that takes longer is stuck
FLAGS = (
    "-std=c++17", "-O3", "-mcode-object-version=5",
    # Constants and addresses are made where they are used: before the layer loop there are too many for the registers.
    "-mllvm", "-disable-machine-licm",
)  # fmt: skip
# A workgroup stays on one compute unit, whose caches see its accesses in order (RDNA4 could spread it over two).
RDNA_FLAGS = ("-mcumode",)
CLANG_FLAGS = (
    "-x", "hip", "--cuda-device-only", "-nogpulib", "-nogpuinc", "-nostdinc", "-fuse-cuid=none",
)  # fmt: skip


def version() -> str:
    """Name and version of the compiler, as they enter cache keys and manifests; KogcError where there is none."""
    if found := _hiprtc():
        return f"hiprtc {found}"
    try:
        return f"{ZIG} {importlib.metadata.version(ZIG)}"
    except importlib.metadata.PackageNotFoundError:
        need = "pip install 'kogc[hip]' (the clang of the ziglang wheel), or a ROCm with hip-python"
        raise KogcError(f"no compiler for AMD GPUs: {need} whose hipRTC knows {', '.join(HIP_ARCHS)}") from None


def options(plan: Plan) -> list[str]:
    """Compiler options that change the binary."""
    arch = plan.profile.arch
    return [f"--offload-arch={arch}", *FLAGS, *(RDNA_FLAGS if plan.profile.lanes == 32 else ())]


def compile_binary(rendered: Rendered, plan: Plan) -> bytes:
    """Compile to a code object. Raises KogcError with the compiler's first error, or naming a kernel that spills."""
    version()
    if _hiprtc():
        binary = hiprtc.compile_in_process(rendered.name, rendered.source, rendered.headers, options(plan))
    else:
        binary = _compile_with_clang(rendered, plan)
    _refuse_spills(binary, rendered.name)
    return binary


def assembly(rendered: Rendered, plan: Plan) -> str:
    """What clang makes of a source, for reading and for tests."""
    with tempfile.TemporaryDirectory(prefix="kogc-") as scratch:
        return _assembly(rendered, plan, Path(scratch)).read_text()


@functools.cache
def _hiprtc() -> str | None:
    return hiprtc.find(HIP_ARCHS)


def _compile_with_clang(rendered: Rendered, plan: Plan) -> bytes:
    """Three steps: clang finds neither the wheel's assembler nor its linker by itself."""
    with tempfile.TemporaryDirectory(prefix="kogc-") as scratch:
        directory = Path(scratch)
        text = _assembly(rendered, plan, directory)
        machine = ["-target", "amdgcn-amd-amdhsa", f"-mcpu={plan.profile.arch}", "-mcode-object-version=5"]
        _zig(["clang", *machine, "-c", "-x", "assembler", text.name, "-o", "kernel.o"], directory, rendered.name)
        _zig(["ld.lld", "-shared", "--no-undefined", "kernel.o", "-o", "kernel.co"], directory, rendered.name)
        return (directory / "kernel.co").read_bytes()


def _assembly(rendered: Rendered, plan: Plan, directory: Path) -> Path:
    write_tree(directory, {**rendered.headers, "kernel.hip": rendered.source})
    # The same names in every directory: nothing in the code object tells where it was built.
    flags = [*CLANG_FLAGS, *options(plan), "-I.", "-S", "kernel.hip", "-o", "kernel.s"]
    _zig(["clang", *flags], directory, rendered.name)
    return directory / "kernel.s"


def _zig(arguments: list[str], directory: Path, name: str) -> None:
    command = [sys.executable, "-m", ZIG, *arguments]
    done = run(ZIG, command, SECONDS, directory)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line] or lines or [f"exit status {done.returncode}"]
        raise KogcError(f"{name} does not compile with {version()}: {errors[0].strip()}")


def _refuse_spills(binary: bytes, name: str) -> None:
    for kernel in read_kernels(binary).values():
        if kernel.spills:
            spilled = f"{kernel.vgpr_spills} vector and {kernel.sgpr_spills} scalar registers spilled"
            at = f"at {kernel.vgprs} and {kernel.sgprs}"
            raise KogcError(f"{name}: {kernel.name} uses {kernel.scratch} bytes of scratch ({spilled}, {at})")
