"""Samples: up to 16 continuations of one prompt in one launch, a column of the activations each.

A column more costs a product no weight more. With 16 of them the activations are still small beside the weights, so a
block multiplies the rows of its own slab, as it does for a single stream, and reads all activations: no sum crosses
blocks. A stage of the ring holds a slice of the columns of all its rows, and the activations that they meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .exchange import ExchangeMap, exchange_map
from .matvec import FRAGMENT_BYTES, FRAGMENT_WEIGHTS, LANES, WARPS, MatVec, round_up
from .passes import MEETING_BYTES, PRODUCERS, attention_bytes, lay_out
from .shared_memory import SAMPLING_BYTES, Region

if TYPE_CHECKING:
    from .plan import Plan

CHUNK = 128  # positions of a page
COLUMNS = 16  # samples at most: rows of a tensor-core tile
TILE_ROWS = 8  # rows of weights that a product takes as one tile
MOST_SWEPT = 16  # tiles that a block multiplies at a time
MOST_SPLIT = 4  # tiles that are so few that the warps share the columns instead
STAGES = 4  # of the ring: issuing the copies of a stage takes most of a microsecond, however large they are
FEWEST_STAGES = 2
IN_FLIGHT = 2  # stages whose weights are on their way at once: activations and meetings queue behind them
BARRIER_BYTES = 24  # of a stage: full, empty, landed
WORDS_BYTES = 3072  # templates/cuda/sample_layout.cuh: SampleWords
REDUCE_BYTES = 512  # templates/common/words.h: BlockWords


@dataclass(frozen=True)
class SampleProduct:
    """A phase of a step: this block's rows times 16 columns. slice: fragments of each unit in a stage."""

    phase: MatVec
    slice: int

    @property
    def most_tiles(self) -> int:
        """Of one block."""
        return -(-self.phase.max_units * self.phase.unit // TILE_ROWS)

    @property
    def split(self) -> bool:
        """Whether the warps share the columns, not the rows."""
        return self.most_tiles <= MOST_SPLIT

    @property
    def sweep_tiles(self) -> int:
        """Tiles that the busiest block multiplies at a time."""
        return min(self.most_tiles, MOST_SWEPT)

    @property
    def slice_bytes(self) -> int:
        """Bytes of a stage: fragments of each unit, and the activations of their columns."""
        weights = self.sweep_tiles * (TILE_ROWS // self.phase.unit) * self.slice * FRAGMENT_BYTES
        return weights + self.slice * (FRAGMENT_WEIGHTS // self.phase.unit) * COLUMNS * 2


@dataclass(frozen=True)
class Samples:
    """products: of qkv, o, gate_up, down and the head. choosers: blocks that share the choice of a sample's token.

    memory: shared memory of the kernel; scratch: global memory that it works in; choice: what the choosers of a sample
    exchange, with the sample's logits.
    """

    products: tuple[SampleProduct, ...]
    choosers: int
    stages: int
    stage_bytes: int
    memory: tuple[Region, ...]
    memory_bytes: int
    scratch: tuple[Region, ...]
    scratch_bytes: int
    choice: ExchangeMap

    in_flight = IN_FLIGHT
    columns = COLUMNS
    most_swept = MOST_SWEPT
    words_bytes = WORDS_BYTES

    @property
    def threads(self) -> int:
        return LANES * (WARPS + PRODUCERS)


def samples(plan: Plan) -> Samples | None:
    """How `plan`'s model makes several continuations at once; None for one after the other.

    Not with FP16: the residual stream crosses blocks before its root mean square is known, and could overflow.
    """
    if plan.passes is None or plan.spec.dtype == "fp16":
        return None
    partial = WARPS * MOST_SPLIT * TILE_ROWS * COLUMNS * 4
    work = max(partial, attention_bytes(plan.spec.head_dim, 1), SAMPLING_BYTES)
    _, fixed = lay_out(
        ("work", work), ("words", WORDS_BYTES), ("reduce", REDUCE_BYTES), ("barriers", STAGES * BARRIER_BYTES)
    )
    room = plan.profile.smem_per_block - fixed
    smallest = max(SampleProduct(phase, 1).slice_bytes for phase in plan.phases)
    stages = min(STAGES, room // round_up(smallest, 1024))
    if stages < FEWEST_STAGES:
        return None
    stage_bytes = room // stages // 1024 * 1024
    products = tuple(_slice(phase, stage_bytes) for phase in plan.phases)
    memory = lay_out(
        ("ring", stages * stage_bytes), ("work", work), ("words", WORDS_BYTES), ("reduce", REDUCE_BYTES),
        ("barriers", stages * BARRIER_BYTES),
    )  # fmt: skip
    choosers = max(1, plan.blocks // COLUMNS)
    choice = exchange_map(plan.spec, choosers, 1)
    return Samples(products, choosers, stages, stage_bytes, *memory, *_scratch(plan), choice)


def own_pages(start: int, new: int) -> int:
    """Chunks of the KV cache that a sample needs for itself: for positions `start` to `start` + `new` - 1."""
    return (start + new - 1) // CHUNK - start // CHUNK + 1


def page_bytes(plan: Plan) -> int:
    """Size of one such chunk, over all layers and KV heads."""
    return plan.spec.layers * plan.spec.kv_heads * plan.chunk_bytes


def _slice(phase: MatVec, stage_bytes: int) -> SampleProduct:
    """As many fragments as a stage holds, in slices of the same size."""
    most = max(n for n in range(1, phase.fragments + 1) if SampleProduct(phase, n).slice_bytes <= stage_bytes)
    return SampleProduct(phase, -(-phase.fragments // -(-phase.fragments // most)))


def _scratch(plan: Plan) -> tuple[tuple[Region, ...], int]:
    return lay_out(
        ("barrier", MEETING_BYTES),
        ("halted", COLUMNS * 4),
        ("tokens_chosen", COLUMNS * 4),
        ("squares", plan.blocks * COLUMNS * 4),
        ("residual", COLUMNS * plan.spec.hidden * 4),
        ("normed", COLUMNS * plan.hidden_padded * 2),
        ("attended", COLUMNS * plan.layer_phases[1].columns_padded * 2),
        ("hidden", COLUMNS * plan.layer_phases[3].columns_padded * 2),
        ("qkv_results", COLUMNS * plan.spec.qkv_rows * 4),
        ("keys", COLUMNS * plan.blocks * 8),
    )
