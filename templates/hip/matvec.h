// Mat-vec on matrix instructions, from registers: all waves share every unit of rows; a wave takes every eighth piece of
// the slab, so its partial sums of a unit meet the other waves' in LDS once a unit.
//
// A lane's 16 bytes are eight columns of a row, and they are its part of a tile's a as they are. In terms of the tile, a's row
// m holds the eight columns m % 4 of a fragment's 32, of row m / 4 of the unit, or of row 4 + m / 4 where the lane's
// sixteen is odd (in units of 4 rows: of the same row, 32 columns on). So b's column n holds, for those that are even (n < 4)
// or odd (n >= 4), the activation for the eight columns n % 4, and zeros else. Of c, row m is wanted in columns m % 4 and
// 4 + m % 4; the rest is products of what does not belong together, and comes free.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE float* partial_sums() { return (float*)(shared() + P::PARTIAL_OFFSET); }
template <class P> KOGC_DEVICE u16* activation(int = 0) {
  static_assert(P::TOKENS == 1);
  return (u16*)(shared() + P::ACTIVATION_OFFSET);
}

// Four columns of the activation, from column 4 * `vector` on.
KOGC_DEVICE void store_activation(u16* x, int vector, Quad q) { ((Quad*)x)[vector] = q; }

template <class P> class MatVec {
 public:
  // The first weights are on their way since the phase before.
  KOGC_DEVICE void begin(Stream<P>&, const Work& work, const Where&) {
    units_ = scalar(work.units);
    unit_ = scalar(work.unit);
    pieces_ = scalar(work.columns) * unit_ * 2 / PIECE;
  }

  // y = W x for this block's rows. `multiplied()` runs on every thread, between the last products and their results;
  // `result(i, y)` gets the block's rows i .. i + 3.
  template <class Multiplied, class Result>
  KOGC_DEVICE void run(Stream<P>& stream, const Where&, Multiplied multiplied, Result result) {
#pragma unroll 1
    for (int first = 0; first < units_; first += P::PARTIAL_UNITS) {
      const int count = units_ - first < P::PARTIAL_UNITS ? units_ - first : P::PARTIAL_UNITS;
      if (first) sync();  // the last part's sums are read
      multiply(stream);
      sync();
      if (first + P::PARTIAL_UNITS >= units_) multiplied();
#pragma unroll 1
      for (int row = ROWS_TOGETHER * thread(); row < count * unit_; row += ROWS_TOGETHER * THREADS) {
        float y[1][ROWS_TOGETHER];
        add_up(row, y[0]);
        result(first * unit_ + row, y);
      }
    }
  }

 private:
  // Whether a unit may have fewer pieces than there are waves: then not all of them add to each unit.
  template <class M> static constexpr bool FEW = M::COLUMNS_PADDED * M::UNIT * 2 / PIECE < WARPS;
  static constexpr bool FEW_PIECES =
      FEW<typename P::Qkv> || FEW<typename P::O> || FEW<typename P::GateUp> || FEW<typename P::Down> || FEW<typename P::Head>;

  // This wave's products of the stream's next part; their sums go to LDS.
  KOGC_DEVICE void multiply(Stream<P>& stream) {
    const int sixteen = lane() / 16, column = lane() % 16, odd = sixteen % 2, fragment = unit_ == 8 ? 64 : 128;  // bytes
    const bool meets = unit_ == 4 || column / 4 % 2 == odd;
    const char* x = shared() + P::ACTIVATION_OFFSET + sixteen / 2 * fragment + (unit_ == 8 ? 0 : odd * 64) + column % 4 * 16;
    float* sums = partial_sums<P>() + warp() * 8;
    int at = warp();
    while (FEW_PIECES && at >= pieces_) next_unit(at, sums);
    Sums c = {};
    stream.walk([&](const Words& weights) {
      const Words b = *(const Words*)(x + at * (FRAGMENTS * fragment));
      multiply_tile<P::FP16>(c, weights, meets ? b : Words{0, 0, 0, 0});
      at += WARPS;
      if (at < pieces_) return;
      store(c, sums);
      next_unit(at, sums);
      while (FEW_PIECES && at >= pieces_) next_unit(at, sums);
      c = {};
    });
  }
  KOGC_DEVICE void next_unit(int& at, float*& sums) const {
    at -= pieces_;
    sums += WARPS * 8;
  }

  // A row's sum is spread over four lanes, in the element of c that has their number.
  KOGC_DEVICE void store(const Sums& c, float* sums) const {
    const int column = lane() % 16, sixteen = lane() / 16;
    KOGC_UNROLL for (int r = 0; r < ROWS / 4; r++) {
      float v = 0;  // a sum: of elements chosen by their number, c would have to lie in memory
      KOGC_UNROLL for (int e = 0; e < 4; e++) v += column % 4 == e ? c.v[4 * r + e] : 0;
      v += neighbour<1>(v);
      v += neighbour<2>(v);
      if (column % 4 == 0 && column < unit_) sums[column + sixteen * (ROWS / 4) + r] = v;
    }
  }

  // The sums of rows `row` .. + 3 of the part multiplied last.
  KOGC_DEVICE void add_up(int row, float (&y)[ROWS_TOGETHER]) const {
    const int unit = unit_ == 8 ? row / 8 : row / 4;
    const float* from = partial_sums<P>() + unit * (WARPS * 8) + (row - unit * unit_);
    KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++) y[e] = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
      const Words four = *(const Words*)(from + w * 8);
      const bool holds = !FEW_PIECES || ((w - unit * pieces_) & (WARPS - 1)) < pieces_;
      y[0] += holds ? as_float(four.x) : 0;
      y[1] += holds ? as_float(four.y) : 0;
      y[2] += holds ? as_float(four.z) : 0;
      y[3] += holds ? as_float(four.w) : 0;
    }
  }

  int units_ = 0, unit_ = 8, pieces_ = 0;  // the block's units; rows, and pieces, of each
};

}  // namespace kogc
