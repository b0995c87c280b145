"""A kernel that stands in for the real one in tests of the loader: same arguments, a trivial model, plain Python.

After token t at position p the logit of (t * 7 + p + 3) % vocab is 1, every other 0. Nothing depends on the KV cache.
"""

from __future__ import annotations

import ctypes
import enum
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from kogc.runtime.args import KernelArgs, SampleArgs


def next_token(token: int, position: int, vocab: int) -> int:
    return (token * 7 + position + 3) % vocab


def continuation(prompt: list[int], count: int, vocab: int, start: int = 0) -> list[int]:
    """What the toy model makes of a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens[-1], start + len(tokens) - 1, vocab))
    return tokens[len(prompt) :]


def view(kind: Any, count: int, address: int) -> Any:
    """Memory at an address as an array."""
    return np.ctypeslib.as_array((kind * count).from_address(address))


def ints(address: int, count: int) -> Any:
    return view(ctypes.c_int32, max(count, 1), address)[:count]


class ToyKernel:
    """Settings of the toy: `delay` seconds a token; `stall` reports a stall; `fail` is the status it returns."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.delay = 0.0
        self.stall: list[int] | None = None
        self.fail = 0
        self.diverge = False  # whether each of several samples goes a way of its own
        self.launches: list[SimpleNamespace] = []
        self._ahead: list[int] = []  # of the prompt, what passes of many tokens have taken

    def take_passes(self, args: KernelArgs) -> None:
        """The launch before run(): all of a prompt but its last token."""
        self._ahead = [int(t) for t in ints(args.prompt, args.n_prompt)]
        if args.logits:
            self._write_logits(args, self._ahead)

    def run(self, args: KernelArgs) -> int:
        prompt = [int(t) for t in ints(args.prompt, args.n_prompt)]
        stop = list(args.stop[: args.n_stop])
        ahead, self._ahead = self._ahead, []
        whole, start = ahead + prompt, args.start - len(ahead)
        launch = SimpleNamespace(prompt=whole, start=start, max_new=args.max_new, stop=stop, in_passes=len(ahead))
        self.launches.append(launch)
        self._note_sampling(args)
        if args.logits:
            self._write_logits(args, prompt)
        token, made = prompt[-1], 0
        while made < args.max_new:
            time.sleep(self.delay)
            if self.stall:
                ints(args.report, 16)[:8] = self.stall
                return 1
            token = next_token(token, args.start + len(prompt) + made - 1, self.vocab)
            if args.records:
                self._write_record(args, made, token)
            ints(args.tokens, args.max_new)[made] = token
            made += 1
            if token in stop or ints(args.stop_word, 1)[0]:
                break
        self.launches[-1].made = made
        return self.fail

    def run_samples(self, args: SampleArgs) -> int:
        """The toy model's continuation for each sample; sample i makes a token in every turn until it ends."""
        ahead, self._ahead = self._ahead, []
        token, n, new = int(ints(args.prompt, 1)[0]), args.n_samples, args.max_new
        assert args.n_prompt == 1
        assert args.pages
        launch = SimpleNamespace(prompt=[*ahead, token], start=args.start - len(ahead), samples=n, max_new=new)
        launch.in_passes, launch.stop = len(ahead), list(args.stop[: args.n_stop])
        self.launches.append(launch)
        self._note_sampling(args)
        last, live = [token] * n, set(range(n))
        for step in range(new):
            time.sleep(self.delay)
            for i in sorted(live):
                last[i] = next_token(last[i], args.start + step + (i if self.diverge else 0), self.vocab)
                if args.records:
                    self._write_record(args, i * new + step, last[i])
                ints(args.tokens, n * new)[i * new + step] = last[i]
                if last[i] in launch.stop or ints(args.stop_words, n)[i]:
                    live.discard(i)
            if not live:
                break
        launch.steps = step + 1
        return self.fail

    def _note_sampling(self, args: KernelArgs) -> None:
        launch, bias = self.launches[-1], ints(args.bias, 2 * args.n_bias) if args.n_bias else np.empty(0, np.int32)
        launch.choice, launch.seed, launch.top_k = args.choice, args.seed, args.top_k
        launch.bias = list(zip(bias[::2].tolist(), bias[1::2].copy().view(np.float32).tolist(), strict=True))
        before = args.prompt - 4 * args.n_history
        launch.history = [int(t) for t in ints(before, args.n_history - launch.in_passes)]

    def _write_record(self, args: KernelArgs, made: int, token: int) -> None:
        """The token itself is the likeliest, at -0.5; the one after it comes next, at -1.5, and so on."""
        n = args.n_logprobs
        record = ints(args.records, (made + 1) * (1 + 2 * n))[made * (1 + 2 * n) :]
        record[1 : 1 + n] = token + np.arange(n)
        record.view(np.float32)[0] = -0.5
        record.view(np.float32)[1 + n :] = -0.5 - np.arange(n)

    def _write_logits(self, args: KernelArgs, prompt: list[int]) -> None:
        count = len(prompt) * self.vocab
        out = view(ctypes.c_float, count, args.logits).reshape(-1, self.vocab)
        out[:] = 0
        for row, token in enumerate(prompt):
            out[row, next_token(token, args.start + row, self.vocab)] = 1


def fill(address: int, count: int, seed: int, amplitude: float, fp16: int) -> None:
    """Recognisable rather than random: every value is the seed."""
    view(ctypes.c_uint16, count, address)[:] = seed


class ToyLibrary:
    """What ctypes.CDLL would give for a CPU binary."""

    def __init__(self, kernel: ToyKernel) -> None:
        self.kernel = kernel
        self.kogc_fill = fill

    def kogc_generate(self, reference: Any) -> int:
        return self.kernel.run(reference._obj)

    def kogc_prompt(self, reference: Any) -> int:
        args = reference._obj
        assert args.exchange
        assert args.max_new == 0
        self.kernel.take_passes(args)
        return 0

    def kogc_read_ceiling(self, address: int, count: int, threads: int) -> None:
        time.sleep(0.001)


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_LAUNCH_FAILED = 719


class Attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16


class ToyDriver:
    """The part of cuda.bindings.driver that the runtime calls, over host memory; launches run in a thread.

    `live` counts allocations by kind, so that a test can see that everything was given back.
    """

    CUresult = Status
    CUdevice_attribute = Attribute
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_DISABLE_TIMING=2)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE = 2, 1

    def __init__(self, kernel: ToyKernel) -> None:
        self.kernel = kernel
        self.name, self.capability, self.sms, self.version = b"NVIDIA H200\0\0", (9, 0), 132, 13000
        self.memory = 150 << 30
        self.init, self.load, self.devices = Status.CUDA_SUCCESS, Status.CUDA_SUCCESS, 1
        self.occupancy = 1
        self.live: dict[Any, Any] = {}
        self.shared: dict[bytes, int] = {}
        self._handle = 0
        self._thread: threading.Thread | None = None
        self._status = Status.CUDA_SUCCESS

    # -- device
    def cuInit(self, flags: int) -> Any:
        return (self.init,)

    def cuDriverGetVersion(self) -> Any:
        return Status.CUDA_SUCCESS, self.version

    def cuDeviceGetCount(self) -> Any:
        return Status.CUDA_SUCCESS, self.devices

    def cuDeviceGet(self, ordinal: int) -> Any:
        return Status.CUDA_SUCCESS, ordinal

    def cuDeviceGetName(self, length: int, device: Any) -> Any:
        return Status.CUDA_SUCCESS, self.name

    def cuDeviceTotalMem(self, device: Any) -> Any:
        return Status.CUDA_SUCCESS, 150754820096

    def cuDeviceGetAttribute(self, attribute: Attribute, device: Any) -> Any:
        values = (*self.capability, 232448, self.sms)
        return Status.CUDA_SUCCESS, values[list(Attribute).index(attribute)]

    def cuMemGetInfo(self) -> Any:
        return Status.CUDA_SUCCESS, self.memory, self.memory

    # -- things that are made and freed
    def _make(self, value: Any) -> Any:
        self._handle += 1
        self.live[self._handle] = value
        return Status.CUDA_SUCCESS, self._handle

    def _free(self, handle: Any) -> Any:
        del self.live[handle]
        return (Status.CUDA_SUCCESS,)

    def cuDevicePrimaryCtxRetain(self, device: Any) -> Any:
        self.live["context"] = device
        return Status.CUDA_SUCCESS, "context"

    def cuDevicePrimaryCtxRelease(self, device: Any) -> Any:
        return self._free("context")

    def cuCtxSetCurrent(self, context: Any) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuModuleLoadData(self, image: bytes) -> Any:
        return self._make(image) if self.load == Status.CUDA_SUCCESS else (self.load, None)

    def cuModuleUnload(self, module: Any) -> Any:
        return self._free(module)

    def cuModuleGetFunction(self, module: Any, name: bytes) -> Any:
        return Status.CUDA_SUCCESS, name

    def cuFuncSetAttribute(self, function: bytes, attribute: int, value: int) -> Any:
        self.shared[function] = value
        return (Status.CUDA_SUCCESS,)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function: bytes, threads: int, shared: int) -> Any:
        return Status.CUDA_SUCCESS, self.occupancy

    def cuStreamCreate(self, flags: int) -> Any:
        return self._make("stream")

    def cuStreamDestroy(self, stream: Any) -> Any:
        return self._free(stream)

    def cuEventCreate(self, flags: int) -> Any:
        return self._make("event")

    def cuEventDestroy(self, event: Any) -> Any:
        return self._free(event)

    def cuMemAlloc(self, count: int) -> Any:
        memory = (ctypes.c_ubyte * count)()
        self.live[ctypes.addressof(memory)] = memory
        return Status.CUDA_SUCCESS, ctypes.addressof(memory)

    def cuMemHostAlloc(self, count: int, flags: int) -> Any:
        return self.cuMemAlloc(count)

    def cuMemFree(self, address: int) -> Any:
        return self._free(address)

    def cuMemFreeHost(self, address: int) -> Any:
        return self._free(address)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> Any:
        return Status.CUDA_SUCCESS, address

    # -- work
    def cuMemcpyHtoD(self, to: int, source: int, count: int) -> Any:
        ctypes.memmove(to, source, count)
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, to: int, source: int, count: int, stream: Any) -> Any:
        return self.cuMemcpyHtoD(to, source, count)

    def cuMemcpyDtoH(self, to: int, source: int, count: int) -> Any:
        return self.cuMemcpyHtoD(to, source, count)

    def cuMemsetD8(self, address: int, value: int, count: int) -> Any:
        ctypes.memset(address, value, count)
        return (Status.CUDA_SUCCESS,)

    def cuMemsetD8Async(self, address: int, value: int, count: int, stream: Any) -> Any:
        return self.cuMemsetD8(address, value, count)

    def cuEventRecord(self, event: Any, stream: Any) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuEventQuery(self, event: Any) -> Any:
        if self._thread is not None and self._thread.is_alive():
            return (Status.CUDA_ERROR_NOT_READY,)
        return (self._status,)

    def cuEventSynchronize(self, event: Any) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: Any) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuEventElapsedTime(self, before: Any, after: Any) -> Any:
        return Status.CUDA_SUCCESS, 2.0

    def cuLaunchKernel(self, function: bytes, *rest: Any) -> Any:
        pointers = ctypes.cast(rest[8], ctypes.POINTER(ctypes.c_void_p))
        assert len(rest) == 10, "grid, block, shared memory, stream, parameters, extra"
        if function == b"kogc_fill":
            kinds: tuple[Any, ...] = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float, ctypes.c_int32)
            fill(*(kind.from_address(pointers[i]).value for i, kind in enumerate(kinds)))
        return (Status.CUDA_SUCCESS,)

    def cuLaunchCooperativeKernel(self, function: bytes, *rest: Any) -> Any:
        assert len(rest) == 9, "grid, block, shared memory, stream, parameters"
        assert rest[6] == self.shared[function], "shared memory beyond the default is opted into before the launch"
        pointer = ctypes.cast(rest[8], ctypes.POINTER(ctypes.c_void_p))[0]
        kind = SampleArgs if function == b"kogc_samples" else KernelArgs
        args = kind.from_buffer_copy(kind.from_address(pointer))
        if function == b"kogc_prompt":
            assert args.scratch
            self.kernel.take_passes(args)
            return (Status.CUDA_SUCCESS,)
        run: Any = {b"kogc_generate": self.kernel.run, b"kogc_samples": self.kernel.run_samples}[function]

        def work() -> None:
            failed = run(args)
            self._status = Status.CUDA_ERROR_LAUNCH_FAILED if failed else Status.CUDA_SUCCESS

        self._thread = threading.Thread(target=work)
        self._thread.start()
        return (Status.CUDA_SUCCESS,)
