// Mat-vec of 16-bit weights: a fragment is eight rows of 32 columns (or, in units of four rows, two blocks of 32 columns),
// and each of its eight rows has an accumulator, so a piece of the activation is loaded once for all of them.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE u16* activation() { return (u16*)(shared() + P::ACTIVATION_OFFSET); }

// Four columns of the activation, from column 4 * `vector` on.
KOGC_DEVICE void store_activation(u16* x, int vector, Quad q) { ((Quad*)x)[vector] = q; }

// 32 columns of the activation, in the form in which weights meet them.
#if defined(__AVX512BF16__)
constexpr bool BF16_PRODUCTS = true;
#else
constexpr bool BF16_PRODUCTS = false;
#endif

template <bool FP16, bool DIRECT = BF16_PRODUCTS && !FP16> struct Columns {
  static constexpr int PAIRS = 16 / VECTOR;
  Pair x[PAIRS];

  KOGC_DEVICE Columns(const u16* from) {
    KOGC_UNROLL_ALL for (int i = 0; i < PAIRS; i++) x[i] = load_pair<FP16>(from + i * 2 * VECTOR);
  }
  KOGC_DEVICE Vector times(const u16* weights, Vector sum) const {
    KOGC_UNROLL_ALL for (int i = 0; i < PAIRS; i++) {
      const Pair w = load_pair<FP16>(weights + i * 2 * VECTOR);
      sum = multiply_add(w.b, x[i].b, multiply_add(w.a, x[i].a, sum));
    }
    return sum;
  }
};

#if defined(__AVX512BF16__)
template <> struct Columns<false, true> {
  __m512bh x;
  KOGC_DEVICE Columns(const u16* from) : x((__m512bh)_mm512_loadu_si512(from)) {}
  KOGC_DEVICE Vector times(const u16* weights, Vector sum) const {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(weights), x);
  }
};
#endif

// The UNIT rows of one unit times the activation, to y; `at` moves past the unit.
template <class P, int UNIT> KOGC_DEVICE void multiply_unit(const u8*& at, const u16* x, int columns, float (&y)[8]) {
  constexpr int SUB_BLOCKS = 8 / UNIT;
  Vector sum[8];
  KOGC_UNROLL_ALL for (int r = 0; r < 8; r++) sum[r] = zero();
  const u16* w = (const u16*)at;
  for (const u16* const end = x + columns; x < end; x += 32 * SUB_BLOCKS, w += 256) {
    KOGC_UNROLL_ALL for (int r = 0; r < 8; r++) prefetch((const u8*)(w + 32 * r) + AHEAD);
    KOGC_UNROLL_ALL for (int s = 0; s < SUB_BLOCKS; s++) {
      const Columns<P::FP16> piece(x + 32 * s);
      KOGC_UNROLL_ALL for (int r = 0; r < UNIT; r++)
        sum[s * UNIT + r] = piece.times(w + (s * UNIT + r) * 32, sum[s * UNIT + r]);
    }
  }
  at = (const u8*)w;
  _mm256_storeu_ps(y, sums_of(sum));
  if constexpr (SUB_BLOCKS == 2)
    for (int r = 0; r < 4; r++) y[r] += y[r + 4];
}

// y = W x for this block's rows. `multiplied()` runs once before the first result; `result(i, y)` gets the block's rows
// i .. i + 3.
template <class P> class MatVec {
 public:
  KOGC_DEVICE void begin(Stream<P>&, const Work& work, const Where&) { work_ = work; }

  template <class Multiplied, class Result>
  KOGC_DEVICE void run(Stream<P>& stream, const Where&, Multiplied multiplied, Result result) {
    multiplied();
    for (int unit = 0; unit < work_.units; unit++) {
      float y[8];
      if (work_.unit == 8) multiply_unit<P, 8>(stream.at, activation<P>(), work_.columns, y);
      else multiply_unit<P, 4>(stream.at, activation<P>(), work_.columns, y);
      for (int r = 0; r < work_.unit; r += ROWS_TOGETHER) result(unit * work_.unit + r, (const float(&)[1][ROWS_TOGETHER])y[r]);
    }
    read_next(stream.at);
  }

 private:
  Work work_ = {};
};

}  // namespace kogc
