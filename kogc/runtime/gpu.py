"""What the runtimes of all GPUs do alike: load the binary and the weights, launch, and follow the launch."""

from __future__ import annotations

import contextlib
import ctypes
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import KogcError
from ..plan.passes import MEETING_BYTES
from ..plan.plan import Plan
from ..sampling import MAX_BIAS
from . import HostWords, Kernel, Program, Runtime, trace_bytes
from .args import BIAS_BYTES, KernelArgs, split_prompt
from .gpu_driver import GpuDriver

GENERATE, PROMPT, SAMPLES = b"kogc_generate", b"kogc_prompt", b"kogc_samples"
FILL, READ_CEILING = b"kogc_fill", b"kogc_read_ceiling"
FILL_BLOCKS, FILL_THREADS = 1024, 256
CEILING_REPEATS = 4
READ_PASSES = 4  # of kogc_read_ceiling over its bytes, in one launch
CACHE_MULTIPLE = 8  # bytes read for the ceiling, at least, in cache sizes
SPARE_BYTES = 256 << 20  # what a launch, the logits of a chunk and the driver may still need


class GpuRuntime(Runtime):
    """See Runtime. `driver` has opened the GPU, of that name and so many units, which the plan was made for."""

    def __init__(self, program: Program, driver: GpuDriver, name: str, units: int) -> None:
        super().__init__(program)
        self._driver, self._gpu_name, self._units = driver, name, units
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _copy_weights(self, source: Path) -> None:
        """Copy the weights' file to the device."""

    # -- loading

    def _open(self) -> None:
        self._check_memory()
        self.kernel = self._load(self.plan, self._read_binary(), str(self.program.binary))
        self._stream = self._driver.stream()
        self._before, self._after = self._driver.event(), self._driver.event()
        self._allocate()
        if self.program.weights is None:
            self.fill_dummy()
        else:
            self._copy_weights(self.program.weights)
        self._driver.await_stream(self._stream)

    def _check_memory(self) -> None:
        free, total = self._driver.memory()
        plan = self.plan
        need = self.program.weights_bytes + plan.kv_bytes + self.program.rope.nbytes + plan.exchanges.bytes
        need += SPARE_BYTES + (plan.passes.scratch_bytes if plan.passes else 0)
        if need > free:
            sizes = f"{need / 1e9:.1f} GB of GPU memory; {free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
            advice = "free some, or rebuild with a smaller --max-context"
            raise KogcError(f"{plan.spec.name} with a context of {plan.max_context} needs {sizes}: {advice}")

    def _read_binary(self) -> bytes:
        path = self.program.binary
        try:
            return path.read_bytes()
        except OSError as error:
            raise KogcError(f"{path}: {error.strerror}") from None

    def load_kernel(self, plan: Plan, image: bytes) -> Kernel:
        self._driver.use()
        return self._load(plan, image, f"a variant of {self.program.binary}")

    def _load(self, plan: Plan, image: bytes, name: str) -> Kernel:
        module = self._driver.load(image, name)
        functions = {FILL: self._driver.function(module, FILL, name)}
        shapes = {GENERATE: (plan.threads, plan.memory.bytes), READ_CEILING: (plan.threads, plan.memory.bytes)}
        if plan.passes:
            shapes[PROMPT] = plan.passes.threads, plan.passes.memory_bytes
        if plan.samples:
            shapes[SAMPLES] = plan.samples.threads, plan.samples.memory_bytes
        for function, (threads, shared) in shapes.items():
            functions[function] = self._driver.function(module, function, name)
            self._check_resident(plan, functions[function], threads, shared, name)
        return Kernel(plan, functions)

    def _check_resident(self, plan: Plan, function: Any, threads: int, shared: int, name: str) -> None:
        """All blocks wait for each other, so all must be on the device at once."""
        fit = self._driver.blocks_of(function, threads, shared) * self._units
        if fit < plan.blocks:
            room = f"{fit} blocks of this kernel fit {self._gpu_name}, it has {plan.blocks}"
            advice = f"rebuild with --blocks {fit} or fewer" if fit else "rebuild the artifact"
            raise KogcError(f"{name}: {room}; {advice}")

    def _allocate(self) -> None:
        driver, plan, rope = self._driver, self.plan, np.ascontiguousarray(self.program.rope, np.float32)
        self._weights = driver.alloc(self.program.weights_bytes)
        self._kv = driver.alloc(plan.kv_bytes)
        self._rope = driver.alloc(rope.nbytes)
        self._grown: dict[str, tuple[int, int]] = {}  # buffers that grow with what is asked for: address, bytes
        self._fit(plan)
        self._scratch = 0
        if plan.passes:
            self._scratch = driver.alloc(plan.passes.scratch_bytes)
            driver.clear(self._scratch, plan.passes.scratch_bytes)
        self._prompt = driver.alloc(plan.max_context * 4)
        self._bias = driver.alloc(MAX_BIAS * BIAS_BYTES)
        self._shared: dict[str, tuple[int, int, int]] = {}  # the same, in pinned memory: address here, there, bytes
        driver.clear(self._kv, plan.kv_bytes)
        driver.to_device(self._rope, rope)
        size = HostWords.bytes(plan.max_context)
        address, self._words_on_device = driver.share(size)
        self.words = HostWords((ctypes.c_char * size).from_address(address), plan.max_context)

    def _fit(self, plan: Plan) -> None:
        self._driver.use()
        self._exchange = self._grow("exchange", plan.exchanges.bytes, "the exchanges")
        self._trace = self._grow("trace", trace_bytes(plan), "a trace") if plan.trace_events else 0

    def _share_records(self, words: int) -> tuple[NDArray[np.int32], int]:
        buffer, there = self._share("records", 4 * words)
        return np.frombuffer(buffer, np.int32), there

    def _grow(self, name: str, count: int, what: str) -> int:
        """A buffer of at least so many bytes, zero where nothing was ever written. KogcError where memory is short."""
        address, size = self._grown.get(name, (0, 0))
        if size >= count:
            return address
        free, total = self._driver.memory()
        if count - size + SPARE_BYTES > free:
            have = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
            raise KogcError(
                f"{what} need {count / 1e9:.1f} GB of GPU memory more; {have}: ask for fewer, or shorter ones"
            )
        if address:
            del self._grown[name]
            self._driver.free(address)
        address = self._driver.alloc(count)
        self._grown[name] = address, count
        self._driver.clear(address, count, self._stream)  # before whatever is launched next
        return address

    def _share(self, name: str, count: int) -> tuple[Any, int]:
        """Pinned memory of at least so many bytes, as a buffer, and its address on the device."""
        self._driver.use()
        here, there, size = self._shared.get(name, (0, 0, 0))
        if size < count:
            if here:
                del self._shared[name]
                self._driver.free(here)
            here, there = self._driver.share(count)
            self._shared[name] = here, there, count
        return (ctypes.c_char * count).from_address(here), there

    # -- launching

    def _launch(self, args: KernelArgs, prompt: NDArray[np.int32], logits: bool, bias: NDArray[np.int32]) -> None:
        driver, plan = self._driver, self.plan
        driver.use()
        args.logits = self._logits_buffer(args.n_prompt) if logits else 0
        self._give(args, prompt, bias)
        driver.clear(self._exchange, plan.exchanges.bytes, self._stream)
        if plan.trace_events:
            driver.clear(self._trace, trace_bytes(plan), self._stream)
        with self._timed():
            if plan.passes and not logits and args.n_prompt > 1:
                self._start_passes(args)
            self._start(GENERATE, plan.threads, plan.memory.bytes, args)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Around what a launch starts, which is waited for even where only a part of it could be started."""
        self._driver.record(self._before, self._stream)
        self._running = True
        try:
            yield
        finally:
            self._driver.record(self._after, self._stream)

    def _give(self, args: KernelArgs, prompt: NDArray[np.int32], bias: NDArray[np.int32]) -> None:
        """Copy the prompt, which begins with the history, and the bias to the device, and point to them."""
        args.prompt = self._prompt + prompt.itemsize * args.n_history
        args.bias = self._bias
        self._given = prompt, bias  # they stay until the next launch: the copies may only have been begun
        self._driver.to_device(self._prompt, prompt, self._stream)
        if bias.size:
            self._driver.to_device(self._bias, bias, self._stream)

    def _start_passes(self, args: KernelArgs) -> None:
        """Launch the passes over all of the prompt but its last token, and leave that to the launch that follows."""
        passes = self.plan.passes
        assert passes
        first = split_prompt(args, self.plan.spec.vocab)
        self._driver.clear(self._scratch, MEETING_BYTES, self._stream)
        self._start(PROMPT, passes.threads, passes.memory_bytes, first)

    def _start(self, function: bytes, threads: int, shared: int, *values: Any) -> None:
        """Launch a kernel whose blocks wait for each other."""
        shape = self.plan.blocks, threads, shared
        self._driver.launch(self.kernel.module[function], shape, self._stream, *values)

    def _done(self) -> bool:
        self._driver.use()
        status = self._driver.status(self._after)
        if status == self._driver.not_ready:
            return False
        if status != self._driver.good:
            raise KogcError(f"the kernel failed: {self._driver.name_of(status)}; load the artifact again")
        return True

    def _wait(self) -> None:
        self._driver.use()
        while (status := self._driver.status(self._after)) == self._driver.not_ready:
            time.sleep(self.poll_seconds)
        if status == self._driver.good:
            self.last_timing = self._driver.milliseconds(self._before, self._after)

    def _pointers(self) -> dict[str, int]:
        operands = {o.name: self._weights + o.offset for o in self.program.operands if o.name != "inv_freq"}
        caches = {"rope": self._rope, "kv": self._kv, "exchange": self._exchange, "scratch": self._scratch}
        if self.plan.trace_events:
            caches["trace"] = self._trace
        return operands | caches | HostWords.pointers(self._words_on_device)

    # -- around a launch

    def upload(self, offset: int, data: memoryview) -> None:
        self._driver.use()
        self._driver.to_device(self._weights + offset, np.frombuffer(data, np.uint8))

    def write_kv(self, offset: int, data: memoryview) -> None:
        self._driver.use()
        self._driver.await_stream(self._stream)
        self._driver.to_device(self._kv + offset, np.frombuffer(data, np.uint8))

    def download(self, name: str, offset: int, count: int) -> NDArray[np.uint8]:
        return self._read(np.empty(count, np.uint8), self._address(name) + offset)

    def read_trace(self) -> NDArray[np.uint64]:
        return self._read(np.empty((self.plan.blocks, 1 + self.plan.trace_events), np.uint64), self._trace)

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        return self._read(np.empty((rows, self.plan.spec.vocab), np.float32), self._logits)

    def _read(self, out: NDArray[Any], address: int) -> NDArray[Any]:
        """Fill `out` from the device, after all that is under way."""
        self._driver.use()
        self._driver.await_stream(self._stream)
        self._driver.to_host(out, address)
        return out

    def _logits_buffer(self, rows: int) -> int:
        self._logits = self._grow("logits", rows * self.plan.spec.vocab * 4, f"logits of {rows} tokens")
        return self._logits

    def _fill(self, name: str, offset: int, count: int, seed: int, amplitude: float, fp16: bool) -> None:
        self._driver.use()
        values = (
            ctypes.c_uint64(self._address(name) + offset), ctypes.c_uint64(count), ctypes.c_uint32(seed),
            ctypes.c_float(amplitude), ctypes.c_int32(fp16),
        )  # fmt: skip
        shape = FILL_BLOCKS, FILL_THREADS, 0
        self._driver.launch(self.kernel.module[FILL], shape, self._stream, *values, together=False)

    def _address(self, name: str) -> int:
        return self._kv if name == "kv" else self._weights + self.program.operand(name).offset

    def read_bandwidth(self) -> float:
        self._driver.use()
        plan, least = self.plan, CACHE_MULTIPLE * self.plan.profile.l2_bytes
        address, count, scratch = self._address("slabs"), self.program.operand("slabs").bytes, 0
        if count < least:  # would be read from the cache: read something larger
            address = scratch = self._driver.alloc(least)
            count = least
        round_ = plan.blocks * plan.knobs.stage_bytes * plan.knobs.in_flight  # the kernel reads these in whole
        count = count // round_ * round_
        sink = self._driver.alloc(4)
        values = ctypes.c_uint64(address), ctypes.c_uint64(count), ctypes.c_uint64(sink)
        try:
            best = min(self._time_read(*values) for _ in range(CEILING_REPEATS))
        finally:
            self._driver.free(sink)
            if scratch:
                self._driver.free(scratch)
        return READ_PASSES * count / (best / 1e3)

    def _time_read(self, *values: Any) -> float:
        """Milliseconds of kogc_read_ceiling over its bytes; its blocks do not wait for each other."""
        driver, shape = self._driver, (self.plan.blocks, self.plan.threads, self.plan.memory.bytes)
        driver.record(self._before, self._stream)
        driver.launch(self.kernel.module[READ_CEILING], shape, self._stream, *values, together=False)
        driver.record(self._after, self._stream)
        driver.await_event(self._after)
        return driver.milliseconds(self._before, self._after)

    def _free(self) -> None:
        self._driver.close()
