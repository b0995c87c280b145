"""Passes on a CPU: a prompt goes the way of a single token, many tokens at a time, so that they share what is read.

A block is a core: what it holds of a phase stays in its cache while one token after the other meets it, and exchanges
are cheap. So phases, partition and exchanges are those of decoding, and every token has its own vectors and exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .matvec import round_up
from .shared_memory import COMBINE_BYTES, WORDS_BYTES, Region

if TYPE_CHECKING:
    from .plan import Plan

TOKENS = 16  # of a pass
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class CpuPasses:
    """tokens: of a pass. activation_bytes: from one token's activation to the next's, in a thread's memory.

    exchange_bytes: from one token's exchanges to the next's, in a buffer of their own. memory: of a thread.
    """

    tokens: int
    activation_bytes: int
    exchange_bytes: int
    memory: tuple[Region, ...]
    memory_bytes: int

    def __getitem__(self, name: str) -> Region:
        return next(r for r in self.memory if r.name == name)


def cpu_passes(plan: Plan) -> CpuPasses | None:
    """How a CPU takes a prompt; None for a GPU (see passes.py)."""
    if plan.target != "cpu":
        return None
    spec = plan.spec
    # One line more: where the size of a row is a power of two, all tokens' would share few sets of the cache.
    activation = round_up(2 * max(p.columns_padded for p in plan.phases), LINE) + LINE
    memory = []
    offset = 0
    for name, size in (
        ("activation", TOKENS * activation),
        ("scratch", COMBINE_BYTES * spec.head_dim // 4),
        ("residual", TOKENS * spec.hidden * 4),
        ("reduce", WORDS_BYTES),
    ):
        memory.append(Region(name, offset, size))
        offset = round_up(offset + size, 128)
    # The exchanges of a layer lie first; what chooses a token follows, and a pass chooses none.
    return CpuPasses(TOKENS, activation, plan.exchanges["keys"].offset, tuple(memory), offset)
