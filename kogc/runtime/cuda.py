"""The CUDA runtime: checks the device, loads the binary and the weights, launches, and follows the launch."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import KogcError
from ..plan.passes import MEETING_BYTES
from ..plan.plan import Plan
from ..plan.samples import page_bytes
from ..sampling import MAX_BIAS
from . import HostWords, Kernel, Program, Runtime, SampleWords, trace_bytes
from .args import BIAS_BYTES, KernelArgs, SampleArgs, split_prompt
from .driver import Driver, check_driver, check_gpu, open_gpu
from .upload import Uploader

GENERATE, PROMPT, SAMPLES = b"kogc_generate", b"kogc_prompt", b"kogc_samples"
FILL, READ_CEILING = b"kogc_fill", b"kogc_read_ceiling"
FILL_BLOCKS, FILL_THREADS = 1024, 256
CEILING_REPEATS = 4
READ_PASSES = 4  # of kogc_read_ceiling over its bytes, in one launch
CACHE_MULTIPLE = 8  # bytes read for the ceiling, at least, in L2 sizes
SPARE_BYTES = 256 << 20  # what a launch, the logits of a chunk and the driver may still need


class CudaRuntime(Runtime):
    """See Runtime. `device` counts the visible GPUs from 0; the primary context is shared with other libraries."""

    def __init__(self, program: Program, device: int = 0) -> None:
        super().__init__(program)
        self._undo: list[Callable[[], None]] = []  # what close() does, last first
        self._driver = Driver()
        self._device, gpu = open_gpu(self._driver, device)
        check_gpu(gpu, self.plan.profile)
        check_driver(self._driver.version, program.tools)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # -- loading

    def _open(self) -> None:
        self._context = self._driver.call("cuDevicePrimaryCtxRetain", self._device)
        self._undo.append(lambda: self._driver.attempt("cuDevicePrimaryCtxRelease", self._device))
        self._use_context()
        self._check_memory()
        self.kernel = self._load(self.plan, self._read_binary(), str(self.program.binary))
        self._stream = self._driver.call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._undo.append(lambda: self._driver.attempt("cuStreamDestroy", self._stream))
        self._before, self._after = (self._event() for _ in range(2))
        self._allocate()
        self._load_weights()

    def _use_context(self) -> None:
        # The current context is a thread's own, and a session may move between threads.
        self._driver.call("cuCtxSetCurrent", self._context)

    def _check_memory(self) -> None:
        free, total = self._driver.call("cuMemGetInfo")
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
        self._use_context()
        return self._load(plan, image, f"a variant of {self.program.binary}")

    def _load(self, plan: Plan, image: bytes, name: str) -> Kernel:
        driver = self._driver
        status, module = driver.cuModuleLoadData(image)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise KogcError(f"{name}: the driver does not load it ({driver.name_of(status)}); rebuild the artifact")
        self._undo.append(lambda: driver.attempt("cuModuleUnload", module))
        functions = {}
        own = (PROMPT,) * (plan.passes is not None) + (SAMPLES,) * (plan.samples is not None)
        for function in (GENERATE, FILL, READ_CEILING, *own):
            status, functions[function] = driver.cuModuleGetFunction(module, function)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise KogcError(f"{name}: has no {function.decode()}; rebuild the artifact")
        self._check_resident(plan, functions[GENERATE], plan.threads, plan.memory.bytes, name)
        if plan.passes:
            self._check_resident(plan, functions[PROMPT], plan.passes.threads, plan.passes.memory_bytes, name)
        if plan.samples:
            self._check_resident(plan, functions[SAMPLES], plan.samples.threads, plan.samples.memory_bytes, name)
        return Kernel(plan, functions)

    def _check_resident(self, plan: Plan, function: Any, threads: int, shared: int, name: str) -> None:
        """All blocks wait for each other, so all must be on the device at once."""
        memory = self._allow_shared(function, shared)
        each = self._driver.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, memory)
        if each * plan.profile.sms < plan.blocks:
            room = f"{each * plan.profile.sms} blocks of this kernel fit the GPU, it has {plan.blocks}"
            raise KogcError(f"{name}: {room}; rebuild the artifact")

    def _allow_shared(self, function: Any, count: int) -> int:
        """Opt in to `count` bytes of dynamic shared memory, and return them."""
        opt_in = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._driver.call("cuFuncSetAttribute", function, opt_in, count)
        return count

    def _event(self) -> Any:
        event = self._driver.call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DEFAULT)
        self._undo.append(lambda: self._driver.attempt("cuEventDestroy", event))
        return event

    def _allocate(self) -> None:
        plan, rope = self.plan, np.ascontiguousarray(self.program.rope, np.float32)
        self._weights = self._alloc(self.program.weights_bytes)
        self._kv = self._alloc(plan.kv_bytes)
        self._rope = self._alloc(rope.nbytes)
        self._exchange, self._exchange_bytes = 0, 0
        self._trace, self._trace_bytes = 0, 0
        self._fit(plan)
        self._scratch = 0
        if plan.passes:
            self._scratch = self._alloc(plan.passes.scratch_bytes)
            self._driver.call("cuMemsetD8", self._scratch, 0, plan.passes.scratch_bytes)
        self._prompt = self._alloc(plan.max_context * 4)
        self._bias = self._alloc(MAX_BIAS * BIAS_BYTES)
        self._records_address, self._record_words = 0, 0
        self._logits, self._logits_bytes = 0, 0
        self._grown: dict[str, tuple[int, int]] = {}  # buffers that are made when they are first needed: address, bytes
        self._undo.append(self._free_grown)
        self._sample_words: tuple[int, int, int] = (0, 0, 0)
        self._driver.call("cuMemsetD8", self._kv, 0, plan.kv_bytes)
        self._driver.call("cuMemcpyHtoD", self._rope, rope.ctypes.data, rope.nbytes)
        self._share_words()

    def _fit(self, plan: Plan) -> None:
        self._use_context()
        if plan.exchanges.bytes > self._exchange_bytes:
            self._exchange, self._exchange_bytes = self._alloc(plan.exchanges.bytes), plan.exchanges.bytes
        if trace_bytes(plan) > self._trace_bytes:
            self._trace, self._trace_bytes = self._alloc(trace_bytes(plan)), trace_bytes(plan)

    def read_trace(self) -> NDArray[np.uint64]:
        self._use_context()
        out = np.empty((self.plan.blocks, 1 + self.plan.trace_events), np.uint64)
        self._driver.call("cuMemcpyDtoH", out.ctypes.data, self._trace, out.nbytes)
        return out

    def _alloc(self, count: int) -> int:
        address = int(self._driver.call("cuMemAlloc", count))
        self._undo.append(lambda: self._driver.attempt("cuMemFree", address))
        return address

    def _share_words(self) -> None:
        size = HostWords.bytes(self.plan.max_context)
        address, self._words_on_device = self._share(size)
        self.words = HostWords((ctypes.c_char * size).from_address(address), self.plan.max_context)

    def _share(self, count: int) -> tuple[int, int]:
        """Pinned memory that the kernel writes and the host reads meanwhile: its address here, and on the device."""
        driver = self._driver
        flags = driver.CU_MEMHOSTALLOC_DEVICEMAP | driver.CU_MEMHOSTALLOC_PORTABLE
        address = int(driver.call("cuMemHostAlloc", count, flags))
        self._undo.append(lambda: driver.attempt("cuMemFreeHost", address))
        return address, int(driver.call("cuMemHostGetDevicePointer", address, 0))

    def _share_records(self, words: int) -> tuple[NDArray[np.int32], int]:
        self._use_context()
        if words > self._record_words:
            address, self._records_address = self._share(4 * words)
            buffer: Any = (ctypes.c_char * (4 * words)).from_address(address)
            self._records_here, self._record_words = np.frombuffer(buffer, np.int32), words
        return self._records_here, self._records_address

    def _load_weights(self) -> None:
        source = self.program.weights
        self._uploader = Uploader(self._driver)
        try:
            if source is None:
                self.fill_dummy()
            else:
                self._uploader.copy_file(self._weights, source, self.program.weights_bytes)
            self._uploader.finish()
            self._driver.call("cuStreamSynchronize", self._stream)
        finally:
            self._uploader.close()

    def upload(self, offset: int, data: memoryview) -> None:
        self._uploader.copy(self._weights + offset, data)

    def write_kv(self, offset: int, data: memoryview) -> None:
        self._use_context()
        source = np.frombuffer(data, np.uint8)
        self._driver.call("cuStreamSynchronize", self._stream)
        self._driver.call("cuMemcpyHtoD", self._kv + offset, source.ctypes.data, source.nbytes)

    # -- launching

    def _launch(self, args: KernelArgs, prompt: NDArray[np.int32], logits: bool, bias: NDArray[np.int32]) -> None:
        self._use_context()
        driver, plan = self._driver, self.plan
        args.logits = self._logits_buffer(args.n_prompt) if logits else 0
        args.prompt = self._prompt + prompt.itemsize * args.n_history
        args.bias = self._bias
        driver.call("cuMemcpyHtoD", self._prompt, prompt.ctypes.data, prompt.nbytes)
        if bias.size:
            driver.call("cuMemcpyHtoD", self._bias, bias.ctypes.data, bias.nbytes)
        driver.call("cuMemsetD8Async", self._exchange, 0, plan.exchanges.bytes, self._stream)
        if plan.trace_events:
            driver.call("cuMemsetD8Async", self._trace, 0, trace_bytes(plan), self._stream)
        driver.call("cuEventRecord", self._before, self._stream)
        if plan.passes and not logits and args.n_prompt > 1:
            self._start_passes(args)
        self._start(self.kernel.module[GENERATE], plan.blocks, plan.threads, plan.memory.bytes, args, cooperative=True)
        driver.call("cuEventRecord", self._after, self._stream)

    def _start_passes(self, args: KernelArgs) -> None:
        """Launch the passes over all of the prompt but its last token, and leave that to the launch that follows."""
        plan = self.plan
        assert plan.passes
        first = split_prompt(args, plan.spec.vocab)
        self._driver.call("cuMemsetD8Async", self._scratch, 0, MEETING_BYTES, self._stream)
        shared = plan.passes.memory_bytes
        self._start(self.kernel.module[PROMPT], plan.blocks, plan.passes.threads, shared, first, cooperative=True)

    def _share_samples(self, n: int, max_new: int) -> tuple[SampleWords, dict[str, int]]:
        self._use_context()
        size = SampleWords.bytes(n, max_new)
        if size > self._sample_words[2]:
            self._sample_words = (*self._share(size), size)
        here, there, _ = self._sample_words
        words = SampleWords((ctypes.c_char * size).from_address(here), n, max_new)
        return words, SampleWords.pointers(there)

    def _launch_samples(
        self, args: SampleArgs, prompt: NDArray[np.int32], logits: bool, bias: NDArray[np.int32]
    ) -> None:
        self._use_context()
        driver, plan, cut = self._driver, self.plan, self.plan.samples
        assert cut
        n = args.n_samples
        args.pages = self._grow("pages", n * args.n_pages * page_bytes(plan), f"{n} samples of {args.max_new} tokens")
        args.choices = self._grow("choices", n * cut.choice.bytes, f"{n} samples") if args.choice else 0
        args.logits_log = self._logits_buffer(args.max_new * n) if logits else 0
        scratch = self._grow("samples", cut.scratch_bytes, "samples")
        args.prompt = self._prompt + prompt.itemsize * args.n_history
        args.bias = self._bias
        driver.call("cuMemcpyHtoD", self._prompt, prompt.ctypes.data, prompt.nbytes)
        if bias.size:
            driver.call("cuMemcpyHtoD", self._bias, bias.ctypes.data, bias.nbytes)
        driver.call("cuMemsetD8Async", scratch, 0, cut.scratch_bytes, self._stream)
        if args.choice:
            driver.call("cuMemsetD8Async", args.choices, 0, n * cut.choice.bytes, self._stream)
        driver.call("cuEventRecord", self._before, self._stream)
        if args.n_prompt > 1:
            self._start_passes(args)
        args.scratch = scratch
        shared = cut.memory_bytes
        self._start(self.kernel.module[SAMPLES], plan.blocks, cut.threads, shared, args, cooperative=True)
        driver.call("cuEventRecord", self._after, self._stream)

    def _grow(self, name: str, count: int, what: str) -> int:
        """A buffer of at least so many bytes, zero where nothing was ever written. KogcError where memory is short."""
        address, size = self._grown.get(name, (0, 0))
        if size >= count:
            return address
        free, total = self._driver.call("cuMemGetInfo")
        if count - size + SPARE_BYTES > free:
            have = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
            raise KogcError(
                f"{what} need {count / 1e9:.1f} GB of GPU memory more; {have}: ask for fewer, or shorter ones"
            )
        if address:
            self._driver.call("cuMemFree", address)
            del self._grown[name]
        address = int(self._driver.call("cuMemAlloc", count))
        self._grown[name] = address, count
        self._driver.call("cuMemsetD8", address, 0, count)
        return address

    def _free_grown(self) -> None:
        for address, _ in self._grown.values():
            self._driver.attempt("cuMemFree", address)

    def _start(
        self, function: Any, blocks: int, threads: int, shared: int, *values: Any, cooperative: bool = False
    ) -> None:
        """Launch on the stream; `values` are ctypes objects, copied before this returns."""
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        where = ctypes.addressof(pointers)
        shape = (blocks, 1, 1, threads, 1, 1, shared, self._stream)
        if cooperative:
            self._driver.call("cuLaunchCooperativeKernel", function, *shape, where)
        else:
            self._driver.call("cuLaunchKernel", function, *shape, where, 0)

    def _done(self) -> bool:
        driver = self._driver
        status = driver.cuEventQuery(self._after)[0]
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if status != driver.CUresult.CUDA_SUCCESS:
            raise KogcError(f"the kernel failed: {driver.name_of(status)}; load the artifact again")
        return True

    def _wait(self) -> None:
        driver = self._driver
        status = driver.CUresult.CUDA_ERROR_NOT_READY
        while status == driver.CUresult.CUDA_ERROR_NOT_READY:
            status = driver.cuEventQuery(self._after)[0]
            time.sleep(self.poll_seconds)
        if status == driver.CUresult.CUDA_SUCCESS:
            self.last_timing = self._milliseconds()

    def _milliseconds(self) -> float:
        return float(self._driver.call("cuEventElapsedTime", self._before, self._after))

    def _pointers(self) -> dict[str, int]:
        operands = {o.name: self._weights + o.offset for o in self.program.operands if o.name != "inv_freq"}
        caches = {"rope": self._rope, "kv": self._kv, "exchange": self._exchange, "scratch": self._scratch}
        if self.plan.trace_events:
            caches["trace"] = self._trace
        return operands | caches | HostWords.pointers(self._words_on_device)

    # -- around a launch

    def _logits_buffer(self, rows: int) -> int:
        need = rows * self.plan.spec.vocab * 4
        if need > self._logits_bytes:
            self._logits, self._logits_bytes = self._alloc(need), need
        return self._logits

    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        out = np.empty((rows, self.plan.spec.vocab), np.float32)
        self._driver.call("cuMemcpyDtoH", out.ctypes.data, self._logits, out.nbytes)
        return out

    def _fill(self, name: str, offset: int, count: int, seed: int, amplitude: float, fp16: bool) -> None:
        self._use_context()
        values = (
            ctypes.c_uint64(self._address(name) + offset), ctypes.c_uint64(count), ctypes.c_uint32(seed),
            ctypes.c_float(amplitude), ctypes.c_int32(fp16),
        )  # fmt: skip
        self._start(self.kernel.module[FILL], FILL_BLOCKS, FILL_THREADS, 0, *values)

    def _address(self, name: str) -> int:
        return self._kv if name == "kv" else self._weights + self.program.operand(name).offset

    def download(self, name: str, offset: int, count: int) -> NDArray[np.uint8]:
        self._use_context()
        out = np.empty(count, np.uint8)
        self._driver.call("cuStreamSynchronize", self._stream)
        self._driver.call("cuMemcpyDtoH", out.ctypes.data, self._address(name) + offset, count)
        return out

    def read_bandwidth(self) -> float:
        self._use_context()
        function = self.kernel.module[READ_CEILING]
        shared = self._allow_shared(function, self.plan.memory.bytes)
        address, count = self._address("slabs"), self.program.operand("slabs").bytes
        scratch = 0
        if count < CACHE_MULTIPLE * self.plan.profile.l2_bytes:  # would be read from the cache: read something larger
            count = CACHE_MULTIPLE * self.plan.profile.l2_bytes
            address = scratch = int(self._driver.call("cuMemAlloc", count))
        round_ = self.plan.blocks * self.plan.knobs.stage_bytes  # the kernel reads whole stages in every block
        count = count // round_ * round_
        sink = self._alloc(4)
        values = ctypes.c_uint64(address), ctypes.c_uint64(count), ctypes.c_uint64(sink)
        try:
            best = min(self._time(function, shared, values) for _ in range(CEILING_REPEATS))
        finally:
            if scratch:
                self._driver.attempt("cuMemFree", scratch)
        return READ_PASSES * count / (best / 1e3)

    def _time(self, function: Any, shared: int, values: tuple[Any, ...]) -> float:
        driver = self._driver
        driver.call("cuEventRecord", self._before, self._stream)
        self._start(function, self.plan.blocks, self.plan.threads, shared, *values)
        driver.call("cuEventRecord", self._after, self._stream)
        driver.call("cuEventSynchronize", self._after)
        return self._milliseconds()

    def _free(self) -> None:
        if self._undo:
            self._driver.attempt("cuCtxSetCurrent", self._context)
        while self._undo:
            self._undo.pop()()
