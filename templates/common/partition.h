// Which rows of a mat-vec phase this block holds; the same arithmetic as kogc/plan/matvec.py.
// M: ROWS, COLUMNS, COLUMNS_PADDED, UNIT, BASE, REMAINDER, ROTATION, GROUP.
#pragma once

namespace kogc {

template <class P, class M> struct Share {
  int units, first_row;

  KOGC_DEVICE Share() {
    int rank = block() - M::ROTATION;
    if (rank < 0) rank += P::BLOCKS;
    const bool extra = rank < M::REMAINDER;
    units = M::BASE + extra;
    first_row = (rank * M::BASE + (extra ? rank : M::REMAINDER)) * M::UNIT;
  }

  static constexpr int UNIT_BYTES = M::UNIT * M::COLUMNS_PADDED * 2;
  static constexpr int GROUPS = UNIT_BYTES / 512 / M::GROUP;  // groups of fragments in a unit
};

}  // namespace kogc
