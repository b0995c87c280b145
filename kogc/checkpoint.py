"""Read a Hugging Face checkpoint directory as a stream of rows, and check it whole before anything is built from it.

Weights are read with pread, a range of rows at a time, so a tensor is never held whole unless the caller asks for all
of its rows. Numbers leave as raw 16-bit patterns of the spec's dtype, or as float32.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .config_json import read_json
from .errors import KogcError
from .spec import ModelSpec

Bits = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]

MODEL = "model.safetensors"
BARE = "model."  # what the names of a causal model's tensors have before those of the bare model
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_RANK = 8
COMPARE_BYTES = 1 << 23

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# safetensors name -> (name in a spec, name for people)
FLOATS = {"BF16": ("bf16", "bfloat16"), "F16": ("fp16", "float16"), "F32": ("fp32", "float32")}
LONG_NAME = {"bf16": "bfloat16", "fp16": "float16"}
INFINITY = {"bf16": 0x7F80, "fp16": 0x7C00}  # the pattern; those above are NaN
SIGN = 0x8000

# Buffers that old exports wrote beside the weights; the model recomputes them.
HARMLESS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset` in bytes from the start of `file`; dtype in safetensors' names."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    def error(self, message: str) -> KogcError:
        return KogcError(f"{self.file}: {_show(self.name)}: {message}")


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the spec needs, in the order in which a forward pass uses them."""
    s = spec
    out: dict[str, tuple[int, ...]] = {EMBEDDING: (s.vocab, s.hidden)}
    for layer in range(s.layers):
        out.update({layer_name(layer, part): shape for part, shape in _layer_tensors(s)})
    out[FINAL_NORM] = (s.hidden,)
    if not s.tied_embeddings:
        out[HEAD] = (s.vocab, s.hidden)
    return out


def layer_name(layer: int, part: str) -> str:
    """Full tensor name of a part of a layer, such as self_attn.q_proj.weight."""
    return f"model.layers.{layer}.{part}"


def _layer_tensors(s: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "input_layernorm.weight", (s.hidden,)
    rows = {"q_proj": s.q_rows, "k_proj": s.kv_rows, "v_proj": s.kv_rows}
    for name, n in rows.items():
        yield f"self_attn.{name}.weight", (n, s.hidden)
    if s.qkv_bias:
        for name, n in rows.items():
            yield f"self_attn.{name}.bias", (n,)
    if s.qk_norm:
        yield "self_attn.q_norm.weight", (s.head_dim,)
        yield "self_attn.k_norm.weight", (s.head_dim,)
    yield "self_attn.o_proj.weight", (s.hidden, s.q_rows)
    yield "post_attention_layernorm.weight", (s.hidden,)
    yield "mlp.gate_proj.weight", (s.ffn, s.hidden)
    yield "mlp.up_proj.weight", (s.ffn, s.hidden)
    yield "mlp.down_proj.weight", (s.hidden, s.ffn)


class Checkpoint:
    """An open checkpoint. Call `verify(spec)` before reading rows as bits; close it, or use it in a `with`.

    tensors: every tensor by name. files: the safetensors files, sorted. notes: remarks for the user, one line each.
    Reading is thread-safe.
    """

    def __init__(self, path: Path, files: list[Path], tensors: dict[str, TensorEntry]) -> None:
        self.path = path
        self.files = files
        self.tensors = tensors
        self.notes: list[str] = []
        self._dtype: str | None = None
        self._tied = False
        self._handles: dict[Path, int] = {}
        for file in files:
            self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; rows can no longer be read."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def verify(self, spec: ModelSpec) -> None:
        """Refuse a checkpoint that is not exactly the spec's model; sets the dtype that `rows` gives.

        KogcError names the file and the first tensor that is missing, misshapen, of a type that is not BF16, FP16 or
        FP32, or unknown (such as a bias that the model has no place for).
        """
        expected = expected_tensors(spec)
        if spec.tied_embeddings and EMBEDDING not in self.tensors and HEAD in self.tensors:
            self.tensors[EMBEDDING] = self.tensors.pop(HEAD)  # of two names of one tensor, some writers keep the other
        for name, shape in expected.items():
            self._check_tensor(name, shape)
        for name, entry in self.tensors.items():
            if name not in expected and not HARMLESS.fullmatch(name):
                self._check_extra(spec, entry)
        self._dtype = spec.dtype
        self._tied = spec.tied_embeddings
        self._note_rounding(spec, expected)

    def rows(self, name: str, start: int, stop: int) -> Bits:
        """Rows start..stop of a tensor as raw 16-bit patterns of the spec's dtype: [stop - start, columns].

        A tensor of one dimension gives its elements start..stop: [stop - start]. The lm_head.weight of a tied model is
        its embedding. KogcError names file and tensor where a number is infinite or none, or becomes so by rounding.
        """
        if self._dtype is None:
            raise ValueError("verify(spec) comes before rows()")
        entry = self.tensors[EMBEDDING if name == HEAD and self._tied else name]
        raw = self._raw(entry, start, stop)
        out = convert(raw, FLOATS[entry.dtype][0], self._dtype)
        if not all_finite(out, self._dtype):
            raise _not_finite(entry, raw, out, self._dtype)
        return out

    def float_rows(self, name: str, start: int, stop: int) -> F32:
        """The same rows as float32, after the rounding to the spec's dtype."""
        bits = self.rows(name, start, stop)
        assert self._dtype is not None
        return to_float32(bits, self._dtype)

    def _raw(self, entry: TensorEntry, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows as stored: uint16 patterns, or float32."""
        if not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows {start}..{stop} of {entry.name} with {entry.shape[0]} rows")
        item = np.dtype("<f4") if entry.dtype == "F32" else np.dtype("<u2")
        row = math.prod(entry.shape[1:])
        out = np.empty((stop - start, *entry.shape[1:]), item)
        self._read_into(entry, out.data.cast("B") if out.size else memoryview(b""), start * row * item.itemsize)
        return out

    def _read_into(self, entry: TensorEntry, view: memoryview, offset: int) -> None:
        position = entry.offset + offset
        while len(view):
            try:
                n = os.preadv(self._handles[entry.file], [view], position)
            except OSError as err:
                raise entry.error(f"cannot read: {err.strerror}") from err
            if n == 0:
                raise entry.error("the file became shorter while it was read")
            view = view[n:]
            position += n

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.tensors.get(name)
        if entry is None:
            raise KogcError(f"{self._source()}: {name}: missing tensor, expected with shape {list(shape)}")
        if entry.shape != shape:
            raise entry.error(f"has shape {_shape(entry.shape)}, the spec needs {_shape(shape)}")
        if entry.dtype not in FLOATS:
            raise entry.error(f"has dtype {entry.dtype}, only {', '.join(FLOATS)} can be read")

    def _source(self) -> Path:
        """The file that an error about an absent tensor names."""
        return self.files[0] if len(self.files) == 1 else self.path / INDEX

    def _check_extra(self, spec: ModelSpec, entry: TensorEntry) -> None:
        if entry.name != HEAD:  # so the head is tied, and this is a copy of the embedding or a contradiction
            raise entry.error(f"a tensor that a {spec.family} model of this config.json does not have")
        self._check_tensor(HEAD, (spec.vocab, spec.hidden))
        step = max(1, COMPARE_BYTES // (spec.hidden * 4))
        for start in range(0, spec.vocab, step):
            stop = min(start + step, spec.vocab)
            # As they would be packed: of the two, one may be stored in another type.
            head, embedding = (
                convert(self._raw(tensor, start, stop), FLOATS[tensor.dtype][0], spec.dtype)
                for tensor in (entry, self.tensors[EMBEDDING])
            )
            if not np.array_equal(head, embedding):
                raise entry.error(f"differs from {EMBEDDING}, although the two are tied (tie_word_embeddings)")

    def _note_rounding(self, spec: ModelSpec, expected: dict[str, tuple[int, ...]]) -> None:
        kinds = Counter(self.tensors[name].dtype for name in expected)
        self.notes = [
            f"{self.path}: rounded from {FLOATS[kind][1]} to {LONG_NAME[spec.dtype]}: {n} of {len(expected)} tensors"
            for kind, n in sorted(kinds.items())
            if FLOATS[kind][0] != spec.dtype
        ]


def open_checkpoint(path: str | Path, spec: ModelSpec | None = None) -> Checkpoint:
    """Open a checkpoint directory (config.json, and model.safetensors or its shards with an index).

    All headers are read and checked; with `spec` the tensors are verified too. KogcError names file and tensor.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise KogcError(f"{directory}: no such checkpoint directory")
    if not (directory / "config.json").is_file():
        raise KogcError(f"{directory / 'config.json'}: missing")
    if (directory / MODEL).exists():
        files = [directory / MODEL]
        tensors = read_header(files[0])
    elif (directory / INDEX).exists():
        files, tensors = _read_shards(directory)
    else:
        found = sorted(f.name for pattern in ("*.bin", "*.pth", "*.gguf") for f in directory.glob(pattern))
        other = f" (found {found[0]}, which is not read; convert it to safetensors)" if found else ""
        raise KogcError(f"{directory}: neither {MODEL} nor {INDEX}{other}")
    checkpoint = Checkpoint(directory, files, _of_the_whole_model(tensors))
    if spec is not None:
        try:
            checkpoint.verify(spec)
        except BaseException:
            checkpoint.close()
            raise
    return checkpoint


def _of_the_whole_model(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors by the names of a causal model: saved from the bare one (AutoModel) they have no `model.`."""
    if EMBEDDING in tensors or EMBEDDING.removeprefix(BARE) not in tensors:
        return tensors
    return {name if name == HEAD else BARE + name: entry for name, entry in tensors.items()}


def _read_shards(directory: Path) -> tuple[list[Path], dict[str, TensorEntry]]:
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KogcError(f"{index}: weight_map: expected an object that names a file for each tensor")
    for name, shard in weight_map.items():
        # A plain file name only: an index must not reach outside its directory.
        if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", shard):
            raise KogcError(f"{index}: {_show(name)}: {_show(str(shard))} is not a name of a safetensors file")
    files = [directory / shard for shard in sorted(set(weight_map.values()))]
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        if not file.exists():
            raise KogcError(f"{file}: missing, although {INDEX} names it")
        for name, entry in read_header(file).items():
            if name in tensors:
                raise entry.error(f"is in {tensors[name].file.name} as well")
            tensors[name] = entry
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise KogcError(f"{directory / shard}: {_show(name)}: missing, although {INDEX} places it here")
    return files, tensors


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, none of them read. KogcError for any header that is not sound."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise KogcError(f"{file}: not a regular file")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise KogcError(f"{file}: truncated: {size} bytes are not a safetensors file")
            if length > MAX_HEADER_BYTES:
                raise KogcError(f"{file}: not a safetensors file: its header would have {length} bytes")
            if 8 + length > size:
                raise KogcError(f"{file}: truncated: header says {8 + length} bytes, the file has {size}")
            text = stream.read(length)
    except OSError as err:
        raise KogcError(f"{file}: cannot read: {err.strerror}") from err
    table = _parse_header(file, text)
    table.pop("__metadata__", None)
    tensors = {name: _entry(file, name, value, 8 + length) for name, value in table.items()}
    _check_extents(file, list(tensors.values()), 8 + length, size)
    return tensors


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as err:
        raise KogcError(f"{file}: safetensors header is nested too deeply") from err
    except ValueError as err:  # wrong JSON, wrong UTF-8, a duplicate name or an absurd number
        raise KogcError(f"{file}: safetensors header is not valid JSON: {_show(str(err))}") from err
    if not isinstance(table, dict):
        raise KogcError(f"{file}: safetensors header is not a JSON object")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        name = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"{name} is there twice")
    return out


def _entry(file: Path, name: str, value: Any, base: int) -> TensorEntry:
    where = f"{file}: {_show(name)}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise KogcError(f"{where}: header entry without dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise KogcError(f"{where}: unknown dtype {_show(str(dtype))}")
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise KogcError(f"{where}: shape is not a list of up to {MAX_RANK} sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise KogcError(f"{where}: data_offsets is not a pair of positions")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise KogcError(f"{where}: shape {_shape(tuple(shape))} of {dtype} takes {needed} bytes, not {end - begin}")
    return TensorEntry(name, file, dtype, tuple(shape), base + begin, needed)


def _sizes(value: Any) -> bool:
    """A list of integers that a file position can hold."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _check_extents(file: Path, entries: list[TensorEntry], base: int, size: int) -> None:
    """The tensors must fill the file after its header exactly, one after the other."""
    position = base
    for entry in sorted(entries, key=lambda e: (e.offset, e.bytes)):
        if entry.offset < position:
            raise entry.error("overlaps the tensor before it")
        if entry.offset > position:
            raise entry.error(f"leaves a gap of {entry.offset - position} bytes before it")
        position += entry.bytes
    if position != size:
        what = "truncated" if position > size else "too long"
        raise KogcError(f"{file}: {what}: header says {position} bytes, the file has {size}")


def convert(values: npt.NDArray[Any], source: str, target: str) -> Bits:
    """Raw patterns of `target` (bf16 or fp16) from raw patterns of `source`, or from float32 (`source` fp32).

    Rounds to nearest, ties to even; what is too large becomes infinite.
    """
    if source == target:
        bits: Bits = values.view(np.uint16)
        return bits
    wide = values if source == "fp32" else to_float32(values, source)
    if target == "bf16":
        return to_bf16(wide)
    with np.errstate(over="ignore"):
        halves: Bits = wide.astype(np.float16).view(np.uint16)
    return halves


def to_bf16(values: F32) -> Bits:
    """BF16 patterns of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    words = values.view(np.uint32)
    rounded = words + (np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1)))
    nan = np.isnan(values)
    if nan.any():
        rounded = np.where(nan, words | np.uint32(0x400000), rounded)
    out: Bits = (rounded >> np.uint32(16)).astype(np.uint16)
    return out


def to_float32(bits: Bits, dtype: str) -> F32:
    """Float32 values of raw 16-bit patterns (`dtype` bf16 or fp16); exact."""
    if dtype == "fp16":
        return bits.view(np.float16).astype(np.float32)
    words = np.empty(bits.shape, np.uint32)
    np.left_shift(bits, np.uint32(16), out=words, dtype=np.uint32)
    return words.view(np.float32)


def all_finite(bits: Bits, dtype: str) -> bool:
    """Whether raw patterns (`dtype` bf16 or fp16) are all numbers, in two passes at the speed of memory.

    Infinities and NaN are the largest patterns of either sign: as signed integers of the positive, as unsigned ones of
    the negative.
    """
    infinity = INFINITY[dtype]
    return bits.size == 0 or bool(bits.view(np.int16).max() < infinity and bits.max() < infinity | SIGN)


def _not_finite(entry: TensorEntry, raw: npt.NDArray[Any], bits: Bits, dtype: str) -> KogcError:
    """What is wrong with rows that are not all finite: as they are stored, or after the rounding."""
    source = FLOATS[entry.dtype][0]
    stored = raw if source == "fp32" else to_float32(raw, source)
    lost = stored[np.isfinite(stored) & ~np.isfinite(to_float32(bits, dtype))]
    if lost.size:  # a finite weight must not become infinite: that would be another model
        return entry.error(f"holds {lost[0]:g}, which {LONG_NAME[dtype]} cannot hold")
    return entry.error(f"holds {stored[~np.isfinite(stored)][0]:g}: the weights are broken")


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _show(text: str) -> str:
    """A name from a file made fit for one line."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= 120 else shown[:117] + "..."
