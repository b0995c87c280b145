// Tensor-core mat-vec over the ring. All warps share every stage; a warp takes every eighth group of fragments, so its
// partial sums of a unit meet the other warps' in shared memory once a unit.
//
// mma.m16n8k16 with weights as A and the activation as columns of B. One 16-byte load per lane brings row lane / 4, columns
// (lane % 4) * 8 .. + 7 of a fragment, and its four registers are a lane's A operand as they are: columns 0, 1, 4, 5 of the
// eight in A's row lane / 4, columns 2, 3, 6, 7 in A's row lane / 4 + 8. B's column 0 holds the activation for the first
// kind, column 1 for the second, so a row's product is C[row][0] + C[row + 8][1]. In units of 4 rows a fragment's upper
// four rows are the same rows for the next 32 columns, and B's columns 2 and 3 hold the activation for those.
//
// One instance serves all phases; what differs between them is in a few registers.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE float* partial_sums() { return (float*)(shared() + P::PARTIAL_OFFSET); }
template <class P> KOGC_DEVICE u16* activation() { return (u16*)(shared() + P::ACTIVATION_OFFSET); }

// Four columns of the activation, from column 4 * `vector` on. Of eight columns, 0, 1, 4, 5 lie before 2, 3, 6, 7.
KOGC_DEVICE void store_activation(u16* x, int vector, Quad q) {
  u32* to = (u32*)x + vector / 2 * 4 + vector % 2;
  to[0] = q.low;
  to[2] = q.high;
}

template <class P> class MatVec {
 public:
  static constexpr int GROUP = P::GROUP_FRAGMENTS;
  static constexpr int STAGE_GROUPS = P::STAGE_BYTES / (512 * GROUP * WARPS);  // groups of one warp in a stage

  KOGC_DEVICE MatVec(Stream<P>& cursor, const Work& work, const Where& where)
      : cursor_(cursor), where_(where), unit_(work.unit), groups_(work.columns * work.unit / (256 * GROUP)) {
    const int column = lane() >> 2;  // of B
    weights_ = shared() + P::RING_OFFSET + (warp() * GROUP * 32 + lane()) * 16;
    x_ = (const char*)activation<P>() + column / 2 * 64 + (lane() & 3) * 16 + column % 2 * 8;
    holds_x_ = column < 16 / work.unit;
    holds_sum_ = (lane() & 3) == (unit_ == 8 ? 0 : column / 4);
  }

  // Products of this warp's groups of `units` more units; their partial sums go to shared memory. The weights of a group
  // are on their way from shared memory while the group before is multiplied.
  KOGC_DEVICE void multiply(int units) {
    int left = (units * groups_ - position_ + WARPS - 1) / WARPS;
    if (left <= 0) return;
    float c[CHAINS][4] = {};
    float* sums = partial_sums<P>() + warp() * 8;
    int at = position_;
    Fragments even = {}, odd = {};
    load(even);
#pragma unroll 1
    while (left > 2) {
      load(odd);
      multiply(c, even, sums, at);
      load(even);
      multiply(c, odd, sums, at);
      left -= 2;
    }
    if (left == 2) load(odd);
    multiply(c, even, sums, at);
    if (left == 2) multiply(c, odd, sums, at);
  }

  // The last stage of a phase may hold fewer groups than warps times groups: give it back all the same.
  KOGC_DEVICE void finish(int units) {
    constexpr int PER_STAGE = STAGE_GROUPS * WARPS;
    const int groups = units * groups_, stages = (groups + PER_STAGE - 1) / PER_STAGE;
    const int touched = ((groups - warp() + WARPS - 1) / WARPS + STAGE_GROUPS - 1) / STAGE_GROUPS;
    if (freed_ != 0) {
      if (taken_ != 0) cursor_.advance();
      release(1);
    } else if (touched < stages) {
      wait_full<P>(cursor_, where_);
      cursor_.advance();
      release(1);
    }
    taken_ = 0;
  }

  // The sums of rows `row` .. + 3 of the units multiplied last.
  KOGC_DEVICE void add_up(int row, float (&y)[ROWS_TOGETHER]) const {
    const int unit = unit_ == 8 ? row / 8 : row / 4;
    const char* from = (const char*)(partial_sums<P>() + unit * (8 * WARPS) + (row - unit * unit_));
    KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++) y[e] = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++) add(y, from + w * 32);
    if (unit_ == 4) KOGC_UNROLL for (int w = 0; w < WARPS; w++) add(y, from + w * 32 + 16);
  }

 private:
  static constexpr int CHAINS = 2;  // of dependent products
  struct Fragments {
    Words weights[GROUP];
    Quad x[GROUP];
  };

  static KOGC_DEVICE void add(float (&y)[ROWS_TOGETHER], const char* four) {
    const Words w = *(const Words*)four;
    y[0] += as_float(w.x);
    y[1] += as_float(w.y);
    y[2] += as_float(w.z);
    y[3] += as_float(w.w);
  }

  KOGC_DEVICE void load(Fragments& f) {
    if (taken_ == 0) wait_full<P>(cursor_, where_);
    const int fragment = 512 / unit_;  // bytes of the activation that a fragment meets
    const char* w = weights_ + cursor_.slot * P::STAGE_BYTES + taken_ * (WARPS * GROUP * 512);
    const char* x = x_ + position_ * GROUP * fragment;
    KOGC_UNROLL for (int i = 0; i < GROUP; i++) {
      f.weights[i] = *(const Words*)(w + i * 512);
      if (holds_x_) f.x[i] = *(const Quad*)(x + i * fragment);
    }
    position_ += WARPS;
    if (position_ >= groups_) position_ -= groups_;
    if (++taken_ == STAGE_GROUPS) {
      cursor_.advance();
      taken_ = 0;
    }
  }

  // Multiplies a group, gives its stage back when it was this warp's last there, and stores the sums at a unit's end.
  KOGC_DEVICE void multiply(float (&c)[CHAINS][4], const Fragments& f, float*& sums, int& position) {
    KOGC_UNROLL for (int i = 0; i < GROUP; i++) {
      const Words& w = f.weights[i];
      mma<P::FP16>(c[i % CHAINS], w.x, w.y, w.z, w.w, f.x[i].low, f.x[i].high);
    }
    release(STAGE_GROUPS);
    position += WARPS;
    if (position < groups_) return;
    position -= groups_;
    if (holds_sum_) sums[lane() >> 2] = (c[0][0] + c[0][3]) + (c[1][0] + c[1][3]);
    sums += WARPS * 8;
    KOGC_UNROLL for (int i = 0; i < CHAINS; i++) KOGC_UNROLL for (int j = 0; j < 4; j++) c[i][j] = 0;
  }

  // One more group of the oldest stage is read; when it was the last of `groups`, this warp gives the stage back.
  KOGC_DEVICE void release(int groups) {
    if (++freed_ < groups) return;
    give_back<P>(free_);
    if (++free_ == P::STAGES) free_ = 0;
    freed_ = 0;
  }

  Stream<P>& cursor_;  // where the next group is
  const Where& where_;
  const int unit_, groups_;    // rows, and groups of fragments, of a unit
  int free_ = cursor_.slot;    // slot of the oldest stage not given back
  int taken_ = 0, freed_ = 0;  // this warp's groups of the stage at hand that are loaded, and multiplied
  int position_ = warp();      // group within the unit, of the next to load
  const char *weights_, *x_;   // this lane's place in the first stage, and in the activation
  bool holds_x_, holds_sum_;   // whether this lane's B and C hold something
};

// y = W x for this block's rows. `prepare()` runs once on every thread, between the products and the first result;
// `result(i, y)` gets the block's rows i .. i + 3.
template <class P, class Prepare, class Result>
KOGC_DEVICE void matvec(Stream<P>& cursor, const Work& work, const Where& where, Prepare prepare, Result result) {
  MatVec<P> products(cursor, work, where);
#pragma unroll 1
  for (int first = 0; first < work.units; first += P::PARTIAL_UNITS) {
    const int count = work.units - first < P::PARTIAL_UNITS ? work.units - first : P::PARTIAL_UNITS;
    if (first) sync();
    products.multiply(count);
    if (first + count == work.units) products.finish(work.units);
    sync();
    if (first == 0) prepare();
#pragma unroll 1
    for (int row = ROWS_TOGETHER * thread(); row < count * work.unit; row += ROWS_TOGETHER * THREADS) {
      float y[ROWS_TOGETHER];
      products.add_up(row, y);
      result(first * work.unit + row, y);
    }
  }
}

}  // namespace kogc
