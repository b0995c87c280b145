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

template <class P, class M> class MatVec {
 public:
  static constexpr int GROUPS = Share<P, M>::GROUPS;
  static constexpr int STAGE_GROUPS = P::STAGE_BYTES / (512 * M::GROUP * WARPS);  // groups of one warp in a stage

  KOGC_DEVICE MatVec(Stream<P>& cursor, const Where& where) : cursor_(cursor), where_(where), free_(cursor.slot) {}

  // Products of this warp's groups of `units` more units; their partial sums go to shared memory. The weights of a group
  // are on their way from shared memory while the group before is multiplied.
  KOGC_DEVICE void multiply(int units) {
    const int count = (units * GROUPS - position_ + WARPS - 1) / WARPS;
    if (count <= 0) return;
    float c[2][4] = {};
    int unit = 0, at = position_;
    Fragments now;
    load(now);
#pragma unroll 2
    for (int i = 1; i < count; i++) {
      Fragments next;
      load(next);
      multiply(c, now, unit, at);
      now = next;
    }
    multiply(c, now, unit, at);
  }

  // The last stage of a phase may hold fewer groups than warps times groups: give it back all the same.
  KOGC_DEVICE void finish(int units) {
    constexpr int PER_STAGE = STAGE_GROUPS * WARPS;
    const int groups = units * GROUPS, stages = (groups + PER_STAGE - 1) / PER_STAGE;
    const int touched = ((groups - warp() + WARPS - 1) / WARPS + STAGE_GROUPS - 1) / STAGE_GROUPS;
    if (freed_ != 0) {
      if (taken_ != 0) cursor_.advance();
      release();
    } else if (touched < stages) {
      wait_full();
      cursor_.advance();
      release();
    }
    taken_ = 0;
  }

  // The sum of a row of the units multiplied last.
  static KOGC_DEVICE float add_up(int row) {
    const float* from = partial_sums<P>() + row / M::UNIT * WARPS * 8 + row % M::UNIT;
    float v = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++)
      KOGC_UNROLL for (int s = 0; s < SUB_BLOCKS; s++) v += from[w * 8 + s * M::UNIT];
    return v;
  }

 private:
  static constexpr int SUB_BLOCKS = 8 / M::UNIT, COLUMNS = 32 * SUB_BLOCKS;  // of a fragment
  struct Fragments { Words weights[M::GROUP], x[M::GROUP]; };

  KOGC_DEVICE void load(Fragments& f) {
    if (taken_ == 0) wait_full();
    const char* w = Ring<P>::stage(cursor_.slot) + ((taken_ * WARPS + warp()) * M::GROUP * 32 + lane()) * 16;
    const u16* x = activation<P>() + position_ * M::GROUP * COLUMNS + (lane() & 3) * 8 + (lane() >> 2) * 32;
    const bool has_row = lane() < 4 * SUB_BLOCKS;
    KOGC_UNROLL for (int i = 0; i < M::GROUP; i++) {
      f.weights[i] = *(const Words*)(w + i * 512);
      f.x[i] = {0, 0, 0, 0};
      if (has_row) f.x[i] = *(const Words*)(x + i * COLUMNS);
    }
    position_ += WARPS;
    if (position_ >= GROUPS) position_ -= GROUPS;
    if (++taken_ == STAGE_GROUPS) {
      cursor_.advance();
      taken_ = 0;
    }
  }

  // Multiplies a group, gives its stage back when it was this warp's last there, and stores the sums at a unit's end.
  KOGC_DEVICE void multiply(float (&c)[2][4], const Fragments& f, int& unit, int& position) {
    KOGC_UNROLL for (int i = 0; i < M::GROUP; i++) {
      mma<P::FP16>(c[0], f.x[i].x, 0, f.x[i].y, 0, f.weights[i].x, f.weights[i].y);
      mma<P::FP16>(c[1], f.x[i].z, 0, f.x[i].w, 0, f.weights[i].z, f.weights[i].w);
    }
    if (++freed_ == STAGE_GROUPS) release();
    position += WARPS;
    if (position < GROUPS) return;
    position -= GROUPS;
    store(unit++, c);
  }

  KOGC_DEVICE void wait_full() {
    const typename Trace<P>::Waiting waiting;
    Spin spin;
    while (!barrier_passed(Ring<P>::full(cursor_.slot), cursor_.parity)) spin.step(where_, STAGE_FULL, cursor_.parity);
  }

  // This warp has read the oldest stage that it holds.
  KOGC_DEVICE void release() {
    sync_warp();
    if (lane() == 0) barrier_arrive(Ring<P>::empty(free_));
    if (++free_ == P::STAGES) free_ = 0;
    freed_ = 0;
  }

  static KOGC_DEVICE void store(int unit, float (&c)[2][4]) {
    float* to = partial_sums<P>() + (unit * WARPS + warp()) * 8;
    const int column = lane() & 3, row = lane() >> 2;  // rows of A: one for units of 8, two for units of 4
    const bool holds = M::UNIT == 8 ? lane() < 4 : lane() < 8 && column / 2 == row;
    if (holds) {
      to[column * 2] = c[0][0] + c[1][0];
      to[column * 2 + 1] = c[0][1] + c[1][1];
    }
    KOGC_UNROLL for (int j = 0; j < 4; j++) c[0][j] = c[1][j] = 0;
  }

  Stream<P>& cursor_;      // where the next group is
  const Where& where_;
  int free_;               // slot of the oldest stage not given back
  int taken_ = 0, freed_ = 0;  // this warp's groups of the stage at hand that are loaded, and multiplied
  int position_ = warp();  // group within the unit, of the next to load
};

// y = W x for this block's rows. `prepare()` runs once on every thread, between the products and the first result;
// `result(i, y...)` gets TOGETHER consecutive rows of the block, starting at its i-th.
template <class P, class M, int TOGETHER, class Prepare, class Result>
KOGC_DEVICE void matvec(Stream<P>& cursor, int units, const Where& where, Prepare prepare, Result result) {
  MatVec<P, M> products(cursor, where);
  for (int first = 0; first < units; first += P::PARTIAL_UNITS) {
    const int count = units - first < P::PARTIAL_UNITS ? units - first : P::PARTIAL_UNITS;
    if (first) sync();
    products.multiply(count);
    if (first + count == units) products.finish(units);
    sync();
    if (first == 0) prepare();
    for (int row = thread() * TOGETHER; row < count * M::UNIT; row += THREADS * TOGETHER) {
      if constexpr (TOGETHER == 2) result(first * M::UNIT + row, products.add_up(row), products.add_up(row + 1));
      else result(first * M::UNIT + row, products.add_up(row));
    }
  }
}

}  // namespace kogc
