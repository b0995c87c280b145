"""What an AMD code object says of its kernels: the metadata in a note of the ELF file, which the loader reads too."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import KogcError

PT_NOTE = 4
OWNER, METADATA = b"AMDGPU\0", 32  # of the note
REGISTERS = 512  # vector registers that a lane of a SIMD has on CDNA; on RDNA4 there are three times as many
GRANULE = {64: 8, 32: 24}  # registers are given to a wave in multiples of this
MOST_WAVES = {64: 8, 32: 16}  # of a SIMD
SIMDS = {64: 4, 32: 2}  # of a compute unit


@dataclass(frozen=True)
class Kernel:
    """Registers of a lane (vgprs, accumulation registers included) and of a wave (sgprs), spills of either; bytes."""

    name: str
    vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    lds: int
    lanes: int
    threads: int

    @property
    def spills(self) -> bool:
        """Whether anything lies in memory, or moves between registers because there are too few."""
        return bool(self.scratch or self.vgpr_spills or self.sgpr_spills)

    def blocks_resident(self, lds: int, lds_of_unit: int) -> int:
        """Blocks of this kernel that fit a compute unit at once, each with so many bytes of LDS."""
        given = -(-self.vgprs // GRANULE[self.lanes]) * GRANULE[self.lanes]
        registers = REGISTERS if self.lanes == 64 else 3 * REGISTERS
        waves = min(registers // given, MOST_WAVES[self.lanes]) * SIMDS[self.lanes]
        return min(waves * self.lanes // self.threads, lds_of_unit // lds)


def read_kernels(code_object: bytes) -> dict[str, Kernel]:
    """The kernels by name. KogcError for bytes that are no code object."""
    try:
        metadata = next(_unpack(text, 0)[0] for text in _notes(code_object))
        kernels = [_kernel(entry) for entry in metadata["amdhsa.kernels"]]
    except (struct.error, StopIteration, KeyError, IndexError, TypeError):
        raise KogcError("the compiler's output is no AMD code object with metadata") from None
    return {kernel.name: kernel for kernel in kernels}


def _kernel(entry: dict[str, Any]) -> Kernel:
    return Kernel(
        name=entry[".name"],
        vgprs=entry[".vgpr_count"],
        sgprs=entry[".sgpr_count"],
        vgpr_spills=entry[".vgpr_spill_count"],
        sgpr_spills=entry[".sgpr_spill_count"],
        scratch=entry[".private_segment_fixed_size"],
        lds=entry[".group_segment_fixed_size"],
        lanes=entry[".wavefront_size"],
        threads=entry[".max_flat_workgroup_size"],
    )


def _notes(elf: bytes) -> Iterator[bytes]:
    """The texts of the metadata notes of a 64-bit little-endian ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return
    (start,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for i in range(count):
        kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", elf, start + i * size)
        end = at + length
        while kind == PT_NOTE and at < end:
            name, text, what = struct.unpack_from("<III", elf, at)
            at += 12 + -(-name // 4) * 4
            if what == METADATA and elf[at - -(-name // 4) * 4 :][:name] == OWNER:
                yield elf[at : at + text]
            at += -(-text // 4) * 4


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """One value in MessagePack, of the kinds that metadata has, and where the next begins."""
    tag = data[at]
    at += 1
    if tag < 0x80 or tag >= 0xE0:
        return (tag if tag < 0x80 else tag - 256), at
    if tag < 0x90 or tag in (0xDE, 0xDF):
        count, at = _length(data, at, tag, 0x80, {0xDE: 2, 0xDF: 4})
        table = {}
        for _ in range(count):
            key, at = _unpack(data, at)
            table[key], at = _unpack(data, at)
        return table, at
    if tag < 0xA0 or tag in (0xDC, 0xDD):
        count, at = _length(data, at, tag, 0x90, {0xDC: 2, 0xDD: 4})
        items = []
        for _ in range(count):
            item, at = _unpack(data, at)
            items.append(item)
        return items, at
    if tag < 0xC0 or tag in (0xD9, 0xDA):
        count, at = _length(data, at, tag, 0xA0, {0xD9: 1, 0xDA: 2})
        return data[at : at + count].decode(), at + count
    if tag in (0xC2, 0xC3):
        return tag == 0xC3, at
    width = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}[tag]
    return int.from_bytes(data[at : at + width], "big"), at + width


def _length(data: bytes, at: int, tag: int, short: int, widths: dict[int, int]) -> tuple[int, int]:
    """The length that a tag holds or that follows it."""
    width = widths.get(tag, 0)
    return (int.from_bytes(data[at : at + width], "big") if width else tag - short), at + width
