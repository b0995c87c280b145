"""Host to device through two pinned buffers: one is filled while the other is copied from."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from ..errors import KogcError
from .cuda_driver import Driver

CHUNK_BYTES = 32 << 20
READERS = 4  # one thread copies out of the page cache at half of what the bus takes


class Uploader:
    """Copies to device memory on a stream of its own. `close` waits for the copies and frees the buffers."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._chunk = CHUNK_BYTES
        self._stream = driver.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._addresses: list[int] = []
        self._events: list[Any] = []
        for _ in range(2):
            self._addresses.append(int(driver.call("cuMemHostAlloc", self._chunk, 0)))
            self._events.append(driver.call("cuEventCreate", driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._turn = 0

    def copy_file(self, target: int, path: Path, count: int) -> None:
        """Copy the first `count` bytes of a file to device address `target`.

        KogcError where it cannot be read or ends early.
        """
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise KogcError(f"{path}: {error.strerror}") from None
        try:
            with ThreadPoolExecutor(READERS) as pool:
                for start in range(0, count, self._chunk):
                    size = min(self._chunk, count - start)
                    address, event = self._addresses[self._turn], self._events[self._turn]
                    self._driver.call("cuEventSynchronize", event)  # until the last copy from this buffer is through
                    into = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
                    starts = range(0, size, -(-size // READERS))
                    parts = [into[a : a + starts.step] for a in starts]
                    list(pool.map(read_exactly, repeat(file), parts, [start + a for a in starts], repeat(path)))
                    self._driver.call("cuMemcpyHtoDAsync", target + start, address, size, self._stream)
                    self._driver.call("cuEventRecord", event, self._stream)
                    self._turn = 1 - self._turn
        finally:
            os.close(file)

    def finish(self) -> None:
        """Wait for every copy; KogcError if one failed."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        self._driver.attempt("cuStreamSynchronize", self._stream)
        for address in self._addresses:
            self._driver.attempt("cuMemFreeHost", address)
        for event in self._events:
            self._driver.attempt("cuEventDestroy", event)
        self._driver.attempt("cuStreamDestroy", self._stream)
        self._addresses, self._events = [], []


def read_exactly(file: int, into: memoryview, offset: int, path: Path) -> None:
    """Fill `into` from byte `offset` of an open file; KogcError naming `path` where it ends early."""
    done = 0
    while done < len(into):
        try:
            got = os.preadv(file, [into[done:]], offset + done)
        except OSError as error:
            raise KogcError(f"{path}: {error.strerror}") from None
        if got == 0:
            raise KogcError(f"{path}: ends at byte {offset + done}, too early; rebuild the artifact")
        done += got
