"""Runs the rendered CUDA or HIP source without a GPU: the machine header is exchanged for its plain C++ stand-in.

What is compiled is the kernel that ships, every thread a fiber, all blocks resident, in an order drawn from a seed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kogc import rope
from kogc.checkpoint import open_checkpoint
from kogc.files import write_tree
from kogc.packing import operands, write_weights
from kogc.plan.plan import Plan
from kogc.plan.samples import own_pages, page_bytes
from kogc.render import render
from kogc.resources import data_dir
from kogc.runtime.args import REPORT_WORDS, Logprobs, bias_words, kernel_args, read_record, record_words, sample_args
from kogc.sampling import GREEDY, Sampling

STATUS = {1: "stalled", 2: "threads wait at a barrier for ever", 3: "violation", -1: "no memory for the stacks"}
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
)
GUARD = 4096  # bytes after every buffer that the kernel writes
# Headers of the machine, and what takes their place.
EXCHANGED = {
    "cuda/machine.cuh": "emulate/machine.h",
    "cuda/bulk_copies.cuh": "emulate/bulk_copies.h",
    "cuda/async_copies.cuh": "emulate/async_copies.h",
    "hip/machine.h": "emulate/hip_machine.h",
    "hip/matrix.h": "emulate/hip_matrix.h",
}

Patch = Callable[[dict[str, str]], dict[str, str]]


class EmulatorError(AssertionError):
    """The kernel stalled, or used the machine in a way that the hardware does not allow."""


def emulated_headers(headers: dict[str, str]) -> dict[str, str]:
    """The headers of a rendered source with the machine exchanged, and what the emulated machine includes."""
    folder = data_dir("templates") / "emulate"
    own = {f"emulate/{path.name}": path.read_text() for path in sorted(folder.glob("*.h"))}
    return {**headers, **own, **{name: own[other] for name, other in EXCHANGED.items() if name in headers}}


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kogc-emulated-")


def build(plan: Plan, patch: Patch | None = None) -> Path:
    """The shared library of a plan's kernel, compiled once a session; `patch` may change header texts."""
    rendered = render(plan)
    headers = patch(dict(rendered.headers)) if patch else rendered.headers
    files = {**emulated_headers(headers), "kernel.cpp": rendered.source}
    flags = (*FLAGS, f"-DKOGC_LANES={plan.profile.lanes}")
    digest = hashlib.sha256("\0".join([*flags, *(f"{k}\0{v}" for k, v in sorted(files.items()))]).encode()).hexdigest()
    folder = Path(_scratch().name) / digest
    library = folder / "kernel.so"
    if not library.exists():
        write_tree(folder, files)
        compile_cpp(folder / "kernel.cpp", flags, library)
    return library


def compile_cpp(source: Path, flags: Sequence[str], out: Path) -> None:
    """Run the host's C++ compiler; the error carries what it said."""
    command = [*compiler(), *flags, f"-I{source.parent}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"


def compiler() -> list[str]:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert found, "no C++ compiler"
    return [found]


class Buffer:
    """Bytes on a boundary of 4096, with a guard after them that must stay as it is."""

    def __init__(self, size: int, fill: int = 0) -> None:
        self._raw = np.full(size + GUARD + 4096, 0xA5, np.uint8)
        start = -self._raw.ctypes.data % 4096
        self.bytes = self._raw[start : start + size]
        self.bytes[:] = fill
        self._guard = self._raw[start + size :]

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def check(self, name: str) -> None:
        if (self._guard != 0xA5).any():
            raise EmulatorError(f"a write past the end of {name}")


@dataclass(frozen=True)
class SampledTokens:
    """Of each sample: its tokens, the logits that each was chosen from [made, vocab], and log-probabilities."""

    tokens: list[list[int]]
    logits: list[np.ndarray]
    logprobs: list[list[Logprobs]]


def planted(file: str, old: str, new: str) -> Patch:
    """A patch that replaces a text in one header, and fails where the text is not there any more."""

    def patch(headers: dict[str, str]) -> dict[str, str]:
        assert old in headers[file], f"{file} has changed: plant the bug anew"
        return {**headers, file: headers[file].replace(old, new)}

    return patch


class Emulated:
    """A plan and its packed checkpoint on the emulated machine. The KV cache lives as long as this object.

    samples: compile that entry too, which takes as long as all else.
    """

    def __init__(self, plan: Plan, checkpoint: Path, patch: Patch | None = None, samples: bool = False) -> None:
        self.plan = replace(plan)  # with nothing derived yet
        if not samples:
            self.plan.__dict__["samples"] = None
        self.library = ctypes.CDLL(str(build(self.plan, patch)))
        self.buffers = _load_operands(plan, checkpoint)
        self.buffers["kv"] = Buffer(plan.kv_bytes)
        self.report = [0] * REPORT_WORDS
        self.logprobs: list[Logprobs] = []  # of the last generation that asked for them

    def logits(self, tokens: Sequence[int], seed: int = 1, start: int = 0) -> np.ndarray:
        """float32 [tokens, vocab], teacher-forced."""
        out = Buffer(len(tokens) * self.plan.spec.vocab * 4, 0xFF)
        self._launch(tokens, 0, (), seed, start, out)
        return out.bytes.view(np.float32).reshape(len(tokens), -1)

    def differs(self, tokens: Sequence[int], expected: np.ndarray, orders: int) -> bool:
        """Whether logits are not, to the bit, those expected, or the machine stops, in some of so many orders."""
        for seed in range(1, orders + 1):
            try:
                if not np.array_equal(self.logits(tokens, seed), expected):
                    return True
            except EmulatorError:
                return True
        return False

    def generate(
        self,
        tokens: Sequence[int],
        n: int,
        stop: Sequence[int] = (),
        seed: int = 1,
        start: int = 0,
        halt: bool = False,
        sampling: Sampling = GREEDY,
    ) -> list[int]:
        """Continuation of at most n tokens; `halt`: the host has asked for the end before the launch.

        `seed` is that of the order of threads, not of the draw.
        """
        return self._launch(tokens, n, stop, seed, start, None, halt, sampling)

    def prompt(self, tokens: Sequence[int], seed: int = 1, start: int = 0, halt: bool = False) -> None:
        """Bring keys and values of `tokens` into the cache, in passes."""
        passes = self.plan.passes
        assert passes
        own = {
            "prompt": Buffer(4 * len(tokens)),
            "stop_word": Buffer(4, int(halt)),
            "report": Buffer(4 * REPORT_WORDS),
            "scratch": Buffer(passes.scratch_bytes),
        }
        own["prompt"].bytes.view(np.int32)[:] = tokens
        buffers = {**self.buffers, **own}
        args = kernel_args({name: b.address for name, b in buffers.items()}, start, len(tokens), 0)
        message = ctypes.create_string_buffer(200)
        status = self.library.kogc_emulate_prompt(
            ctypes.byref(args), self.plan.blocks, passes.threads, passes.memory_bytes, ctypes.c_uint64(seed), message
        )
        self.report = own["report"].bytes.view(np.uint32).tolist()
        self._check(status, message, buffers)

    def samples(
        self,
        token: int,
        n: int,
        new: int,
        stop: Sequence[int] = (),
        seed: int = 1,
        start: int = 0,
        halt: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        history: Sequence[int] = (),
    ) -> SampledTokens:
        """n continuations of at most `new` tokens each, from `token` at position `start` on.

        halt: samples that the host has asked to end before the launch. `seed` is that of the order of threads.
        """
        plan, cut, words, bias = self.plan, self.plan.samples, record_words(sampling), bias_words(sampling)
        assert cut
        pages = own_pages(start, new)
        own = {
            "prompt": Buffer(4 * (len(history) + 1)),
            "tokens": Buffer(4 * n * new, 0xFF),
            "report": Buffer(4 * REPORT_WORDS),
            "scratch": Buffer(cut.scratch_bytes),
            "records": Buffer(4 * n * new * words),
            "bias": Buffer(bias.nbytes),
            "pages": Buffer(n * pages * page_bytes(plan)),
            "stop_words": Buffer(4 * n),
            "choices": Buffer(n * cut.choice.bytes),
            "logits_log": Buffer(4 * n * new * plan.spec.vocab, 0xFF),
        }
        own["prompt"].bytes.view(np.int32)[:] = (*history, token)
        own["bias"].bytes[:] = bias.view(np.uint8).reshape(-1)
        own["stop_words"].bytes.view(np.int32)[list(halt)] = 1
        buffers = {**self.buffers, **own}
        pointers = {name: b.address for name, b in buffers.items()}
        pointers["prompt"] += 4 * len(history)
        args = sample_args(pointers, n, pages, start, new, stop, sampling, len(history))
        message = ctypes.create_string_buffer(200)
        status = self.library.kogc_emulate_samples(
            ctypes.byref(args), plan.blocks, cut.threads, cut.memory_bytes, ctypes.c_uint64(seed), message
        )
        self.report = own["report"].bytes.view(np.uint32).tolist()
        self._check(status, message, buffers)
        tokens = [[t for t in row if t >= 0] for row in own["tokens"].bytes.view(np.int32).reshape(n, new).tolist()]
        logits = own["logits_log"].bytes.view(np.float32).reshape(new, n, -1)
        records = own["records"].bytes.view(np.int32).reshape(n, new, -1) if words else np.empty((n, 0, 0), np.int32)
        return SampledTokens(
            tokens,
            [logits[: len(made), i].copy() for i, made in enumerate(tokens)],
            [[read_record(record) for record in records[i][: len(made)]] for i, made in enumerate(tokens)],
        )

    def fill(self, n: int, seed: int, amplitude: float) -> np.ndarray:
        """What kogc_fill makes of n BF16 elements: float32 [n]."""
        out = Buffer(2 * n)
        message = ctypes.create_string_buffer(200)
        status = self.library.kogc_emulate_fill(
            ctypes.c_void_p(out.address), ctypes.c_uint64(n), seed, ctypes.c_float(amplitude), 0, message
        )
        self._check(status, message, {"filled": out})
        return (out.bytes.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def read_ceiling(self, stages: int) -> None:
        """Run the loader's bandwidth test over `stages` stages a block."""
        source, sink = Buffer(stages * self.plan.blocks * self.plan.knobs.stage_bytes), Buffer(4)
        message = ctypes.create_string_buffer(200)
        status = self.library.kogc_emulate_read(
            ctypes.c_void_p(source.address),
            ctypes.c_uint64(len(source.bytes)),
            ctypes.c_void_p(sink.address),
            self.plan.blocks,
            self.plan.threads,
            self.plan.memory.bytes,
            message,
        )
        self._check(status, message, {"sink": sink})

    def _check(self, status: int, message: ctypes.Array[ctypes.c_char], buffers: dict[str, Buffer]) -> None:
        if status:
            raise EmulatorError(f"{STATUS[status]}: {message.value.decode()} report {self.report}")
        for name, buffer in buffers.items():
            buffer.check(name)

    def _launch(
        self,
        tokens: Sequence[int],
        n: int,
        stop: Sequence[int],
        seed: int,
        start: int,
        logits: Buffer | None,
        halt: bool = False,
        sampling: Sampling = GREEDY,
    ) -> list[int]:
        words, bias = record_words(sampling), bias_words(sampling)
        own = {
            "exchange": Buffer(self.plan.exchanges.bytes),
            "prompt": Buffer(4 * len(tokens)),
            "tokens": Buffer(4 * n, 0xFF),
            "stop_word": Buffer(4, int(halt)),
            "report": Buffer(4 * REPORT_WORDS),
            "records": Buffer(4 * n * words),
            "bias": Buffer(bias.nbytes),
            **({"logits": logits} if logits else {}),
        }
        own["prompt"].bytes.view(np.int32)[:] = tokens
        own["bias"].bytes[:] = bias.view(np.uint8).reshape(-1)
        buffers = {**self.buffers, **own}
        args = kernel_args({name: b.address for name, b in buffers.items()}, start, len(tokens), n, stop, sampling)
        message = ctypes.create_string_buffer(200)
        plan = self.plan
        status = self.library.kogc_emulate(
            ctypes.byref(args), plan.blocks, plan.threads, plan.memory.bytes, ctypes.c_uint64(seed), message
        )
        self.report = own["report"].bytes.view(np.uint32).tolist()
        self._check(status, message, buffers)
        continuation = own["tokens"].bytes.view(np.int32).tolist()
        made = [token for token in continuation if token >= 0]
        records = own["records"].bytes.view(np.int32).reshape(n, words) if words else []
        self.logprobs = [read_record(record) for record in records[: len(made)]]
        return made


def _load_operands(plan: Plan, checkpoint: Path) -> dict[str, Buffer]:
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "weights.bin"
        with open_checkpoint(checkpoint, plan.spec) as opened:
            write_weights(plan, opened, packed)
        weights = np.fromfile(packed, np.uint8)
    buffers = {}
    for operand in operands(plan):
        if operand.name == "inv_freq":
            continue
        buffers[operand.name] = Buffer(operand.bytes)
        buffers[operand.name].bytes[:] = weights[operand.offset : operand.offset + operand.bytes]
    table = rope.table(rope.inv_freq(plan.spec), plan.max_context, rope.attention_scaling(plan.spec))
    buffers["rope"] = Buffer(table.nbytes)
    buffers["rope"].bytes[:] = table.view(np.uint8).reshape(-1)
    return buffers
