"""Passes of many tokens: how a prompt goes through the layers, a tile of tokens at a time.

A token alone is a mat-vec: every block multiplies its own slab and the vectors are small. With 64 tokens the
activations are as large as the weights, and a block that multiplied its own rows with all of them would read more
activations than weights. So a pass cuts each phase anew, in *tiles* of 16 rows: blocks form `groups` times `splits`, a
group shares the rows, and a split of its blocks the columns. The slabs stay as they are; a block copies from whichever
slab holds its part.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .matvec import FRAGMENT_BYTES, LANES, WARPS, MatVec, round_up
from .shared_memory import HEAD_TILE, ROW_PAD, Region

if TYPE_CHECKING:
    from .plan import Plan

TOKENS = (64, 32)  # of a pass
TILE_ROWS = 16  # rows of a tensor-core tile
MOST_TILES = (16, 8, 4)  # that a block multiplies at a time; with more it reads the activations again
SPLITS = (1, 2, 4, 8, 16)
STAGES = 3  # of the ring, each with weights and the activations that they meet: larger slices, fewer copies
FEWEST_STAGES = 2
MOST_TOGETHER = 64  # head_dim of two tiles of attention columns at once: more would spill
WORDS_BYTES = 512  # templates/cuda/pass.cuh: PassWords
MEETING_BYTES = 128  # of the scratch memory, zero at a launch: how often all blocks have met, and whether to stop
PRODUCERS = 4  # warps that issue its copies


@dataclass(frozen=True)
class Product:
    """A phase of a pass: Y[rows, tokens] = W X over `groups` of blocks by rows, and `splits` of each by columns.

    most_swept: tiles that a block multiplies at a time.
    """

    phase: MatVec
    tokens: int
    most_swept: int
    groups: int
    splits: int

    @property
    def tiles(self) -> int:
        """Tiles of all rows; the last may be padded."""
        return -(-self.phase.units * self.phase.unit // TILE_ROWS)

    @property
    def rows_padded(self) -> int:
        return self.tiles * TILE_ROWS

    @property
    def most_tiles(self) -> int:
        """Of one block."""
        return -(-self.tiles // self.groups)

    @property
    def most_fragments(self) -> int:
        """Of one block, along the columns."""
        return -(-self.phase.fragments // self.splits)

    @property
    def fragment_columns(self) -> int:
        return FRAGMENT_BYTES // 2 // self.phase.unit

    @property
    def sweep_tiles(self) -> int:
        """Tiles that the busiest block multiplies at a time."""
        return min(self.most_tiles, self.most_swept)

    def slice_bytes(self, fragments: int) -> int:
        """Bytes of a stage that holds so many fragments of each unit, and the activations of their columns."""
        weights = self.sweep_tiles * (TILE_ROWS // self.phase.unit) * fragments * FRAGMENT_BYTES
        return weights + fragments * self.fragment_columns * self.tokens * 2

    @property
    def traffic(self) -> int:
        """Bytes that the busiest block moves: weights, activations, and partial results there and back."""
        rows = self.most_tiles * TILE_ROWS
        columns = self.most_fragments * self.fragment_columns
        sweeps = -(-self.most_tiles // self.most_swept)
        return rows * columns * 2 + sweeps * columns * self.tokens * 2 + 2 * rows * self.tokens * 4


@dataclass(frozen=True)
class Passes:
    """tokens: of a pass. products: of qkv, o, gate_up, down. tiles_together: column tiles that attention takes at once.

    memory: shared memory of the kernel; scratch: global memory that it works in.
    """

    tokens: int
    products: tuple[Product, ...]
    tiles_together: int
    stages: int
    stage_bytes: int
    memory: tuple[Region, ...]
    memory_bytes: int
    scratch: tuple[Region, ...]
    scratch_bytes: int

    @property
    def threads(self) -> int:
        return LANES * (WARPS + PRODUCERS)

    @property
    def sweep_tiles(self) -> int:
        return max(product.sweep_tiles for product in self.products)

    def slice(self, product: Product) -> int:
        """Fragments of each unit in a stage."""
        fits = 1
        while product.slice_bytes(fits + 1) <= self.stage_bytes:
            fits += 1
        return -(-product.most_fragments // -(-product.most_fragments // fits))  # slices of the same size


def passes(plan: Plan) -> Passes | None:
    """How `plan`'s model takes a prompt, with as many tokens at a time as a block's memory holds; None for none."""
    if plan.target != "cuda":
        return None
    ways = itertools.product(TOKENS, MOST_TILES)
    return next((found for tokens, tiles in ways if (found := _passes(plan, tokens, tiles))), None)


def _passes(plan: Plan, tokens: int, most_tiles: int) -> Passes | None:
    products = tuple(_cut(phase, plan.blocks, tokens, most_tiles) for phase in plan.layer_phases)
    spec = plan.spec
    column_tiles = -(-tokens * spec.group // HEAD_TILE)
    # Two tiles share what is read of the cache, where blocks have two and registers hold them.
    together = 2 if spec.kv_heads * column_tiles > plan.blocks and spec.head_dim <= MOST_TOGETHER else 1
    attention = attention_bytes(spec.head_dim, together)
    _, fixed = lay_out(("attention", attention), ("words", WORDS_BYTES), ("barriers", STAGES * 16))
    smallest = max(product.slice_bytes(1) for product in products)
    room = plan.profile.smem_per_block - fixed
    stages = min(STAGES, room // smallest)
    if stages < FEWEST_STAGES:
        return None
    stage_bytes = room // stages // 1024 * 1024
    memory = lay_out(
        ("ring", stages * stage_bytes), ("attention", attention), ("words", WORDS_BYTES), ("barriers", stages * 16)
    )
    scratch = lay_out(
        ("barrier", MEETING_BYTES),
        ("residual", tokens * spec.hidden * 4),
        ("normed", tokens * plan.hidden_padded * 2),
        ("attended", tokens * plan.layer_phases[1].columns_padded * 2),
        ("hidden", tokens * plan.layer_phases[3].columns_padded * 2),
        *(
            (f"{p.phase.name}_parts", p.splits * tokens * p.rows_padded * 4)
            for p in products
            if p.phase.name != "gate_up"
        ),
    )
    return Passes(tokens, products, together, stages, stage_bytes, *memory, *scratch)


def _cut(phase: MatVec, blocks: int, tokens: int, most_tiles: int) -> Product:
    """The cut with the least traffic; gate and up meet in one block, so theirs must not be split."""
    splits = SPLITS[:1] if phase.name == "gate_up" else SPLITS
    cuts = [Product(phase, tokens, most_tiles, blocks // s, s) for s in splits if s <= min(blocks, phase.fragments)]
    return min(cuts, key=lambda product: product.traffic)


def attention_bytes(head_dim: int, together: int) -> int:
    """Queries in two halves, and the outputs of all warps for a tile of columns, with maximum and sum."""
    queries = together * 2 * HEAD_TILE * (head_dim + ROW_PAD) * 2
    return queries + WARPS * HEAD_TILE * (head_dim + 4) * 4


def lay_out(*sizes: tuple[str, int]) -> tuple[tuple[Region, ...], int]:
    regions = []
    offset = 0
    for name, size in sizes:
        regions.append(Region(name, offset, size))
        offset = round_up(offset + size, 128)
    return tuple(regions), offset
