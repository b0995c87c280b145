"""Lay weights out as the kernel streams them, write them to one file, and read them back for checks.

A unit of `unit` rows is stored as [columns_padded / 32][unit][32] 16-bit weights: for units of 8 rows each 512-byte
fragment is 32 columns, for units of 4 rows it is two such sub-blocks, so one formula serves both.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from . import rope
from .artifact import Operand
from .checkpoint import EMBEDDING, F32, FINAL_NORM, HEAD, Bits, Checkpoint, layer_name, to_float32
from .errors import KogcError
from .plan.matvec import MatVec, round_up
from .plan.plan import Plan
from .spec import ModelSpec

ALIGN = 4096  # of each operand in the file
LANE = 32  # columns that lie together
JOB_BYTES = 1 << 23
THREADS = 4
ITEM_BYTES = {"uint8": 1, "uint16": 2, "float32": 4}
LAYOUTS = {
    "slabs": "a slab per block: layers of qkv, o, gate_up, down, then head; units of [columns/32][rows][32]",
    "norms": "input and post-attention norm of each layer, then the final norm",
    "qk_norms": "query norm, key norm of each layer",
    "qkv_bias": "query, key, value rows of each layer",
}

Progress = Callable[[int, int], None]
Read = Callable[[int, int], bytes]


def operands(plan: Plan) -> list[Operand]:
    """The arrays of the weights file in their order; those that the model does not have are left out."""
    s = plan.spec
    arrays: list[tuple[str, str, tuple[int, ...]]] = [
        ("slabs", "uint8", (plan.blocks * plan.slab_bytes,)),
        ("embedding", "uint16", (s.vocab, s.hidden)),
        ("norms", "uint16", (2 * s.layers + 1, s.hidden)),
    ]
    if s.qk_norm:
        arrays.append(("qk_norms", "uint16", (s.layers, 2, s.head_dim)))
    if s.qkv_bias:
        arrays.append(("qkv_bias", "uint16", (s.layers, s.qkv_rows)))
    arrays.append(("inv_freq", "float32", (s.head_dim // 2,)))
    out: list[Operand] = []
    offset = 0
    for name, dtype, shape in arrays:
        size = math.prod(shape) * ITEM_BYTES[dtype]
        out.append(Operand(name, dtype, shape, offset, size, LAYOUTS.get(name, "row major")))
        offset = round_up(offset + size, ALIGN)
    return out


def total_bytes(plan: Plan) -> int:
    """Size of the weights file: a multiple of 4096."""
    last = operands(plan)[-1]
    return round_up(last.offset + last.bytes, ALIGN)


def pack_units(phase: MatVec, rows: Bits) -> Bits:
    """Rows from the start of a unit -> whole units [units, columns_padded / 32, unit, 32], padded with zeros."""
    count, columns = rows.shape
    units = -(-count // phase.unit)
    height, width = units * phase.unit, round_up(columns, LANE)
    if (height, width) != rows.shape:
        padded = np.zeros((height, width), np.uint16)
        padded[:count, :columns] = rows
        rows = padded
    lanes = width // LANE
    out = np.empty((units, phase.columns_padded // LANE, phase.unit, LANE), np.uint16)
    out[:, :lanes] = rows.reshape(units, phase.unit, lanes, LANE).transpose(0, 2, 1, 3)
    out[:, lanes:] = 0
    return out


def unpack_units(phase: MatVec, units: Bits) -> Bits:
    """The inverse: [units, columns_padded / 32, unit, 32] -> [units * unit, columns], padding rows included."""
    rows: Bits = units.transpose(0, 2, 1, 3).reshape(-1, phase.columns_padded)
    return rows[:, : phase.columns]


def pack_rows(phase: MatVec, block: int, rows: Bits) -> bytes:
    """The rows of `block` (phase.rows_of(block), in order) -> its bytes in the slab, phase.bytes_of(block) long."""
    if rows.shape != (len(phase.rows_of(block)), phase.columns):
        raise ValueError(f"{phase.name}: block {block} has {len(phase.rows_of(block))} rows of {phase.columns} columns")
    return pack_units(phase, rows).tobytes()


def unpack_rows(phase: MatVec, block: int, data: bytes) -> Bits:
    """The inverse of pack_rows: uint16 [rows of the block, columns]."""
    shape = (phase.units_of(block), phase.columns_padded // LANE, phase.unit, LANE)
    units: Bits = np.frombuffer(data, np.uint16).reshape(shape)
    return unpack_units(phase, units)[: len(phase.rows_of(block))]


@dataclass(frozen=True)
class Part:
    """A tensor's place among the rows of a phase: its row r is row `first + r * step`."""

    name: str
    rows: int
    first: int
    step: int


def phase_parts(spec: ModelSpec, layer: int, phase: str) -> tuple[Part, ...]:
    """The tensors of a phase: stacked, except gate and up, whose rows alternate. A tied head counts as lm_head too."""
    if phase == "head":
        return (Part(HEAD, spec.vocab, 0, 1),)
    if phase == "gate_up":
        names = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
        return tuple(Part(layer_name(layer, name), spec.ffn, i, 2) for i, name in enumerate(names))
    if phase == "qkv":
        attention = layer_name(layer, "self_attn.")
        return (
            Part(attention + "q_proj.weight", spec.q_rows, 0, 1),
            Part(attention + "k_proj.weight", spec.kv_rows, spec.q_rows, 1),
            Part(attention + "v_proj.weight", spec.kv_rows, spec.q_rows + spec.kv_rows, 1),
        )
    name = {"o": "self_attn.o_proj.weight", "down": "mlp.down_proj.weight"}[phase]
    return (Part(layer_name(layer, name), spec.hidden, 0, 1),)


def write_weights(plan: Plan, checkpoint: Checkpoint, path: str | Path, progress: Progress | None = None) -> None:
    """Write all operands of a verified checkpoint to `path`: whole, or (on any error or Ctrl-C) not at all.

    The bytes depend on plan and weights only. `progress(done, total)` counts bytes written. Memory: tens of megabytes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb", buffering=0) as file:
                _reserve(file.fileno(), total_bytes(plan))
                _run(list(_jobs(plan, checkpoint, _Output(file.fileno()))), _payload(plan), progress)
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as err:
            raise KogcError(f"{path}: cannot write: {err.strerror or err}") from err
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _reserve(fd: int, size: int) -> None:
    """Take the space at once, so that a full disk is found before the work is done; unwritten bytes read as zeros."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(fd, size)  # a file system that cannot reserve: the writes will tell


Job = Callable[[], int]


def _jobs(plan: Plan, checkpoint: Checkpoint, out: _Output) -> Iterator[Job]:
    """Independent pieces of work, each of about JOB_BYTES, which return the bytes they wrote."""
    spec = plan.spec
    for layer in range(spec.layers + 1):
        for phase in plan.layer_phases if layer < spec.layers else (plan.head,):
            step = max(1, JOB_BYTES // phase.unit_bytes)
            for unit in range(0, phase.units, step):
                yield partial(_write_units, plan, checkpoint, out, layer, phase, unit, min(unit + step, phase.units))
    places = {operand.name: operand.offset for operand in operands(plan)}
    yield from _table_jobs(spec, checkpoint, out, places["embedding"])
    for name, vectors in _small_operands(spec):
        yield partial(_write_vectors, checkpoint, out, places[name], vectors)
    frequencies = rope.inv_freq(spec).astype("<f4")
    yield partial(out.write, memoryview(frequencies.tobytes()), places["inv_freq"])


def _write_units(
    plan: Plan, checkpoint: Checkpoint, out: _Output, layer: int, phase: MatVec, start: int, stop: int
) -> int:
    """Units start..stop of a phase, written to the slabs of the blocks that own them."""
    rows = _phase_rows(plan.spec, checkpoint, layer, phase, start * phase.unit, stop * phase.unit)
    packed = pack_units(phase, rows)
    done = 0
    for offset, first, last in _runs(plan, layer, phase, start, stop):
        done += out.write(packed[first - start : last - start].data.cast("B"), offset)
    return done


def _write_vectors(checkpoint: Checkpoint, out: _Output, offset: int, vectors: list[tuple[str, int]]) -> int:
    values = np.concatenate([checkpoint.rows(name, 0, length) for name, length in vectors])
    return out.write(values.data.cast("B"), offset)


def _table_jobs(spec: ModelSpec, checkpoint: Checkpoint, out: _Output, offset: int) -> Iterator[Job]:
    step = max(1, JOB_BYTES // (spec.hidden * 2))
    for start in range(0, spec.vocab, step):
        stop = min(start + step, spec.vocab)
        yield partial(_write_embedding, checkpoint, out, offset + start * spec.hidden * 2, start, stop)


def _write_embedding(checkpoint: Checkpoint, out: _Output, offset: int, start: int, stop: int) -> int:
    return out.write(checkpoint.rows(EMBEDDING, start, stop).data.cast("B"), offset)


def _small_operands(spec: ModelSpec) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Operands that are runs of vectors: name, and (tensor, elements) in order."""
    layers = range(spec.layers)
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    names = [layer_name(layer, name) for layer in layers for name in norms]
    yield "norms", [(name, spec.hidden) for name in (*names, FINAL_NORM)]
    if spec.qk_norm:
        qk = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
        yield "qk_norms", [(layer_name(layer, name), spec.head_dim) for layer in layers for name in qk]
    if spec.qkv_bias:
        rows = {"q_proj": spec.q_rows, "k_proj": spec.kv_rows, "v_proj": spec.kv_rows}
        yield "qkv_bias", [(layer_name(layer, f"self_attn.{k}.bias"), n) for layer in layers for k, n in rows.items()]


def _phase_rows(spec: ModelSpec, checkpoint: Checkpoint, layer: int, phase: MatVec, start: int, stop: int) -> Bits:
    """Rows start..stop of a phase, cut at its last row: uint16 [rows, columns]."""
    stop = min(stop, phase.rows)
    parts = phase_parts(spec, layer, phase.name)
    if len(parts) == 1:
        return checkpoint.rows(parts[0].name, start, stop)
    out = np.empty((stop - start, phase.columns), np.uint16)
    for part in parts:
        # Rows of the tensor that fall into start..stop.
        first = max(0, -(-(start - part.first) // part.step))
        last = min(part.rows, -(-(stop - part.first) // part.step))
        if first < last:
            at = part.first + first * part.step - start
            out[at : at + (last - first - 1) * part.step + 1 : part.step] = checkpoint.rows(part.name, first, last)
    return out


def _runs(plan: Plan, layer: int, phase: MatVec, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Units start..stop as stored: (byte offset in the slabs, first unit, unit after the last), a run a block."""
    rank = _rank_of(phase, start)
    while start < stop:
        block = (phase.rotation + rank) % phase.blocks
        first = phase.first_unit(block)
        last = min(first + phase.units_of(block), stop)
        if start < last:
            slab = block * plan.slab_bytes + plan.slab_offset(layer, phase, block)
            yield slab + (start - first) * phase.unit_bytes, start, last
            start = last
        rank += 1


def _rank_of(phase: MatVec, unit: int) -> int:
    """Place, in the order of dealing, of the block that owns a unit: the first blocks have one unit more."""
    more = phase.remainder * (phase.base + 1)
    return unit // (phase.base + 1) if unit < more else phase.remainder + (unit - more) // phase.base


def _payload(plan: Plan) -> int:
    """Bytes that the jobs write: all operands without the gaps at the ends of slabs."""
    return plan.weight_bytes + sum(operand.bytes for operand in operands(plan) if operand.name != "slabs")


def _run(jobs: list[Job], total: int, progress: Progress | None) -> None:
    """Run all jobs on a few threads (reading, packing and writing all release the interpreter lock)."""
    done = 0
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        try:
            for future in as_completed([pool.submit(job) for job in jobs]):
                done += future.result()
                if progress:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs is short; leaving the `with` waits for it
            raise


class _Output:
    """The file under way. One thread writes at a time: the kernel locks the file anyway, and spins while it waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def write(self, data: memoryview, offset: int) -> int:
        """Write all of it; returns its bytes."""
        size = len(data)
        with self._lock:
            while len(data):
                n = os.pwrite(self._fd, data, offset)
                data = data[n:]
                offset += n
        return size


class SlabWeights:
    """The float32 tensors that a packed operand file (or device memory) actually holds, under their usual names.

    lm_head.weight is always what the slabs hold, also of a tied model, whose embedding is stored a second time.
    `read(offset, n)` returns n bytes at an offset of the weights file. Thread-safe if `read` is.
    """

    def __init__(self, plan: Plan, read: Read) -> None:
        self.plan = plan
        self._read = read
        self._places = {operand.name: operand for operand in operands(plan)}
        self._matrices = self._find_matrices()
        self._vectors = self._find_vectors()
        # Gate and up alternate in the same units: what was read for one serves the other.
        self._last = threading.local()

    def float_rows(self, name: str, start: int, stop: int) -> F32:
        """Rows start..stop of a tensor: float32 [stop - start, columns]; of a vector, its elements."""
        dtype = self.plan.spec.dtype
        if name == EMBEDDING:
            return to_float32(self._embedding(start, stop), dtype)
        if name in self._vectors:
            offset, _ = self._vectors[name]
            data = np.frombuffer(self._read(offset + 2 * start, 2 * (stop - start)), "<u2")
            return to_float32(data, dtype)
        layer, phase, part = self._matrices[name]
        if start == stop:
            return np.empty((0, phase.columns), np.float32)
        first = part.first + start * part.step
        last = part.first + (stop - 1) * part.step + 1
        rows = self._units(layer, phase, first // phase.unit, -(-last // phase.unit))
        begin = first - first // phase.unit * phase.unit
        return to_float32(rows[begin : begin + last - first : part.step], dtype)

    def tensor(self, name: str) -> F32:
        """A whole tensor; for small models."""
        spec = self.plan.spec
        if name == EMBEDDING:
            return self.float_rows(name, 0, spec.vocab)
        rows = self._vectors[name][1] if name in self._vectors else self._matrices[name][2].rows
        return self.float_rows(name, 0, rows)

    def inv_freq(self) -> F32:
        """The rotary frequencies: float32 [head_dim / 2]."""
        place = self._places["inv_freq"]
        return np.frombuffer(self._read(place.offset, place.bytes), "<f4").astype(np.float32)

    def _embedding(self, start: int, stop: int) -> Bits:
        hidden = self.plan.spec.hidden
        offset = self._places["embedding"].offset + start * hidden * 2
        return np.frombuffer(self._read(offset, (stop - start) * hidden * 2), "<u2").reshape(stop - start, hidden)

    def _units(self, layer: int, phase: MatVec, start: int, stop: int) -> Bits:
        """All rows of units start..stop of a phase: uint16 [rows, columns]."""
        key = (layer, phase.name, start, stop)
        if getattr(self._last, "key", None) != key:
            base = self._places["slabs"].offset
            data = b"".join(
                self._read(base + offset, (last - first) * phase.unit_bytes)
                for offset, first, last in _runs(self.plan, layer, phase, start, stop)
            )
            shape = (stop - start, phase.columns_padded // LANE, phase.unit, LANE)
            self._last.rows = unpack_units(phase, np.frombuffer(data, "<u2").reshape(shape))
            self._last.key = key
        rows: Bits = self._last.rows
        return rows

    def _find_matrices(self) -> dict[str, tuple[int, MatVec, Part]]:
        spec, out = self.plan.spec, {}
        for layer in range(spec.layers + 1):
            for phase in self.plan.layer_phases if layer < spec.layers else (self.plan.head,):
                for part in phase_parts(spec, layer, phase.name):
                    out[part.name] = (layer, phase, part)
        return out

    def _find_vectors(self) -> dict[str, tuple[int, int]]:
        """Name -> (byte offset in the file, elements)."""
        out: dict[str, tuple[int, int]] = {}
        for operand, vectors in _small_operands(self.plan.spec):
            offset = self._places[operand].offset
            for name, length in vectors:
                out[name] = (offset, length)
                offset += 2 * length
        return out
