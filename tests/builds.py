"""Builds for tests: the command line in this process or another, with a compiler that takes no time where asked."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kogc
from kogc import targets
from kogc.cli import cli

TOP = Path(kogc.__file__).parent.parent

# The same stand-in for both ways of running: bytes that depend on the source alone.
STUB = """
import hashlib, time
from kogc import targets
def compile_binary(rendered, plan, cache=None):
    time.sleep({delay})
    return hashlib.sha256(rendered.source.encode()).digest() * 64
targets.compile_binary = compile_binary
targets.compiler = lambda plan: ("stub", "1.0")
"""


def stub_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the compilers, for tests of everything around them."""

    def compile_binary(rendered: Any, plan: Any, cache: Any = None) -> bytes:
        return hashlib.sha256(rendered.source.encode()).digest() * 64

    monkeypatch.setattr(targets, "compile_binary", compile_binary)
    monkeypatch.setattr(targets, "compiler", lambda plan: ("stub", "1.0"))


def kogc_cli(*args: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def process_command(*args: object, stub: bool = False, delay: float = 0.0, before: str = "") -> list[str]:
    """The command line of a kogc process; `before` is Python to run first."""
    code = before + (STUB.format(delay=delay) if stub else "") + "\nfrom kogc.cli import main\nmain()"
    return [sys.executable, "-c", code, *map(str, args)]


def process_env(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "KOGC_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path}


def kogc_process(
    tmp_path: Path, *args: object, stub: bool = False, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = process_command(*args, stub=stub, before=before)
    return subprocess.run(command, capture_output=True, text=True, env=process_env(tmp_path), timeout=120, check=False)


def child_seconds() -> float:
    """Processor time of all finished child processes: what they cost, however busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by its relative name."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def one_line(text: str) -> str:
    """The single line of an error; fails where there is more or less."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("kogc: ")
    return lines[0]
