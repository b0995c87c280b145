"""The CPU runtime: a shared library with a thread for every block, weights mapped from the file."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import KogcError
from ..plan.plan import Plan
from . import HostWords, Kernel, Program, Runtime, trace_bytes
from .args import KernelArgs, split_prompt

CEILING_REPEATS = 5
CEILING_BYTES = 512 << 20  # at least: more than the caches of a server hold
START_SECONDS = 1.0  # a thread that was started has begun by then
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by Python 3.11


class CpuRuntime(Runtime):
    """See Runtime. With `oversubscribe`, more blocks than cores are allowed: correct, and very slow."""

    # The kernel occupies every core; a host that wakes more often would delay the block beside it.
    poll_seconds = 500e-6

    def __init__(self, program: Program, oversubscribe: bool = False) -> None:
        super().__init__(program)
        _check_cpu(program, oversubscribe)
        self.kernel = Kernel(self.plan, _open_library(program.binary))
        self._rope = np.ascontiguousarray(program.rope, np.float32)
        self._exchange = self._trace = _aligned(0)
        assert self.plan.cpu_passes
        self._pass_exchange = _aligned(self.plan.cpu_passes.tokens * self.plan.cpu_passes.exchange_bytes)
        self._fit(self.plan)
        self._kv = _anonymous(self.plan.kv_bytes)
        self._words = _aligned(HostWords.bytes(self.plan.max_context))
        self.words = HostWords(self._words, self.plan.max_context)
        self._thread: threading.Thread | None = None
        self._finished = threading.Event()  # set when the thread has: a Thread forgets itself in an interrupted join
        self._status = 0
        self._logits: NDArray[np.float32] = np.empty((0, self.plan.spec.vocab), np.float32)
        self._record_words: NDArray[np.int32] = np.empty(0, np.int32)
        self._load_weights()

    def _load_weights(self) -> None:
        source = self.program.weights
        if source is not None:
            self._weights = _map_file(source, self.program.weights_bytes)
        else:
            self._weights = _anonymous(self.program.weights_bytes)
            self.fill_dummy()

    def upload(self, offset: int, data: memoryview) -> None:
        self._weights[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def write_kv(self, offset: int, data: memoryview) -> None:
        self._kv[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def load_kernel(self, plan: Plan, image: bytes) -> Kernel:
        with tempfile.TemporaryDirectory(prefix="kogc-") as scratch:  # a loaded library outlives its file
            path = Path(scratch) / self.program.binary.name
            path.write_bytes(image)
            return Kernel(plan, _open_library(path))

    def _fit(self, plan: Plan) -> None:
        if len(self._exchange) < plan.exchanges.bytes:
            self._exchange = _aligned(plan.exchanges.bytes)
        if len(self._trace) < trace_bytes(plan):
            self._trace = _aligned(trace_bytes(plan))

    def read_trace(self) -> NDArray[np.uint64]:
        words: NDArray[np.uint64] = self._trace[: trace_bytes(self.plan)].view(np.uint64)
        return np.array(words.reshape(self.plan.blocks, 1 + self.plan.trace_events))

    @property
    def _library(self) -> Any:
        return self.kernel.module

    # -- launching

    def _share_records(self, words: int) -> tuple[NDArray[np.int32], int]:
        if self._record_words.size < words:
            self._record_words = np.empty(words, np.int32)
        return self._record_words, self._record_words.ctypes.data

    def _launch(self, args: KernelArgs, prompt: NDArray[np.int32], logits: bool, bias: NDArray[np.int32]) -> None:
        self._exchange[:] = 0
        self._trace[:] = 0
        prompt, library = np.ascontiguousarray(prompt), self._library
        if logits:
            self._logits = np.empty((args.n_prompt, self.plan.spec.vocab), np.float32)
        args.prompt = prompt.ctypes.data + prompt.itemsize * args.n_history
        args.bias = bias.ctypes.data
        args.logits = self._logits.ctypes.data if logits else 0
        launches = [(library.kogc_generate, args)]
        if args.n_prompt > 1:
            launches.insert(0, (library.kogc_prompt, self._passes_of(args)))

        finished = self._finished = threading.Event()

        def work() -> None:
            before = time.perf_counter()
            self._status = 0
            for launch, its in launches:
                self._status = self._status or int(launch(ctypes.byref(its)))
            self.last_timing = (time.perf_counter() - before) * 1e3
            prompt.flags.writeable = bias.flags.writeable = False  # the closure keeps both alive until here
            finished.set()

        self._thread = threading.Thread(target=work, name="kogc", daemon=True)
        self._running = True
        try:
            self._thread.start()
        except RuntimeError as error:
            self._running = False
            raise KogcError(f"no thread for the kernel: {error}") from None

    def _passes_of(self, args: KernelArgs) -> KernelArgs:
        self._pass_exchange[:] = 0
        first = split_prompt(args, self.plan.spec.vocab)
        first.exchange = self._pass_exchange.ctypes.data
        return first

    def _done(self) -> bool:
        if not self._finished.is_set():
            return False
        if self._status != 0:
            raise KogcError(f"the kernel failed with status {self._status}; load the artifact again")
        return True

    def _wait(self) -> None:
        while not self._finished.wait(START_SECONDS):
            if self._thread is None or self._thread.ident is None:  # an interrupt came before it was started
                return

    def _pointers(self) -> dict[str, int]:
        base = self._weights.ctypes.data
        operands = {o.name: base + o.offset for o in self.program.operands if o.name != "inv_freq"}
        caches = {"rope": self._rope.ctypes.data, "kv": self._kv.ctypes.data, "exchange": self._exchange.ctypes.data}
        if self.plan.trace_events:
            caches["trace"] = self._trace.ctypes.data
        return operands | caches | HostWords.pointers(self._words.ctypes.data)

    # -- around a launch

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        return self._logits[:rows]

    def _fill(self, name: str, offset: int, count: int, seed: int, amplitude: float, fp16: bool) -> None:
        self._library.kogc_fill(self._view(name, offset, 2 * count).ctypes.data, count, seed, amplitude, int(fp16))

    def _view(self, name: str, offset: int, count: int) -> NDArray[np.uint8]:
        if name == "kv":
            return self._kv[offset : offset + count]
        start = self.program.operand(name).offset + offset
        return self._weights[start : start + count]

    def download(self, name: str, offset: int, count: int) -> NDArray[np.uint8]:
        return np.array(self._view(name, offset, count))

    def read_bandwidth(self) -> float:
        memory = self._view("slabs", 0, self.program.operand("slabs").bytes)
        if len(memory) < CEILING_BYTES:
            memory = _anonymous(CEILING_BYTES)
            memory[:] = 1  # untouched pages would all be the one page of zeros
        best = min(self._time_read(memory.ctypes.data, len(memory)) for _ in range(CEILING_REPEATS))
        return len(memory) / best

    def _time_read(self, address: int, count: int) -> float:
        before = time.perf_counter()
        self._library.kogc_read_ceiling(address, count, self.plan.blocks)
        return time.perf_counter() - before

    def _free(self) -> None:
        empty = np.empty(0, np.uint8)
        self._weights = self._kv = self._exchange = self._pass_exchange = empty  # unmaps with the last reference


def _check_cpu(program: Program, oversubscribe: bool) -> None:
    """KogcError where this machine lacks an instruction set or has fewer cores than the plan has blocks."""
    from ..targets.cpu_features import cpu_features

    profile = program.plan.profile
    missing = sorted(set(profile.flags) - set(cpu_features()))
    if missing:
        raise KogcError(f"built for {profile.name}; this CPU has no {', '.join(missing)}: rebuild with --gpu auto")
    cores = len(os.sched_getaffinity(0))
    if program.plan.blocks > cores and not oversubscribe:
        has = f"this process may use {cores} core{'s' if cores != 1 else ''}"
        raise KogcError(f"built for {program.plan.blocks} cores; {has}: rebuild with --gpu auto")


def _open_library(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path.resolve()))
        for launch in (library.kogc_generate, library.kogc_prompt):
            launch.argtypes = [ctypes.POINTER(KernelArgs)]
            launch.restype = ctypes.c_int
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        library.kogc_fill.argtypes = [pointer, u64, ctypes.c_uint32, ctypes.c_float, ctypes.c_int32]
        library.kogc_fill.restype = None
        library.kogc_read_ceiling.argtypes = [pointer, u64, ctypes.c_int]
        library.kogc_read_ceiling.restype = None
    except (OSError, AttributeError) as error:
        raise KogcError(f"{path}: the system does not load it ({error}); rebuild with --gpu auto") from None
    return library


def _anonymous(count: int) -> NDArray[np.uint8]:
    """Zeroed memory, in huge pages where the system has them: a slab is read faster with fewer translations."""
    try:
        memory = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        raise KogcError(f"no memory for {count / 1e9:.1f} GB ({error.strerror})") from None
    _advise(memory, "MADV_HUGEPAGE")
    return np.frombuffer(memory, np.uint8, count)


def _map_file(path: Path, count: int) -> NDArray[np.uint8]:
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise KogcError(f"{path}: {error}") from None
    if len(memory) < count:
        raise KogcError(f"{path}: {len(memory)} bytes, too few; rebuild the artifact")
    for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
        _advise(memory, advice)
    return np.frombuffer(memory, np.uint8, count)


def _advise(memory: mmap.mmap, advice: str) -> None:
    """Best effort: a system without the advice serves the memory all the same."""
    value = getattr(mmap, advice, None)
    if value is None:
        return
    with contextlib.suppress(OSError):
        memory.madvise(value)


def _aligned(count: int) -> NDArray[np.uint8]:
    """Zeroed bytes that start at a page; a process that forks gets its own."""
    memory = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8, count)
