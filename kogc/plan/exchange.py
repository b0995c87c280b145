"""The exchanges: which words cross blocks, and where they lie in global memory; beside them what a block keeps."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import ModelSpec
from .matvec import round_up

WORD = 4
ALIGN = 128
KEY = 2  # words of a key: what crosses blocks while a token is chosen
LEVELS, BINS, MEASURES = 3, 512, 2  # of a search for a threshold (templates/common/threshold.h)
MOST_LISTED = 64  # the largest top-k that short lists serve (templates/common/shortlist.h)
CANDIDATES = 22  # keys of a block from which log-probabilities are made (templates/common/logprobs.h)
PRIVATE = ("logits", "scores", "seen")  # one word a row of the vocabulary, for its block alone
PARTIAL_EXTRA = 4  # words beside each partial attention output: maximum, sum, and padding to 16 bytes


@dataclass(frozen=True)
class Slot:
    """A vector of words in global memory.

    FP32 words carry in the lowest bit the parity of their use, keys of 64 bits in the lowest eleven bits its count.
    """

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
    """Lay the slots out one after the other. `keys` and `maxima` hold one key a block."""
    sizes = {
        "qkv": spec.qkv_rows,
        "partial": spec.heads * splits * (spec.head_dim + PARTIAL_EXTRA),
        "attention": spec.q_rows,
        "o": spec.hidden,
        "hidden": spec.ffn,
        "down": spec.hidden,
        "keys": KEY * blocks,
        "maxima": KEY * blocks,
        "shortlist": KEY * rows_listed(blocks) * blocks,
        "histogram": KEY * BINS * MEASURES * blocks,
        "totals": KEY * BINS * MEASURES * LEVELS,
        "candidates": KEY * CANDIDATES * blocks,
        **dict.fromkeys(PRIVATE, spec.vocab),
    }
    slots: list[Slot] = []
    offset = 0
    for name, words in sizes.items():
        slots.append(Slot(name, words, offset))
        offset = round_up(offset + words * WORD, ALIGN)
    return ExchangeMap(tuple(slots), offset)


def bins_owned(blocks: int) -> int:
    """Bins of a search that one block adds up over all blocks: a power of two."""
    owned = 1
    while owned * blocks < BINS:
        owned *= 2
    return owned


def rows_listed(blocks: int) -> int:
    """Length of a block's short list: twice its share of the longest top-k, a power of two, and at least 16.

    A tokenizer gives its commonest tokens neighbouring rows, so that one block may hold many of the best; a list that
    is too short costs a search.
    """
    length = 16
    while length * blocks < 2 * MOST_LISTED:
        length *= 2
    return length
