"""The host's C++ compiler: a rendered source becomes a shared library that needs libc and nothing else."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import KogcError
from ..files import write_tree
from ..plan.plan import Plan
from ..render import Rendered
from .process import run

CANDIDATES = ("c++", "g++", "clang++")
ZIG = "zig"  # the kind of compiler that the ziglang wheel brings
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-fno-exceptions", "-fno-rtti",
    # Nothing is fused that the source does not fuse: the same arithmetic gives the same bits in every function it is
    # inlined into, so a token of a pass has those of a token alone.
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ARCH_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", *AVX512),
    "avx512-bf16": ("-mavx2", "-mfma", "-mf16c", *AVX512, "-mavx512bf16"),
}
# zig compiles for the machine at hand unless it is told otherwise, and has names of its own for instruction sets.
ZIG_ARCH_FLAGS = {"avx2": "x86_64_v3", "avx512": "x86_64_v4", "avx512-bf16": "x86_64_v4+avx512bf16"}
SECONDS = 900  # a compile that takes longer is stuck; zig builds its libraries at its first


@dataclass(frozen=True)
class Compiler:
    """A command, and the name and version that it tells."""

    command: tuple[str, ...]
    kind: str
    version: str


def version() -> str:
    """Name and version of the compiler, as they enter cache keys and manifests; KogcError where there is none."""
    return _compiler(os.environ.get("CXX", "")).version


def options(plan: Plan) -> list[str]:
    """Compiler options that change the binary."""
    return _options(_compiler(os.environ.get("CXX", "")), plan.profile.arch)


def compile_binary(rendered: Rendered, plan: Plan) -> bytes:
    """Compile to a shared library. Raises KogcError with the compiler's first error."""
    compiler = _compiler(os.environ.get("CXX", ""))
    with tempfile.TemporaryDirectory(prefix="kogc-") as scratch:
        directory = Path(scratch)
        write_tree(directory, {**rendered.headers, "kernel.cpp": rendered.source})
        # The same names in every directory: nothing in the library tells where it was built.
        command = [*compiler.command, *_options(compiler, plan.profile.arch), "-I.", f"-ffile-prefix-map={scratch}=."]
        result = _run([*command, "kernel.cpp", "-o", "kernel.so"], directory)
        if result.returncode != 0:
            raise KogcError(f"{rendered.name} does not compile with {compiler.version}: {_first_error(result)}")
        library = directory / "kernel.so"
        if not library.is_file():
            raise KogcError(f"{compiler.version} made no library of {rendered.name}: is it a C++ compiler?")
        return library.read_bytes()


def _options(compiler: Compiler, arch: str) -> list[str]:
    if compiler.kind == ZIG:
        target = ["-target", "x86_64-linux-gnu.2.17", f"-mcpu={ZIG_ARCH_FLAGS[arch]}"]
        return [*FLAGS, *target, "-nostdlib++", "-s"]
    # g++ names its C++ library whether or not it is used; --as-needed leaves it out again.
    return [*FLAGS, *ARCH_FLAGS[arch], "-Wl,--as-needed", "-s"]


@functools.cache
def _compiler(chosen: str) -> Compiler:
    """The compiler that $CXX names, or the first that is here."""
    if chosen.strip():
        try:
            command = tuple(shlex.split(chosen))
        except ValueError as error:
            raise KogcError(f"CXX={chosen!r}: {error}") from None
        if found := _ask(command):
            return found
        raise KogcError(f"CXX={chosen!r}: no such compiler")
    for name in CANDIDATES:
        if shutil.which(name) and (found := _ask((name,))):
            return found
    if importlib.util.find_spec("ziglang") and (found := _ask((sys.executable, "-m", "ziglang", "c++"))):
        return found
    raise KogcError("no C++ compiler: install g++ or clang++ (or pip install ziglang), or name one in CXX")


def _ask(command: tuple[str, ...]) -> Compiler | None:
    """What a command says of itself; None where it does not run."""
    try:
        result = _run([*command, "--version"], None)
    except KogcError:
        return None
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        return None
    number = re.search(r"\d+(\.\d+)+[^\s)]*", lines[0])
    words = " ".join(command)
    kind = ZIG if "zig" in words else "clang" if "clang" in lines[0] else "g++"
    return Compiler(command, kind, f"{kind} {number[0] if number else 'unknown'}")


def _run(command: list[str], directory: Path | None) -> subprocess.CompletedProcess[str]:
    done = run(command[0], command, SECONDS, directory)
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(command, done.returncode, out, err)


def _first_error(result: subprocess.CompletedProcess[str]) -> str:
    """The line that says what is wrong; a compiler that was killed says nothing."""
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if "error" in line]
    return (errors or lines or [f"exit status {result.returncode}"])[0].strip()
