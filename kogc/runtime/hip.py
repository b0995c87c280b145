"""The HIP runtime: checks the device, loads the code object and the weights, launches, and follows the launch.

It has never run on an AMD GPU: what is tested is that it calls hip-python as it is documented, on a stand-in.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import KogcError
from ..plan.plan import Plan
from ..sampling import MAX_BIAS
from . import HostWords, Kernel, Program, Runtime, trace_bytes
from .args import BIAS_BYTES, KernelArgs
from .hip_driver import Hip, check_gpu, open_gpu

GENERATE, FILL, READ_CEILING = b"kogc_generate", b"kogc_fill", b"kogc_read_ceiling"
FILL_BLOCKS, FILL_THREADS = 1024, 256
UPLOAD_BYTES = 64 << 20  # of the weights file at a time
CEILING_REPEATS = 4
READ_PASSES = 4  # of kogc_read_ceiling over its bytes, in one launch
CACHE_MULTIPLE = 8  # bytes read for the ceiling, at least, in cache sizes
SPARE_BYTES = 256 << 20  # what a launch, the logits of a chunk and the driver may still need


class HipRuntime(Runtime):
    """See Runtime. `device` counts the visible GPUs from 0."""

    def __init__(self, program: Program, device: int = 0) -> None:
        super().__init__(program)
        self._undo: list[Callable[[], None]] = []  # what close() does, last first
        self._hip = Hip()
        self._gpu = open_gpu(self._hip, device)
        check_gpu(self._gpu, self.plan)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # -- loading

    def _open(self) -> None:
        self._use_device()
        self._check_memory()
        self.kernel = self._load(self.plan, self._read_binary(), str(self.program.binary))
        self._stream = self._hip.call("hipStreamCreateWithFlags", self._hip.hipStreamNonBlocking)
        self._undo.append(lambda: self._hip.attempt("hipStreamDestroy", self._stream))
        self._before, self._after = (self._event() for _ in range(2))
        self._allocate()
        self._load_weights()

    def _use_device(self) -> None:
        # The current device is a thread's own, and a session may move between threads.
        self._hip.call("hipSetDevice", self._gpu.index)

    def _check_memory(self) -> None:
        free, total = self._hip.call("hipMemGetInfo")
        plan = self.plan
        need = self.program.weights_bytes + plan.kv_bytes + self.program.rope.nbytes + plan.exchanges.bytes
        need += SPARE_BYTES
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
        self._use_device()
        return self._load(plan, image, f"a variant of {self.program.binary}")

    def _load(self, plan: Plan, image: bytes, name: str) -> Kernel:
        hip, good = self._hip, self._hip.hipError_t.hipSuccess
        status, module = hip.hipModuleLoadData(image)
        if status != good:
            raise KogcError(f"{name}: HIP does not load it ({hip.name_of(status)}); rebuild the artifact")
        self._undo.append(lambda: hip.attempt("hipModuleUnload", module))
        functions = {}
        for function in (GENERATE, FILL, READ_CEILING):
            status, functions[function] = hip.hipModuleGetFunction(module, function)
            if status != good:
                raise KogcError(f"{name}: has no {function.decode()}; rebuild the artifact")
        self._check_resident(plan, functions[GENERATE], name)
        return Kernel(plan, functions)

    def _check_resident(self, plan: Plan, function: Any, name: str) -> None:
        """All blocks wait for each other, so all must be on the device at once; a plain launch does not see to it."""
        ask = "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor"
        each = self._hip.call(ask, function, plan.profile.threads, plan.memory.bytes)
        if each * self._gpu.units < plan.blocks:
            room = f"{each * self._gpu.units} blocks of this kernel fit {self._gpu.name}, it has {plan.blocks}"
            raise KogcError(f"{name}: {room}; rebuild with --blocks {each * self._gpu.units} or fewer")

    def _event(self) -> Any:
        event = self._hip.call("hipEventCreate")
        self._undo.append(lambda: self._hip.attempt("hipEventDestroy", event))
        return event

    def _allocate(self) -> None:
        plan, rope = self.plan, np.ascontiguousarray(self.program.rope, np.float32)
        self._weights = self._alloc(self.program.weights_bytes)
        self._kv = self._alloc(plan.kv_bytes)
        self._rope = self._alloc(rope.nbytes)
        self._exchange, self._exchange_bytes = 0, 0
        self._trace, self._trace_bytes = 0, 0
        self._fit(plan)
        self._prompt = self._alloc(plan.max_context * 4)
        self._bias = self._alloc(MAX_BIAS * BIAS_BYTES)
        self._records_address, self._record_words = 0, 0
        self._logits, self._logits_bytes = 0, 0
        self._hip.call("hipMemset", self._kv, 0, plan.kv_bytes)
        self._to_device(self._rope, rope)
        size = HostWords.bytes(plan.max_context)
        address, self._words_on_device = self._share(size)
        self.words = HostWords((ctypes.c_char * size).from_address(address), plan.max_context)

    def _alloc(self, count: int) -> int:
        memory = self._hip.call("hipMalloc", count)
        self._undo.append(lambda: self._hip.attempt("hipFree", memory))
        return int(memory)

    def _share(self, count: int) -> tuple[int, int]:
        """Pinned memory that the kernel writes and the host reads meanwhile: its address here, and on the device."""
        hip = self._hip
        memory = hip.call("hipHostMalloc", count, hip.hipHostMallocMapped | hip.hipHostMallocCoherent)
        self._undo.append(lambda: hip.attempt("hipHostFree", memory))
        return int(memory), int(hip.call("hipHostGetDevicePointer", memory, 0))

    def _share_records(self, words: int) -> tuple[NDArray[np.int32], int]:
        self._use_device()
        if words > self._record_words:
            address, self._records_address = self._share(4 * words)
            buffer: Any = (ctypes.c_char * (4 * words)).from_address(address)
            self._records_here, self._record_words = np.frombuffer(buffer, np.int32), words
        return self._records_here, self._records_address

    def _fit(self, plan: Plan) -> None:
        self._use_device()
        if plan.exchanges.bytes > self._exchange_bytes:
            self._exchange, self._exchange_bytes = self._alloc(plan.exchanges.bytes), plan.exchanges.bytes
        if trace_bytes(plan) > self._trace_bytes:
            self._trace, self._trace_bytes = self._alloc(trace_bytes(plan)), trace_bytes(plan)

    def _load_weights(self) -> None:
        source, size = self.program.weights, self.program.weights_bytes
        if source is None:
            self.fill_dummy()
            self._hip.call("hipStreamSynchronize", self._stream)
            return
        try:
            file = np.memmap(source, np.uint8, "r", shape=(size,))
        except (OSError, ValueError) as error:
            raise KogcError(f"{source}: {error}; rebuild the artifact") from None
        for start in range(0, size, UPLOAD_BYTES):
            self._to_device(self._weights + start, file[start : start + UPLOAD_BYTES])

    def upload(self, offset: int, data: memoryview) -> None:
        self._to_device(self._weights + offset, np.frombuffer(data, np.uint8))

    def write_kv(self, offset: int, data: memoryview) -> None:
        self._use_device()
        self._to_device(self._kv + offset, np.frombuffer(data, np.uint8))

    def _to_device(self, target: int, data: NDArray[Any]) -> None:
        kind = self._hip.hipMemcpyKind.hipMemcpyHostToDevice
        self._hip.call("hipMemcpy", target, int(data.ctypes.data), data.nbytes, kind)

    def _to_host(self, out: NDArray[Any], source: int) -> None:
        kind = self._hip.hipMemcpyKind.hipMemcpyDeviceToHost
        self._hip.call("hipStreamSynchronize", self._stream)
        self._hip.call("hipMemcpy", int(out.ctypes.data), source, out.nbytes, kind)

    # -- launching

    def _launch(self, args: KernelArgs, prompt: NDArray[np.int32], logits: bool, bias: NDArray[np.int32]) -> None:
        self._use_device()
        hip, plan = self._hip, self.plan
        args.logits = self._logits_buffer(args.n_prompt) if logits else 0
        args.prompt = self._prompt + prompt.itemsize * args.n_history
        args.bias = self._bias
        self._to_device(self._prompt, prompt)
        if bias.size:
            self._to_device(self._bias, bias)
        hip.call("hipMemsetAsync", self._exchange, 0, plan.exchanges.bytes, self._stream)
        if plan.trace_events:
            hip.call("hipMemsetAsync", self._trace, 0, trace_bytes(plan), self._stream)
        hip.call("hipEventRecord", self._before, self._stream)
        self._start(self.kernel.module[GENERATE], plan.blocks, plan.profile.threads, plan.memory.bytes, args)
        hip.call("hipEventRecord", self._after, self._stream)

    def _start(self, function: Any, blocks: int, threads: int, lds: int, *values: Any) -> None:
        """Launch on the stream; `values` are ctypes objects, copied before this returns."""
        shape = (blocks, 1, 1, threads, 1, 1, lds, self._stream)
        self._hip.call("hipModuleLaunchKernel", function, *shape, [ctypes.addressof(v) for v in values], None)

    def _done(self) -> bool:
        self._use_device()
        (status,) = self._hip.hipEventQuery(self._after)
        if status == self._hip.hipError_t.hipErrorNotReady:
            return False
        if status != self._hip.hipError_t.hipSuccess:
            raise KogcError(f"the kernel failed: {self._hip.name_of(status)}; load it again")
        return True

    def _wait(self) -> None:
        not_ready = self._hip.hipError_t.hipErrorNotReady
        while self._hip.hipEventQuery(self._after)[0] == not_ready:
            time.sleep(self.poll_seconds)
        status, *milliseconds = self._hip.hipEventElapsedTime(self._before, self._after)
        self.last_timing = float(milliseconds[0]) if status == self._hip.hipError_t.hipSuccess else 0.0

    def _pointers(self) -> dict[str, int]:
        operands = {o.name: self._weights + o.offset for o in self.program.operands if o.name != "inv_freq"}
        caches = {"rope": self._rope, "kv": self._kv, "exchange": self._exchange}
        trace = {"trace": self._trace} if self.plan.trace_events else {}
        return operands | caches | trace | HostWords.pointers(self._words_on_device)

    # -- around a launch

    def _logits_buffer(self, rows: int) -> int:
        need = rows * self.plan.spec.vocab * 4
        if need > self._logits_bytes:
            self._logits, self._logits_bytes = self._alloc(need), need
        return self._logits

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        out = np.empty((rows, self.plan.spec.vocab), np.float32)
        self._to_host(out, self._logits)
        return out

    def read_trace(self) -> NDArray[np.uint64]:
        self._use_device()
        out = np.empty((self.plan.blocks, 1 + self.plan.trace_events), np.uint64)
        self._to_host(out, self._trace)
        return out

    def _fill(self, name: str, offset: int, count: int, seed: int, amplitude: float, fp16: bool) -> None:
        self._use_device()
        values = (
            ctypes.c_uint64(self._address(name) + offset), ctypes.c_uint64(count), ctypes.c_uint32(seed),
            ctypes.c_float(amplitude), ctypes.c_int32(fp16),
        )  # fmt: skip
        self._start(self.kernel.module[FILL], FILL_BLOCKS, FILL_THREADS, 0, *values)

    def _address(self, name: str) -> int:
        return self._kv if name == "kv" else self._weights + self.program.operand(name).offset

    def download(self, name: str, offset: int, count: int) -> NDArray[np.uint8]:
        self._use_device()
        out = np.empty(count, np.uint8)
        self._to_host(out, self._address(name) + offset)
        return out

    def read_bandwidth(self) -> float:
        self._use_device()
        plan, least = self.plan, CACHE_MULTIPLE * self.plan.profile.l2_bytes
        address, count, scratch = self._address("slabs"), self.program.operand("slabs").bytes, None
        if count < least:  # would be read from the cache: read something larger
            scratch = self._hip.call("hipMalloc", least)
            address, count = int(scratch), least
        round_ = plan.blocks * plan.knobs.stage_bytes * plan.knobs.in_flight  # the kernel reads these in whole
        count = count // round_ * round_
        values = ctypes.c_uint64(address), ctypes.c_uint64(count), ctypes.c_uint64(self._alloc(4))
        try:
            best = min(self._time(*values) for _ in range(CEILING_REPEATS))
        finally:
            if scratch is not None:
                self._hip.attempt("hipFree", scratch)
        return READ_PASSES * count / (best / 1e3)

    def _time(self, *values: Any) -> float:
        self._hip.call("hipEventRecord", self._before, self._stream)
        self._start(self.kernel.module[READ_CEILING], self.plan.blocks, self.plan.profile.threads, 0, *values)
        self._hip.call("hipEventRecord", self._after, self._stream)
        self._hip.call("hipEventSynchronize", self._after)
        return float(self._hip.call("hipEventElapsedTime", self._before, self._after))

    def _free(self) -> None:
        while self._undo:
            self._undo.pop()()
