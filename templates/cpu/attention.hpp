// Attention products in FP32 with keys and values from BF16. A chunk is done in three steps: scores of all heads, their
// running softmax, outputs. Queries and outputs lie in the order in which a Pair splits a vector of 16-bit data.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE char* scratch() { return shared() + P::SCRATCH_OFFSET; }

template <class P> class AttentionCore {
  static constexpr int DIM = P::HEAD_DIM, HEADS = P::HEADS_PER_BLOCK, OUT = DIM + 4;
  static constexpr int WIDTH = 2 * VECTOR;                     // dimensions of a Pair
  static constexpr int PART = DIM % 64 == 0 ? 64 : WIDTH;      // dimensions whose outputs stay in registers
  static_assert(DIM % WIDTH == 0, "head_dim must be a multiple of 32");

 public:
  KOGC_DEVICE void store_query(int head, int d, float v) {  // head after head
    query_[head][place(d)] = v;
    heads_ = head + 1;
  }
  KOGC_DEVICE void store_key(u16* chunk, int row, int d, u16 v) { chunk[row * DIM + d] = v; }
  KOGC_DEVICE void store_value(u16* chunk, int row, int d, u16 v) { chunk[(CHUNK + row) * DIM + d] = v; }

  KOGC_DEVICE void load_keys(const Stream<P>&, int, int, const Where&) {}
  KOGC_DEVICE void take_chunk(Stream<P>&, const u16* keys, int chunk, int lowest, int position, const Where&) {
    chunk_ = keys;
    const int first_position = chunk * CHUNK;
    const int first = lowest > first_position ? lowest - first_position : 0;
    const int last = position - first_position < CHUNK - 1 ? position - first_position : CHUNK - 1;
    for (int h = 0; h < heads_; h++) {
      alignas(64) float p[CHUNK];
      scores(p, h, first, last);
      const float keep = softmax(p, h, first, last);
      for (int d = 0; d < DIM; d += PART) accumulate(p, keep, h, d, first, last);
    }
  }

  KOGC_DEVICE void finish(int) {}

  // Hands each vector of the partial output to `result(head, index, values)`: DIM outputs; maximum, sum, two zeros.
  template <class Result> KOGC_DEVICE void outputs(int heads, Result result) {
    for (int h = 0; h < heads; h++) {
      for (int d = 0; d < DIM; d += 4) result(h, d, {out_[h][place(d)], out_[h][place(d + 1)], out_[h][place(d + 2)], out_[h][place(d + 3)]});
      result(h, DIM, {maximum_[h], sum_[h], 0, 0});
    }
  }

  KOGC_DEVICE AttentionCore() {
    for (int h = 0; h < HEADS; h++) {
      for (int d = 0; d < DIM; d++) out_[h][d] = 0;
      maximum_[h] = LOWEST;
      sum_[h] = 0;
    }
  }

 private:
  // Where dimension d of a vector lies: even dimensions of a Pair first, then the odd ones.
  static KOGC_DEVICE int place(int d) { return d / WIDTH * WIDTH + d % 2 * VECTOR + d % WIDTH / 2; }

  // p[i] = score of position i of the chunk, in whole groups of eight positions: what lies outside is masked afterwards.
  KOGC_DEVICE void scores(float (&p)[CHUNK], int head, int first, int last) {
    for (int i = first / 8 * 8; i <= last; i += 8) {
      Vector sum[8];
      KOGC_UNROLL_ALL for (int j = 0; j < 8; j++) sum[j] = zero();
      for (int d = 0; d < DIM; d += WIDTH) {
        const Vector a = load(query_[head] + d), b = load(query_[head] + d + VECTOR);
        KOGC_UNROLL_ALL for (int j = 0; j < 8; j++) {
          const Pair k = bf16_pair(chunk_ + (i + j) * DIM + d);
          sum[j] = multiply_add(k.b, b, multiply_add(k.a, a, sum[j]));
        }
      }
      _mm256_storeu_ps(p + i, sums_of(sum));
    }
  }

  // Turns scores into probabilities relative to the new maximum; returns what the sums so far must be multiplied with.
  KOGC_DEVICE float softmax(float (&p)[CHUNK], int head, int first, int last) {
    float maximum = maximum_[head];
    for (int i = first; i <= last; i++) maximum = p[i] > maximum ? p[i] : maximum;
    const float keep = exp2_fast(maximum_[head] - maximum);
    for (int i = first; i <= last; i++) p[i] = exp2_fast(p[i] - maximum);
    float sum = 0;
    for (int i = first; i <= last; i++) sum += p[i];
    maximum_[head] = maximum;
    sum_[head] = sum_[head] * keep + sum;
    return keep;
  }

  KOGC_DEVICE void accumulate(const float (&p)[CHUNK], float keep, int head, int d, int first, int last) {
    constexpr int VECTORS = PART / VECTOR;
    Vector o[VECTORS];
    KOGC_UNROLL_ALL for (int v = 0; v < VECTORS; v++) o[v] = multiply(load(out_[head] + d + v * VECTOR), broadcast(keep));
    const u16* values = chunk_ + CHUNK * DIM + d;
    for (int i = first; i <= last; i++) {
      const Vector weight = broadcast(p[i]);
      KOGC_UNROLL_ALL for (int v = 0; v < VECTORS; v += 2) {
        const Pair x = bf16_pair(values + i * DIM + v * VECTOR);
        o[v] = multiply_add(weight, x.a, o[v]);
        o[v + 1] = multiply_add(weight, x.b, o[v + 1]);
      }
    }
    KOGC_UNROLL_ALL for (int v = 0; v < VECTORS; v++) store(out_[head] + d + v * VECTOR, o[v]);
  }

  const u16* chunk_ = nullptr;
  int heads_ = 0;
  alignas(64) float query_[HEADS][DIM];
  alignas(64) float out_[HEADS][DIM];
  float maximum_[HEADS], sum_[HEADS];
};

}  // namespace kogc
