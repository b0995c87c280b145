"""Compiles with hipRTC, in a process of its own: an old one ends the process on an architecture that it does not know.

As a module it is that process: a job in JSON on its input, the code object on its output, what is wrong on its errors.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import KogcError
from ..files import write_tree
from .process import run

SECONDS = 900  # a compile that takes longer is stuck
TRIAL = 'extern "C" __attribute__((global)) void trial() {}'


def compile_in_process(name: str, source: str, headers: dict[str, str], options: Sequence[str]) -> bytes:
    """The code object of a source. KogcError with the compiler's first error, or saying that it died."""
    with tempfile.TemporaryDirectory(prefix="kogc-") as scratch:  # made here: a process that dies removes nothing
        write_tree(Path(scratch), headers)
        job = json.dumps({"name": name, "source": source, "options": [*options, f"-I{scratch}"]})
        done = _run(["compile"], job.encode())
    if done.returncode == 0:
        return done.stdout
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if "error" in line] or lines[-1:]
    raise KogcError(f"{name} does not compile with hipRTC: {errors[0] if errors else f'it died ({done.returncode})'}")


def find(archs: Sequence[str]) -> str | None:
    """The version of the hipRTC of this machine; None where there is none that knows all these architectures."""
    if importlib.util.find_spec("hip") is None:
        return None
    try:
        done = _run(["version"], b"")
        if done.returncode != 0:
            return None
        for arch in archs:
            compile_in_process("trial", TRIAL, {}, [f"--offload-arch={arch}"])
    except KogcError:
        return None
    return done.stdout.decode().strip()


def _run(arguments: Sequence[str], job: bytes) -> subprocess.CompletedProcess[bytes]:
    return run("hipRTC", [sys.executable, "-m", __name__, *arguments], SECONDS, job=job)


class _Library:
    """hipRTC through hip-python, with its statuses as errors."""

    def __init__(self) -> None:
        from hip import hiprtc

        self.api: Any = hiprtc

    def call(self, name: str, *args: Any) -> Any:
        status, *values = getattr(self.api, name)(*args)
        if status != self.api.hiprtcResult.HIPRTC_SUCCESS:
            raise RuntimeError(f"error: {name}: {getattr(status, 'name', status)}")
        return values[0] if len(values) == 1 else tuple(values)

    def version(self) -> str:
        major, minor = self.call("hiprtcVersion")
        return f"{major}.{minor}"

    def compile(self, job: dict[str, Any]) -> bytes:
        program = self.call("hiprtcCreateProgram", job["source"].encode(), job["name"].encode(), 0, None, None)
        flags = [option.encode() for option in job["options"]]
        (status,) = self.api.hiprtcCompileProgram(program, len(flags), flags)
        if status != self.api.hiprtcResult.HIPRTC_SUCCESS:
            log = bytearray(self.call("hiprtcGetProgramLogSize", program))
            self.call("hiprtcGetProgramLog", program, log)
            raise RuntimeError(log.decode(errors="replace").rstrip("\0"))
        code = bytearray(self.call("hiprtcGetCodeSize", program))
        self.call("hiprtcGetCode", program, code)
        return bytes(code)


def main() -> int:
    try:
        library = _Library()
        if sys.argv[1:] == ["version"]:
            print(library.version())
        else:
            sys.stdout.buffer.write(library.compile(json.load(sys.stdin)))
    except Exception as error:  # whatever the bindings raise where a library is missing
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
