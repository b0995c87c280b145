"""How one mat-vec phase is cut into units of rows and dealt to blocks.

A *fragment* is 512 bytes: the weights one warp multiplies with two tensor-core instructions. In a phase with units
of 8 rows it holds 8 rows x 32 columns; with units of 4 rows it holds 4 rows x 64 columns (two sub-blocks of 4 x 32),
so that a phase whose rows do not divide into eights per block can still be balanced without reading padding.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAGMENT_BYTES = 512
FRAGMENT_WEIGHTS = 256
LANES = 32  # threads of a warp
WARPS = 8  # consumer warps of a block; they share every stage
FEWEST_GROUPS = 4  # of a unit: with fewer, warps would go through units faster than through weights
UNITS = (8, 4)


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class MatVec:
    """One phase `y[rows] = W[rows, columns] @ x[columns]` over `blocks` blocks.

    `rotation` is the first block that gets one unit more than the others when units do not divide evenly.
    `together`: fragments that a warp loads with one instruction, 2 where it has 64 lanes.
    """

    name: str
    rows: int
    columns: int
    unit: int
    blocks: int
    rotation: int
    together: int = 1

    @property
    def columns_padded(self) -> int:
        """Columns as stored: whole fragments, and at least one fragment for every warp in each unit."""
        width = FRAGMENT_WEIGHTS // self.unit
        return max(round_up(self.columns, width * self.together), width * WARPS)

    @property
    def units(self) -> int:
        return -(-self.rows // self.unit)

    @property
    def base(self) -> int:
        """Units every block has at least."""
        return self.units // self.blocks

    @property
    def remainder(self) -> int:
        """Number of blocks that have one unit more."""
        return self.units % self.blocks

    @property
    def max_units(self) -> int:
        return self.base + (1 if self.remainder else 0)

    @property
    def unit_bytes(self) -> int:
        return self.unit * self.columns_padded * 2

    @property
    def fragments(self) -> int:
        """Fragments of one unit."""
        return self.unit_bytes // FRAGMENT_BYTES

    @property
    def group(self) -> int:
        """Consecutive fragments that a warp takes together: the widest of 4, 2, 1 that leaves a unit enough groups."""
        return next(g for g in (4, 2, 1) if self.fragments % g == 0 and self.fragments // g >= FEWEST_GROUPS)

    def rank(self, block: int) -> int:
        """Position of `block` in the order in which units are dealt."""
        return (block - self.rotation) % self.blocks

    def units_of(self, block: int) -> int:
        return self.base + (1 if self.rank(block) < self.remainder else 0)

    def first_unit(self, block: int) -> int:
        rank = self.rank(block)
        return rank * self.base + min(rank, self.remainder)

    def bytes_of(self, block: int) -> int:
        """Bytes of this phase in the slab of `block`, for one layer."""
        return self.units_of(block) * self.unit_bytes

    def rows_of(self, block: int) -> range:
        """Rows of `block`, cut at the true row count (the last unit may be padded)."""
        first = self.first_unit(block) * self.unit
        return range(min(first, self.rows), min(first + self.units_of(block) * self.unit, self.rows))


def cut(name: str, rows: int, columns: int, blocks: int, rotation: int, together: int = 1) -> MatVec:
    """The cut with the fewest bytes on the busiest block; units of 8 rows unless units of 4 gain at least 1 %."""
    eight, four = (MatVec(name, rows, columns, unit, blocks, rotation, together) for unit in UNITS)
    busiest = [phase.max_units * phase.unit_bytes for phase in (eight, four)]
    return four if busiest[1] < 0.99 * busiest[0] else eight
