// Tensor-core mat-vec over the ring. All warps share every stage; a warp takes every eighth group of fragments, so its
// partial sums of a unit meet the other warps' in shared memory once a unit.
//
// mma.m16n8k16 with weight rows as B (n = 8 columns of B) and the activation as a row of A. One 16-byte load per lane
// brings row lane / 4, columns (lane % 4) * 8 .. + 7: the k order within a fragment is free as long as A uses the same.
// In units of 4 rows a fragment's lower four B columns hold the rows for one 32-column block and the upper four the
// same rows for the next; A's rows 0 and 1 hold the two blocks of the activation.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE float* partial_sums() { return (float*)(shared() + P::PARTIAL_OFFSET); }
template <class P> KOGC_DEVICE u16* activation() { return (u16*)(shared() + P::ACTIVATION_OFFSET); }

template <class P, class M> struct MatVec {
  static constexpr int GROUPS = Share<P, M>::GROUPS;
  static constexpr int STAGE_GROUPS = P::STAGE_BYTES / (512 * M::GROUP * WARPS);  // groups of one warp in a stage
  static constexpr int SUB_BLOCKS = 8 / M::UNIT;
  static constexpr int UNROLL = GROUPS % (2 * WARPS) == 0 ? 2 : 1;

  // Multiplies this warp's groups of one unit. `taken` counts the warp's groups of the stage at hand.
  static KOGC_DEVICE void unit(Cursor<P>& cursor, int& taken, int& position, const Where& where, float (&sum)[4]) {
    float c[4][4] = {};
    const u16* x = activation<P>() + (lane() & 3) * 8 + (M::UNIT == 8 ? 0 : (lane() >> 2) * 32);
    const bool has_row = lane() < 4 * SUB_BLOCKS;
    const int count = GROUPS % WARPS == 0 ? GROUPS / WARPS : (GROUPS - position + WARPS - 1) / WARPS;
#pragma unroll (UNROLL)
    for (int i = 0; i < count; i++) {
      if (taken == 0) wait_full(cursor, where);
      const char* w = Ring<P>::stage(cursor.slot) + ((taken * WARPS + warp()) * M::GROUP * 32 + lane()) * 16;
      const u16* xs = x + position * M::GROUP * 32 * SUB_BLOCKS;
      Words weights[M::GROUP];
      KOGC_UNROLL for (int f = 0; f < M::GROUP; f++) weights[f] = *(const Words*)(w + f * 512);
      KOGC_UNROLL for (int f = 0; f < M::GROUP; f++) {
        Words a = {0, 0, 0, 0};
        if (has_row) a = *(const Words*)(xs + f * 32 * SUB_BLOCKS);
        mma<P::FP16>(c[f & 1], a.x, 0, a.y, 0, weights[f].x, weights[f].y);
        mma<P::FP16>(c[2 + (f & 1)], a.z, 0, a.w, 0, weights[f].z, weights[f].w);
      }
      position += WARPS;
      if (++taken == STAGE_GROUPS) release(cursor, taken);
    }
    position -= GROUPS;
    KOGC_UNROLL for (int j = 0; j < 4; j++) sum[j] = (c[0][j] + c[1][j]) + (c[2][j] + c[3][j]);
  }

  static KOGC_DEVICE void wait_full(const Cursor<P>& cursor, const Where& where) {
    const typename Trace<P>::Waiting waiting;
    Spin spin;
    while (!barrier_passed(Ring<P>::full(cursor.slot), cursor.parity)) spin.step(where, STAGE_FULL, cursor.parity);
  }

  static KOGC_DEVICE void release(Cursor<P>& cursor, int& taken) {
    sync_warp();
    if (lane() == 0) barrier_arrive(Ring<P>::empty(cursor.slot));
    cursor.advance();
    taken = 0;
  }

  static KOGC_DEVICE void store(int unit, const float (&sum)[4]) {
    float* to = partial_sums<P>() + (unit * WARPS + warp()) * 8;
    const int column = lane() & 3, row = lane() >> 2;  // rows of A: one for units of 8, two for units of 4
    const bool holds = M::UNIT == 8 ? lane() < 4 : lane() < 8 && column / 2 == row;
    if (holds) {
      to[column * 2] = sum[0];
      to[column * 2 + 1] = sum[1];
    }
  }

  static KOGC_DEVICE float add_up(int row) {
    const float* from = partial_sums<P>() + row / M::UNIT * WARPS * 8 + row % M::UNIT;
    float v = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++)
      KOGC_UNROLL for (int s = 0; s < SUB_BLOCKS; s++) v += from[w * 8 + s * M::UNIT];
    return v;
  }
};

// y = W x for this block's rows. `prepare()` runs once on every thread, between the products and the first result;
// `result(i, y...)` gets TOGETHER consecutive rows of the block, starting at its i-th.
template <class P, class M, int TOGETHER, class Prepare, class Result>
KOGC_DEVICE void matvec(Stream<P>& cursor, int units, const Where& where, Prepare prepare, Result result) {
  using V = MatVec<P, M>;
  int taken = 0, position = warp();
  for (int first = 0; first < units; first += P::PARTIAL_UNITS) {
    const int count = units - first < P::PARTIAL_UNITS ? units - first : P::PARTIAL_UNITS;
    if (first) sync();
    for (int u = 0; u < count; u++) {
      float sum[4];
      V::unit(cursor, taken, position, where, sum);
      V::store(u, sum);
    }
    if (first + count == units) {  // the last stage may hold fewer groups than warps times groups
      const int groups = units * V::GROUPS, per_stage = V::STAGE_GROUPS * WARPS;
      const int mine = (groups - warp() + WARPS - 1) / WARPS, stages = (groups + per_stage - 1) / per_stage;
      const int touched = (mine + V::STAGE_GROUPS - 1) / V::STAGE_GROUPS;
      if (taken == 0 && touched < stages) V::wait_full(cursor, where);
      if (taken != 0 || touched < stages) V::release(cursor, taken);
    }
    sync();
    if (first == 0) prepare();
    for (int row = thread() * TOGETHER; row < count * M::UNIT; row += THREADS * TOGETHER) {
      if constexpr (TOGETHER == 2) result(first * M::UNIT + row, V::add_up(row), V::add_up(row + 1));
      else result(first * M::UNIT + row, V::add_up(row));
    }
  }
}

}  // namespace kogc
