// Attention products in FP32 with keys and values from BF16 or FP8. A chunk is done in three steps: scores of all heads, their
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
  static constexpr bool PAIRS_CHUNKS = false;
  KOGC_DEVICE void store_query(int head, int d, float v) {  // head after head
    query_[head][place(d)] = v;
    heads_ = head + 1;
  }
  KOGC_DEVICE void store_key(u8* chunk, int row, int d, u16 v) { put(chunk, row * DIM + d, v); }
  KOGC_DEVICE void store_value(u8* chunk, int row, int d, u16 v) { put(chunk, (CHUNK + row) * DIM + d, v); }
  KOGC_DEVICE void store_key_scale(u8* chunk, int row, u32 exponent) { chunk[SCALES + row] = (u8)exponent; }
  KOGC_DEVICE void store_value_scale(u8* chunk, int row, u32 exponent) { chunk[SCALES + CHUNK + row] = (u8)exponent; }

  KOGC_DEVICE void load_keys(const Stream<P>&, int, int, const Where&) {}
  KOGC_DEVICE void take_chunk(Stream<P>&, const u8* keys, int chunk, int lowest, int position, const Where&) {
    chunk_ = keys;
    const int first_position = chunk * CHUNK;
    const int first = lowest > first_position ? lowest - first_position : 0;
    const int last = position - first_position < CHUNK - 1 ? position - first_position : CHUNK - 1;
    for (int h = 0; h < heads_; h++) {
      alignas(64) float p[CHUNK];
      scores(p, h, first, last);
      const float keep = softmax(p, h, first, last);
      scale<CHUNK>(p, first, last + 1);
      for (int d = 0; d < DIM; d += PART) accumulate(p, keep, h, d, first, last);
    }
  }

  KOGC_DEVICE void leave(Stream<P>&) {}
  KOGC_DEVICE void finish(int) {}

  // Hands each vector of the partial output to `result(head, index, values)`: DIM outputs; maximum, sum, two zeros.
  template <class Result> KOGC_DEVICE void outputs(int heads, Result result) {
    for (int h = 0; h < heads; h++) {
      for (int d = 0; d < DIM; d += 4) {
        const float four[4] = {out_[h][place(d)], out_[h][place(d + 1)], out_[h][place(d + 2)], out_[h][place(d + 3)]};
        result(h, d, four);
      }
      const float sums[4] = {maximum_[h], sum_[h], 0, 0};
      result(h, DIM, sums);
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
  static constexpr int BYTES = P::KV_FP8 ? 1 : 2;         // of a number
  static constexpr int SCALES = 2 * CHUNK * DIM * BYTES;  // where the exponents of an FP8 chunk are: of its keys, its values

  static KOGC_DEVICE void put(u8* chunk, int at, u16 v) {
    if constexpr (P::KV_FP8) chunk[at] = (u8)v;
    else ((u16*)chunk)[at] = v;
  }
  KOGC_DEVICE Pair pair(int at) const {
    if constexpr (P::KV_FP8) return fp8_pair(chunk_ + at);
    else return bf16_pair((const u16*)chunk_ + at);
  }
  // Scores by the scales of their keys (FROM is 0), or probabilities by those of their values (CHUNK).
  template <int FROM> KOGC_DEVICE void scale(float (&p)[CHUNK], int first, int end) const {
    if constexpr (P::KV_FP8)
      for (int i = first; i < end; i++) p[i] *= fp8_pair_scale(chunk_[SCALES + FROM + i]);
  }

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
          const Pair k = pair((i + j) * DIM + d);
          sum[j] = multiply_add(k.b, b, multiply_add(k.a, a, sum[j]));
        }
      }
      _mm256_storeu_ps(p + i, sums_of(sum));
    }
    scale<0>(p, first, last + 1);
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
    for (int i = first; i <= last; i++) {
      const Vector weight = broadcast(p[i]);
      KOGC_UNROLL_ALL for (int v = 0; v < VECTORS; v += 2) {
        const Pair x = pair((CHUNK + i) * DIM + d + v * VECTOR);
        o[v] = multiply_add(weight, x.a, o[v]);
        o[v + 1] = multiply_add(weight, x.b, o[v + 1]);
      }
    }
    KOGC_UNROLL_ALL for (int v = 0; v < VECTORS; v++) store(out_[head] + d + v * VECTOR, o[v]);
  }

  const u8* chunk_ = nullptr;
  int heads_ = 0;
  alignas(64) float query_[HEADS][DIM];
  alignas(64) float out_[HEADS][DIM];
  float maximum_[HEADS], sum_[HEADS];
};

}  // namespace kogc
