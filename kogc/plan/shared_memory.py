"""The shared-memory map of a block: the ring first, then the vectors that the phases work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .matvec import WARPS, round_up

if TYPE_CHECKING:
    from .plan import Plan

PARTIAL_UNITS = 32  # units whose partial sums are kept before they are added up
HEAD_TILE = 8  # query heads that one attention block handles: half of the 16 rows of a tensor-core tile
COMBINE_BYTES = 24  # of a thread: a running softmax of four outputs, when splits are combined
WORDS_BYTES = 512  # what a block's threads share beside its vectors (templates/common/words.h)
SAMPLING_BYTES = 8704  # a histogram and what a search finds in it (threshold.h), or rows of short lists (shortlist.h)
NEW_SCALES_BYTES = 16  # exponents of the new key and value of an FP8 cache; what follows is aligned to 16
ROW_PAD = 16  # BF16 elements between query rows, so that the rows of a fragment lie in different banks


@dataclass(frozen=True)
class Region:
    name: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class SharedMemory:
    stages: int
    regions: tuple[Region, ...]
    bytes: int

    def __getitem__(self, name: str) -> Region:
        return next(r for r in self.regions if r.name == name)


def attention_scratch(plan: Plan) -> int:
    """Bytes that a block works in between mat-vecs.

    For attention query rows (high and low halves), the new key and value, the warps' outputs; or what combining splits
    or sampling needs.
    """
    head_dim = plan.spec.head_dim
    query = 2 * HEAD_TILE * (head_dim + ROW_PAD) * 2
    new = 2 * head_dim * 2 + (NEW_SCALES_BYTES if plan.kv_dtype == "fp8" else 0)
    outputs = WARPS * round_up(plan.heads_per_block, 2) * (head_dim + 4) * 4
    return max(query + new + outputs, plan.profile.threads * COMBINE_BYTES, SAMPLING_BYTES)


def shared_memory(plan: Plan) -> SharedMemory:
    """Fixed regions as needed, and as many ring stages as fit beside them."""
    spec = plan.spec
    activation = max(p.columns_padded for p in plan.phases) * 2
    scratch = attention_scratch(plan)
    fixed = [
        ("activation", round_up(max(activation, scratch), 128)),
        ("partial", PARTIAL_UNITS * WARPS * 8 * 4),
        ("residual", round_up(spec.hidden * 4, 128)),
        ("reduce", WORDS_BYTES),
    ]
    used = sum(size for _, size in fixed)
    stages = (plan.profile.smem_per_block - used) // (plan.slot_bytes + 16) if plan.target == "cuda" else 0
    regions = []
    offset = 0
    for name, size in [("ring", stages * plan.slot_bytes), *fixed, ("barriers", stages * 16)]:
        regions.append(Region(name, offset, size))
        offset += size
    return SharedMemory(stages, tuple(regions), offset)
