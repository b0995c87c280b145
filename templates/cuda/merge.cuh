// Outputs of attention that warps have of different positions become one, through shared memory: for passes and samples,
// where a block takes all positions of a query.
#pragma once

namespace kogc {

template <class P> class Merge {
  static constexpr int DIM = P::HEAD_DIM, OUT = DIM + 4, STEPS = DIM / 16, PAIRS = 4;  // of the eight columns of queries
  struct alignas(8) Pair { float a, b; };

 public:
  KOGC_DEVICE Merge(u16* from) : from_((Pair*)from) {}  // where its place in shared memory begins

  // This warp's outputs, and starts afresh.
  KOGC_DEVICE void put(RunningSoftmax<DIM>& s) const {
    s.add_lanes();
    const int row = lane() >> 2;
    Pair* to = out(warp(), lane() & 3) + row;
    KOGC_UNROLL for (int j = 0; j < STEPS; j++) {
      to[j * 16] = {s.o[j][0], s.o[j][1]};
      to[j * 16 + 8] = {s.o[j][2], s.o[j][3]};
    }
    if (row == 0) {
      to[DIM] = {s.maximum[0], s.maximum[1]};
      to[DIM + 1] = {s.sum[0], s.sum[1]};
    }
    s = {};
  }

  // Hands four outputs of each of `columns` columns to `result(column, dimension, values)`.
  template <class Result> KOGC_DEVICE void outputs(int columns, Result result) const {
    for (int i = thread(); i < (columns + 1) / 2 * (DIM / 4); i += THREADS) {
      const int pair = i / (DIM / 4), d = i % (DIM / 4) * 4;
      Pair maximum = {LOWEST, LOWEST}, sum = {}, o[4] = {};
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
        const Pair m = out(w, pair)[DIM];
        maximum = {fmaxf(maximum.a, m.a), fmaxf(maximum.b, m.b)};
      }
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
        const Pair* of = out(w, pair);
        const Pair weight = {exp2_fast(of[DIM].a - maximum.a), exp2_fast(of[DIM].b - maximum.b)};
        sum = {sum.a + weight.a * of[DIM + 1].a, sum.b + weight.b * of[DIM + 1].b};
        KOGC_UNROLL for (int e = 0; e < 4; e++) o[e] = {o[e].a + weight.a * of[d + e].a, o[e].b + weight.b * of[d + e].b};
      }
      const float a = reciprocal(sum.a) * Scales<P>::UNIT, b = reciprocal(sum.b) * Scales<P>::UNIT;
      result(2 * pair, d, {o[0].a * a, o[1].a * a, o[2].a * a, o[3].a * a});
      if (2 * pair + 1 < columns) result(2 * pair + 1, d, {o[0].b * b, o[1].b * b, o[2].b * b, o[3].b * b});
    }
  }

 private:
  KOGC_DEVICE Pair* out(int warp, int pair) const { return from_ + (warp * PAIRS + pair) * OUT; }

  Pair* from_;
};

}  // namespace kogc
