"""The exchanges of a layer: which words cross blocks, and where they lie in global memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import ModelSpec
from .matvec import round_up

WORD = 4
ALIGN = 128
PARTIAL_EXTRA = 4  # words beside each partial attention output: maximum, sum, and padding to 16 bytes


@dataclass(frozen=True)
class Slot:
    """A vector of FP32 words in global memory; the lowest bit of each word is the parity of its use."""

    name: str
    words: int
    offset: int  # bytes from the start of the exchange buffer


@dataclass(frozen=True)
class ExchangeMap:
    slots: tuple[Slot, ...]
    bytes: int

    def __getitem__(self, name: str) -> Slot:
        return next(s for s in self.slots if s.name == name)


def exchange_map(spec: ModelSpec, blocks: int, splits: int) -> ExchangeMap:
    """Lay the slots out one after the other. `keys` holds one 64-bit argmax key a block."""
    sizes = {
        "qkv": spec.qkv_rows,
        "partial": spec.heads * splits * (spec.head_dim + PARTIAL_EXTRA),
        "attention": spec.q_rows,
        "o": spec.hidden,
        "hidden": spec.ffn,
        "down": spec.hidden,
        "keys": 2 * blocks,
    }
    slots: list[Slot] = []
    offset = 0
    for name, words in sizes.items():
        slots.append(Slot(name, words, offset))
        offset = round_up(offset + words * WORD, ALIGN)
    return ExchangeMap(tuple(slots), offset)
