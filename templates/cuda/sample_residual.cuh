// The residual stream of samples: its rows lie with the blocks that multiply them. What crosses blocks is the stream times the
// norm's weights, and the sums of its squares.
#pragma once

namespace kogc {

template <class P> class SampleResidual {
  using Q = typename P::Samples;

 protected:
  struct alignas(8) Two { float a, b; };

  KOGC_DEVICE SampleResidual(const SampleArgs& args) : args_(args) {}

  static KOGC_DEVICE SampleWords& words() { return sample_words<P>(); }
  template <class T> KOGC_DEVICE T* array(int offset) const { return (T*)(args_.scratch + offset); }

  // Where the same rows are each block's in both phases that add to the stream, nobody else reads it; where they are each
  // thread's, it stays in registers, if there are any.
  static constexpr bool OWN_ROWS = P::O::UNIT == P::Down::UNIT && P::O::BASE == P::Down::BASE && P::O::REMAINDER == P::Down::REMAINDER &&
                                   P::O::ROTATION == P::Down::ROTATION;
  static constexpr bool RESIDENT = KEYS_AHEAD && Q::O::SPLIT && Q::Down::SPLIT && OWN_ROWS;

  // Adds y to rows `row` and `row` + 1 of two columns, and hands the stream on to the norm that has two `weights` for them.
  KOGC_DEVICE void add(u32 weights, int row, int column, const float (&y)[4], bool fresh) {
    Two first = stream_[0], second = stream_[1];
    Two *to = (Two*)(array<float>(Q::RESIDUAL) + column * P::HIDDEN + row), *next = to + 8 * P::HIDDEN / 2;
    if constexpr (!RESIDENT) {
      first = *to;
      second = *next;
    }
    if (fresh) first = second = {0, 0};
    first = {first.a + y[0], first.b + y[1]};
    second = {second.a + y[2], second.b + y[3]};
    if constexpr (RESIDENT) {
      stream_[0] = first;
      stream_[1] = second;
    } else {
      *to = first;
      *next = second;
    }
    hand_on(weights, row, column, first, squares_[0]);
    if (!narrow(args_)) hand_on(weights, row, column + 8, second, squares_[1]);
  }
  KOGC_DEVICE void hand_on(u32 weights, int row, int column, Two v, float& squares) {
    squares += v.a * v.a + v.b * v.b;
    put_pair(sample_activation(args_, Q::NORMED, row, column), v.a * to_float<P::FP16>((u16)weights), v.b * to_float<P::FP16>((u16)(weights >> 16)), normed_);
  }
  // Zeros in columns `from` to `to` of the activation `x`, where the weights are padded: they are asked for as the others are.
  KOGC_DEVICE void put_padding(int x, int from, int to, u32 parity) {
    if (block() != 0) return;
    const int samples = narrow(args_) ? NARROW : COLUMNS;
    for (int i = thread(); i < (to - from) / 2 * samples; i += THREADS)
      put_pair(sample_activation(args_, x, from + i / samples * 2, i % samples), 0, 0, parity);
  }

  KOGC_DEVICE void embed() {
    const SamplePhase& p = words().phases[DOWN];
    normed_ ^= 1;
    for (int i = thread(); i < p.tiles * LANES; i += THREADS) {
      const int row = p.first_row + i / LANES * COLUMN_ROWS + (lane() & 3) * 2, column = lane() / 4;
      if (row >= p.end_row) continue;
      const u32 x = *(const u32*)(args_.embedding + (u64)words().tokens[column] * P::HIDDEN + row);
      const u32 y = *(const u32*)(args_.embedding + (u64)words().tokens[column + 8] * P::HIDDEN + row);
      const float four[4] = {to_float<P::FP16>((u16)x), to_float<P::FP16>((u16)(x >> 16)), to_float<P::FP16>((u16)y), to_float<P::FP16>((u16)(y >> 16))};
      add(*(const u32*)(args_.norms + row), row, column, four, true);
    }
    put_squares();
  }

  // The sums of squares of this block's rows, for each column.
  KOGC_DEVICE void put_squares() {
    put_padding(Q::NORMED, P::HIDDEN, PADDED, normed_);
    KOGC_UNROLL for (int h = 0; h < 2; h++) {
      squares_[h] += shuffle_xor(squares_[h], 1);
      squares_[h] += shuffle_xor(squares_[h], 2);
      if ((lane() & 3) == 0) words().sums[warp()][lane() / 4 + 8 * h] = squares_[h];
      squares_[h] = 0;
    }
    sync();
    if (thread() >= COLUMNS) return;
    float sum = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++) sum += words().sums[w][thread()];
    put(array<float>(Q::SQUARES) + block() * COLUMNS + thread(), sum, normed_);
  }

  // What multiplies the results of the product that follows: the inverse root mean square of each column, and what activations
  // were divided by.
  KOGC_DEVICE void scales(const Where& where) {
    constexpr int PARTS = THREADS / COLUMNS, EACH = (P::BLOCKS + PARTS - 1) / PARTS;
    const int column = thread() % COLUMNS, part = thread() / COLUMNS;
    const float* squares = array<float>(Q::SQUARES);
    float v[EACH], sum = 0;
    const int blocks = (P::BLOCKS - part + PARTS - 1) / PARTS;
    take<EACH>(v, first_bits(blocks), normed_, where, WAIT_PASS, [&](int i) { return squares + (part + i * PARTS) * COLUMNS + column; });
    KOGC_UNROLL for (int i = 0; i < EACH; i++) sum += v[i];
    words().sums[part][column] = sum;
    sync();
    if (thread() < COLUMNS) {
      sum = 0;
      KOGC_UNROLL for (int i = 0; i < PARTS; i++) sum += words().sums[i][thread()];
      words().scales[thread()] = reciprocal_sqrt(sum * (1.0f / P::HIDDEN) + P::NORM_EPS) * PAIR_UNSCALE;
    }
    sync();
  }

  static constexpr int LAYERS_PADDED = P::Qkv::COLUMNS_PADDED > P::GateUp::COLUMNS_PADDED ? P::Qkv::COLUMNS_PADDED : P::GateUp::COLUMNS_PADDED;
  static constexpr int PADDED = LAYERS_PADDED > P::Head::COLUMNS_PADDED ? LAYERS_PADDED : P::Head::COLUMNS_PADDED;

  const SampleArgs& args_;
  u32 normed_ = 0;  // parity of the stream that was handed on last
  float squares_[2] = {};
  Two stream_[2] = {};
};

}  // namespace kogc
