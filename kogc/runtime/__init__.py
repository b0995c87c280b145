"""What every target's runtime does alike: one launch at a time, tokens followed as they are made, a stall reported."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact import Operand
from ..errors import KogcError
from ..kv_layout import pack_kv
from ..plan.plan import CHUNK, Plan
from ..sampling import GREEDY, SEEDS, Sampling
from .args import REPORT_WORDS, KernelArgs, Logprobs, bias_words, kernel_args, read_record, record_words

LINE = 128  # bytes: the stop word, the report and the ring do not share a cache line
ALIGN = 4096  # of every operand in the weights file and in memory
ONE = {"bf16": 0x3F80, "fp16": 0x3C00}  # 1.0 as raw 16 bits
LOOK_NANOSECONDS = 20_000_000  # between two questions whether a launch has ended, while its tokens are watched
DUMMY_AMPLITUDE = 0.02 * 3**0.5  # uniform values of standard deviation 0.02, as models are initialised


# Where the kernel waits, as templates/common/args.h numbers it.
SITES = (
    "stage full", "stage empty", "qkv", "partial attention", "attention", "attention output", "ffn hidden",
    "ffn output", "argmax keys", "new keys and values", "largest logits", "histogram", "totals", "candidates",
    "short lists", "a pass of the prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Program:
    """What a runtime loads.

    weights: the packed file, or None for dummy weights, made on the device.
    operands: their places in the weights (bytes); the device holds them in one buffer, laid out like the file.
    inv_freq: float32[head_dim / 2]. rope: float32[max_context][head_dim / 2][2]. tools: versions that built it.
    """

    plan: Plan
    binary: Path
    operands: tuple[Operand, ...]
    weights: Path | None
    inv_freq: NDArray[np.float32]
    rope: NDArray[np.float32]
    tools: dict[str, str]

    @property
    def weights_bytes(self) -> int:
        return max(o.offset + o.bytes for o in self.operands)

    def operand(self, name: str) -> Operand:
        """KeyError if the model has no such operand; 'weights' is all of them, as in the file."""
        if name == "weights":
            return Operand(name, "uint8", (self.weights_bytes,), 0, self.weights_bytes, "")
        for o in self.operands:
            if o.name == name:
                return o
        raise KeyError(name)


@dataclass(frozen=True)
class Request:
    """One launch: `prompt` is evaluated from position `start`, then up to `max_new` tokens are made.

    sampling: how they are chosen; without a seed, one is drawn. history: tokens before the prompt that are in the cache
    already, for penalties to know; at most `start`.
    """

    prompt: tuple[int, ...]
    start: int = 0
    max_new: int = 0
    stop: tuple[int, ...] = ()
    logits: bool = False
    sampling: Sampling = GREEDY
    history: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """Tokens made; logits float32[len(prompt)][vocab] if asked for; kernel time in milliseconds.

    logprobs: one a token, where the request's sampling asks for them.
    """

    tokens: list[int]
    logits: NDArray[np.float32] | None
    milliseconds: float
    logprobs: list[Logprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Kernel:
    """A loaded binary and its plan; `module` is what the target's loader gave."""

    plan: Plan
    module: Any


class HostWords:
    """The words that host and kernel share: stop word, report, token ring (-1: not yet written)."""

    def __init__(self, buffer: Any, ring: int) -> None:
        words: NDArray[np.int32] = np.frombuffer(buffer, np.int32)
        self.stop_word = words[:1]
        self.report = words[LINE // 4 : LINE // 4 + REPORT_WORDS].view(np.uint32)
        self.ring = words[2 * LINE // 4 : 2 * LINE // 4 + ring]

    @staticmethod
    def bytes(ring: int) -> int:
        return 2 * LINE + ring * 4

    @staticmethod
    def pointers(base: int) -> dict[str, int]:
        """Addresses of the three, for a buffer that the device sees at `base`."""
        return {"stop_word": base, "report": base + LINE, "tokens": base + 2 * LINE}

    def clear(self) -> None:
        self.stop_word[:] = 0
        self.report[:] = 0
        self.ring[:] = -1


class Runtime(ABC):
    """A loaded kernel with its operands. Not for concurrent launches: a second one is refused while one runs."""

    poll_seconds = 50e-6
    words: HostWords
    kernel: Kernel  # of the next launch

    def __init__(self, program: Program) -> None:
        self.program = program
        self.plan = program.plan
        self._records: NDArray[np.int32] = np.empty((0, 1), np.int32)  # log-probabilities of the last launch
        self.last_timing = 0.0  # milliseconds that the last launch took on the device
        self._lock = threading.Lock()  # held from the preparation of a launch to its end
        self._memory = threading.RLock()  # held while memory that close() frees is looked at
        self._running = False  # whether a launch has begun that nobody has waited for
        self._closed = False

    # -- what a target provides

    @abstractmethod
    def _launch(self, args: KernelArgs, prompt: NDArray[np.int32], logits: bool, bias: NDArray[np.int32]) -> None:
        """Start the kernel; fills in the pointers of prompt, logits and bias. `prompt` begins with the history.

        Sets _running before anything is started.
        """

    @abstractmethod
    def _share_records(self, words: int) -> tuple[NDArray[np.int32], int]:
        """Memory that kernel and host see, of at least so many words, and its address on the device."""

    @abstractmethod
    def _done(self) -> bool:
        """Whether the launch has ended; raises KogcError when it failed."""

    @abstractmethod
    def _wait(self) -> None:
        """Block until the launch has ended and set last_timing; never raises because the kernel failed."""

    @abstractmethod
    def _pointers(self) -> dict[str, int]:
        """Device addresses of operands, caches and shared words."""

    @abstractmethod
    def _read_logits(self, rows: int) -> NDArray[np.float32]:
        """Copy of the last launch's logits."""

    @abstractmethod
    def upload(self, offset: int, data: memoryview) -> None:
        """Copy bytes to `offset` of the weights."""

    @abstractmethod
    def _fill(self, name: str, offset: int, count: int, seed: int, amplitude: float, fp16: bool) -> None:
        """Fill `count` 16-bit floats of an operand or 'kv', from byte `offset`, with uniform(-amplitude, amplitude)."""

    @abstractmethod
    def download(self, name: str, offset: int, count: int) -> NDArray[np.uint8]:
        """Copy `count` bytes of an operand, of 'weights' or 'kv', from byte `offset`; KeyError for an unknown name."""

    @abstractmethod
    def write_kv(self, offset: int, data: memoryview) -> None:
        """Copy bytes to `offset` of the KV cache."""

    @abstractmethod
    def load_kernel(self, plan: Plan, image: bytes) -> Kernel:
        """Load another binary beside the artifact's own, for `use`. KogcError where it does not load or fit."""

    @abstractmethod
    def _fit(self, plan: Plan) -> None:
        """Have an exchange buffer and a trace buffer that are large enough for `plan`."""

    @abstractmethod
    def read_trace(self) -> NDArray[np.uint64]:
        """What a tracing kernel's last launch noted: uint64[blocks][1 + trace_events]; see templates/common/trace.h."""

    @abstractmethod
    def read_bandwidth(self) -> float:
        """Bytes per second at which this machine reads memory when nothing else is done: the ceiling."""

    @abstractmethod
    def _free(self) -> None:
        """Give everything back; called once."""

    # -- what all share

    def use(self, kernel: Kernel) -> None:
        """Launch `kernel` from now on, over the same weights and caches. ValueError where it needs another layout."""
        if not same_layout(self.plan, kernel.plan):
            raise ValueError("the kernel lays out weights or caches in another way")
        self._fit(kernel.plan)
        self.kernel, self.plan = kernel, kernel.plan

    def tokens(self, request: Request) -> Generator[int, None, None]:
        """Launch, and yield each token as soon as it is made. Closing the iterator stops the kernel and waits."""
        with self._launched(request):
            yield from self._follow(request.max_new)

    def arrivals(self, request: Request) -> NDArray[np.int64]:
        """Launch, and note the host's clock, in nanoseconds, when each token is first seen: polled without pause."""
        times: list[int] = []
        clock, ring, next_look = time.perf_counter_ns, self.words.ring, 0
        with self._launched(request), self._opened():
            while len(times) < request.max_new:
                now = clock()
                if ring[len(times)] >= 0:
                    times.append(now)
                elif now > next_look:  # asking the driver takes longer than looking at the ring
                    if self._ended() and ring[len(times)] < 0:
                        break
                    next_look = now + LOOK_NANOSECONDS
        return np.array(times, np.int64)

    @contextlib.contextmanager
    def _launched(self, request: Request) -> Iterator[None]:
        """A launch under way; in the end it is stopped, if it still runs, and waited for."""
        with self._taken():
            with self._opened():
                args = self._arguments(request)
                self._launch(args, tokens_of(request), request.logits, bias_words(request.sampling))
            yield

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        """Around the preparation of a launch and the launch; in the end nothing of it runs any more."""
        if not self._lock.acquire(blocking=False):
            raise KogcError("this session is already generating: finish or close that stream first")
        try:
            with self._opened():
                self._end()  # what an interrupt at the wrong moment has left running
                self.words.clear()
            yield
        finally:
            try:
                with self._memory:
                    if not self._closed:
                        self._end()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Around a look at memory that close() frees, in this thread or another. KogcError after it."""
        with self._memory:
            if self._closed:
                raise KogcError("this session is closed")
            yield

    def _end(self) -> None:
        """Stop what runs, and wait for it. An interrupt is raised after that: what still ran would write into the next
        launch's memory, or into what has been freed.
        """
        interrupt: KeyboardInterrupt | None = None
        while self._running:
            try:
                self._tell_to_stop()
                self._wait()
                self._running = False
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _tell_to_stop(self) -> None:
        self.words.stop_word[0] = 1

    def _arguments(self, request: Request) -> KernelArgs:
        sampling, pointers = self._prepared(request, 1)
        prompt, history = len(request.prompt), len(request.history)
        return kernel_args(pointers, request.start, prompt, request.max_new, request.stop, sampling, history)

    def _prepared(self, request: Request, n: int) -> tuple[Sampling, dict[str, int]]:
        """How tokens are drawn, with a seed, and the pointers of a launch that makes n continuations.

        ValueError for a history that is longer than what lies before the prompt.
        """
        if len(request.history) > request.start:
            raise ValueError(f"a history of {len(request.history)} tokens before position {request.start}")
        sampling, pointers = request.sampling, self._pointers()
        if sampling.seed is None and not sampling.greedy:
            sampling = replace(sampling, seed=secrets.randbelow(SEEDS))
        if each := record_words(sampling):
            count = n * request.max_new
            records, pointers["records"] = self._share_records(each * count)
            self._records = records[: each * count].reshape(count, each)
        return sampling, pointers

    def logprobs(self, index: int) -> Logprobs:
        """Of token number `index` of the last launch, once that token has come; the request has asked for them."""
        with self._opened():
            return read_record(self._records[index])

    def run(self, request: Request) -> Result:
        """Launch and wait for the end."""
        tokens = list(self.tokens(request))
        with self._opened():
            logits = self._read_logits(len(request.prompt)) if request.logits else None
        wanted = request.sampling.logprobs is not None
        logprobs = [self.logprobs(i) for i in range(len(tokens))] if wanted else []
        return Result(tokens, logits, self.last_timing, logprobs)

    def _follow(self, max_new: int) -> Iterator[int]:
        made = 0
        while True:
            with self._opened():
                # Asked before the ring is read: what a finished kernel wrote is then surely seen.
                done = self._ended()
                new = written(self.words.ring[made:max_new])
            made += len(new)
            yield from new
            if done:
                return
            time.sleep(self.poll_seconds)

    def _ended(self) -> bool:
        """Whether the launch has ended; a stall is told from the kernel's own report, not from how it died."""
        try:
            done = self._done()
        except KogcError:
            if self.words.report[0]:
                raise KogcError(stall_message(self.words.report)) from None
            raise
        if done and self.words.report[0]:
            raise KogcError(stall_message(self.words.report))
        return done

    def fill_dummy(self) -> None:
        """Random weights of realistic scale, made on the device; norm weights are 1."""
        fp16 = self.plan.spec.dtype == "fp16"
        for seed, o in enumerate(self.program.operands, start=1):
            if o.name == "inv_freq":
                self.upload(o.offset, memoryview(self.program.inv_freq.tobytes()))
            elif o.name in ("norms", "qk_norms"):
                ones = np.full(o.bytes // 2, ONE[self.plan.spec.dtype], np.uint16)
                self.upload(o.offset, memoryview(ones.tobytes()))
            else:
                self._fill(o.name, 0, o.bytes // 2, seed, DUMMY_AMPLITUDE, fp16)

    def fill_kv(self, positions: int) -> None:
        """Fill the KV cache of every layer and head with random values up to `positions`, in whole chunks."""
        plan = self.plan
        heads = plan.spec.layers * plan.spec.kv_heads
        each = plan.chunks * plan.chunk_bytes
        chunks = min(-(-positions // CHUNK), plan.chunks)
        if not chunks:
            return
        if plan.kv_dtype == "fp8":
            random = random_chunks(plan, chunks + heads)
            for head in range(heads):
                self.write_kv(head * each, memoryview(random[head : head + chunks].tobytes()))
            return
        for head in range(heads):
            self._fill("kv", head * each, chunks * plan.chunk_bytes // 2, 1000 + head, 1.0, fp16=False)

    def close(self) -> None:
        """Stop a launch that is still under way, wait for it, and free everything. A second call does nothing."""
        with self._memory:
            if self._closed:
                return
            self._end()
            self._closed = True
            self._free()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def random_chunks(plan: Plan, count: int) -> NDArray[np.uint8]:
    """Chunks of an FP8 cache, [count, plan.chunk_bytes]: uniform numbers, scaled so that exponents differ."""
    rng = np.random.default_rng(1000)
    shape = (2, count * CHUNK)
    numbers = rng.random((*shape, plan.spec.head_dim), np.float32) * 2 - 1
    keys, values = np.ldexp(numbers, rng.integers(-1, 2, (*shape, 1), np.int32))
    return pack_kv(plan, plan.target, keys, values)


def written(ring: NDArray[np.int32]) -> list[int]:
    """The tokens of a ring, up to the first that is not there yet."""
    new = []
    for word in ring:  # one at a time: the kernel writes on
        if word < 0:
            break
        new.append(int(word))
    return new


def tokens_of(request: Request) -> NDArray[np.int32]:
    """What a launch copies to the device: the history, then the prompt."""
    return np.asarray((*request.history, *request.prompt), np.int32)


def trace_bytes(plan: Plan) -> int:
    """Size of the event buffer of a tracing kernel; 0 for one without."""
    return plan.blocks * (1 + plan.trace_events) * 8 if plan.trace_events else 0


def same_layout(a: Plan, b: Plan) -> bool:
    """Whether kernels of the two plans may share weights and caches."""

    def layout(plan: Plan) -> tuple[object, ...]:
        return plan.spec, plan.target, plan.blocks, plan.max_context, plan.phases, plan.slab_bytes, plan.kv_bytes

    return layout(a) == layout(b)


def stall_message(report: NDArray[np.uint32]) -> str:
    """One line from the kernel's report of a wait that never ended."""
    block, thread, site, layer, step, expected = (int(w) for w in report[1:7])
    name = SITES[site] if site < len(SITES) else f"site {site}"
    return (
        f"the kernel stalled and stopped: block {block}, thread {thread} waited for {name!r} in layer {layer}, "
        f"step {step} (expected {expected:#x}); load it again"
    )


def open_runtime(program: Program, device: int = 0, oversubscribe: bool = False) -> Runtime:
    """The runtime of the plan's target; only its module, and the libraries that it needs, are imported."""
    if program.plan.target == "cuda":
        from .cuda import CudaRuntime

        return CudaRuntime(program, device)
    if program.plan.target == "hip":
        from .hip import HipRuntime

        return HipRuntime(program, device)
    if device:
        raise KogcError(f"device {device}: this artifact runs on the CPU, which has no number")
    from .cpu import CpuRuntime

    return CpuRuntime(program, oversubscribe)
