"""A compiler at work: a program of its own, that ends with us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import KogcError

PATIENCE = 2.0  # seconds for a compiler to remove its files when it is told to end


def run(
    name: str, command: Sequence[str], seconds: float, directory: Path | None = None, job: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end, `job` at its stdin. KogcError, with its name, where it does not start or takes too long.

    Whatever ends the wait ends the command as well, with the processes that it has started: a driver such as g++ leaves
    its compiler behind when it is killed, and a signal to this process alone would not reach either.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise KogcError(f"{name}: {error}") from None
    try:
        out, err = process.communicate(job, timeout=seconds)
    except BaseException as error:
        _end(process)
        if isinstance(error, OSError | subprocess.TimeoutExpired):
            raise KogcError(f"{name}: {error}") from None
        raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell the whole group to end, then end it: who does not listen would keep the pipes open."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    process.communicate()  # closes the pipes
