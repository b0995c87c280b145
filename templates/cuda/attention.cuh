// Attention products on tensor cores. A warp takes 16 positions of a chunk at a time: scores are A = keys (16 positions)
// times B = queries (8 heads), outputs are A = values (16 dimensions) times B = probabilities (8 heads). Queries and
// probabilities go through as two BF16 numbers each, what is rounded off being the second, so that only keys and values
// are as coarse as the cache.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE char* scratch() { return shared() + P::ACTIVATION_OFFSET; }

template <class P> class AttentionCore {
  static constexpr int DIM = P::HEAD_DIM, ROW = DIM + 8;  // padded row of a query: rows of a fragment in different banks
  static constexpr int HEADS = P::HEADS_PER_BLOCK, OUT = DIM + 4;
  static constexpr bool LATE_VALUES = P::QK_NORM && DIM >= 128;

 public:
  // Keys and values of this warp's 16 positions of a chunk, on their way before the query is known; where norms need the
  // registers, the values only after the query.
  KOGC_DEVICE void fetch(const u16* chunk) {
    fetch_keys(chunk);
    if constexpr (!LATE_VALUES) fetch_values(chunk);
  }
  KOGC_DEVICE void fetch_rest(const u16* chunk) {
    if constexpr (LATE_VALUES) fetch_values(chunk);
  }

  KOGC_DEVICE void store_query(int head, int d, float v) {
    const u16 high = float_to_bf16(v);
    queries()[head * ROW + d] = high;
    queries()[(8 + head) * ROW + d] = float_to_bf16(v - bf16_to_float(high));
  }
  KOGC_DEVICE void store_key(u16* chunk, int row, int d, u16 v) {
    new_key()[d] = v;
    chunk[row * DIM + d] = v;
  }
  // Values lie in fragments of 16 positions x 16 dimensions, in the order in which lanes load them.
  KOGC_DEVICE void store_value(u16* chunk, int row, int d, u16 v) {
    new_value()[d] = v;
    const int r = row % 16, element = d % 16 / 8 * 4 + r % 2 + r / 8 * 2, owner = d % 8 * 4 + r % 8 / 2;
    chunk[CHUNK * DIM + row / 16 * (16 * DIM) + (d / 16 * 32 + owner) * 8 + element] = v;
  }

  // One chunk's 16 positions of this warp; meanwhile the chunk after it is fetched.
  KOGC_DEVICE void chunk(int first_position, int lowest, int position, const u16* following) {
    const int base = first_position + warp() * 16;
    const bool any = base <= position && base + 15 >= lowest;
    float p[4], keep[2];
    if (any) {
      insert_key(position - base);
      scores(p, base, lowest, position);
      softmax(p, keep);
    }
    if (!LATE_VALUES && following) fetch_keys(following);
    if (any) {
      insert_value(position - base);
      accumulate(p, keep);
    }
    if (LATE_VALUES && following) fetch_keys(following);
    if (following) fetch_values(following);
  }

  // This warp's sums and outputs, to where all warps' meet.
  KOGC_DEVICE void finish(int heads) {
    KOGC_UNROLL for (int h = 0; h < 2; h++) {
      float sum = sum_[h];
      KOGC_UNROLL for (int m = 4; m < 32; m *= 2) sum += shuffle_xor(sum, m);
      const int head = column() + h;
      if (head >= heads) continue;
      float* to = out(warp(), head) + row();
      KOGC_UNROLL for (int j = 0; j < DIM / 16; j++) {
        to[j * 16] = o_[j][h];
        to[j * 16 + 8] = o_[j][h + 2];
      }
      if (row() == 0) {
        to[DIM] = maximum_[h];
        to[DIM + 1] = sum;
      }
    }
  }

  // Hands each word of the partial output to `result(head, index, value)`: DIM outputs, maximum, sum, two zeros.
  template <class Result> KOGC_DEVICE void outputs(int heads, Result result) {
    for (int i = thread(); i < heads * OUT; i += THREADS) {
      const int head = i / OUT, d = i % OUT;
      float maximum = LOWEST, value = 0;
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, out(w, head)[DIM]);
      if (d < DIM || d == DIM + 1) KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
        const float* from = out(w, head);
        if (from[DIM + 1] != 0) value += exp2_fast(from[DIM] - maximum) * from[d];
      }
      result(head, d, d == DIM ? maximum : value);
    }
  }

 private:
  static KOGC_DEVICE u16* queries() { return (u16*)scratch<P>(); }
  static KOGC_DEVICE u16* new_key() { return queries() + 16 * ROW; }
  static KOGC_DEVICE u16* new_value() { return new_key() + DIM; }
  static KOGC_DEVICE float* out(int warp, int head) { return (float*)(new_value() + DIM) + (warp * HEADS + head) * OUT; }
  static KOGC_DEVICE int row() { return lane() >> 2; }          // of A and C: a position or dimension; of B: a head
  static KOGC_DEVICE int column() { return (lane() & 3) * 2; }  // first of this lane's two columns of C: heads

  KOGC_DEVICE void fetch_keys(const u16* chunk) {
    const u16* from = chunk + (warp() * 16 + row()) * DIM + (lane() & 3) * 8;
    KOGC_UNROLL for (int t = 0; t < 2; t++)
      KOGC_UNROLL for (int s = 0; s < DIM / 32; s++) k_[t][s] = load_l2(from + t * 8 * DIM + s * 32);
  }
  KOGC_DEVICE void fetch_values(const u16* chunk) {
    const u16* from = chunk + CHUNK * DIM + warp() * 16 * DIM + lane() * 8;
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++) v_[j] = load_l2(from + j * 256);
  }

  // The token at hand is not yet in the fetched keys and values: row `r` of these 16, if it is among them.
  KOGC_DEVICE void insert_key(int r) {
    if (r >= 16) return;
    KOGC_UNROLL for (int s = 0; s < DIM / 32; s++) {
      const Words key = *(const Words*)(new_key() + s * 32 + (lane() & 3) * 8);
      select(k_[0][s], key, r == row());
      select(k_[1][s], key, r == row() + 8);
    }
  }
  static KOGC_DEVICE void select(Words& to, const Words& from, bool yes) {
    to.x = yes ? from.x : to.x;
    to.y = yes ? from.y : to.y;
    to.z = yes ? from.z : to.z;
    to.w = yes ? from.w : to.w;
  }
  KOGC_DEVICE void insert_value(int r) {
    if (r >= 16 || r % 8 / 2 != (lane() & 3)) return;
    const u32 keep = r % 2 ? 0x0000ffffu : 0xffff0000u, shift = r % 2 * 16;
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++) {
      const u32 low = (u32)new_value()[j * 16 + row()] << shift, high = (u32)new_value()[j * 16 + 8 + row()] << shift;
      if (r < 8) {
        v_[j].x = (v_[j].x & keep) | low;
        v_[j].z = (v_[j].z & keep) | high;
      } else {
        v_[j].y = (v_[j].y & keep) | low;
        v_[j].w = (v_[j].w & keep) | high;
      }
    }
  }

  // Scores of 16 positions: p[h] for (position row(), head column() + h), p[2 + h] for (position row() + 8, the same).
  KOGC_DEVICE void scores(float (&p)[4], int base, int lowest, int position) {
    float c[2][4] = {};
    KOGC_UNROLL for (int s = 0; s < DIM / 32; s++) {
      const u16* from = queries() + row() * ROW + s * 32 + (lane() & 3) * 8;
      const Words high = *(const Words*)from, low = *(const Words*)(from + 8 * ROW);
      const Words &a = k_[0][s], &b = k_[1][s];
      mma<false>(c[0], a.x, b.x, a.y, b.y, high.x, high.y);
      mma<false>(c[1], a.z, b.z, a.w, b.w, high.z, high.w);
      mma<false>(c[0], a.x, b.x, a.y, b.y, low.x, low.y);
      mma<false>(c[1], a.z, b.z, a.w, b.w, low.z, low.w);
    }
    KOGC_UNROLL for (int i = 0; i < 4; i++) {
      const int at = base + row() + i / 2 * 8;
      p[i] = at >= lowest && at <= position ? c[0][i] + c[1][i] : LOWEST;
    }
  }

  // Turns scores into probabilities relative to the new maximum; `keep` is what the sums so far must be multiplied with.
  KOGC_DEVICE void softmax(float (&p)[4], float (&keep)[2]) {
    KOGC_UNROLL for (int h = 0; h < 2; h++) {
      float m = fmaxf(p[h], p[h + 2]);
      KOGC_UNROLL for (int s = 4; s < 32; s *= 2) m = fmaxf(m, shuffle_xor(m, s));
      m = fmaxf(m, maximum_[h]);
      keep[h] = exp2_fast(maximum_[h] - m);
      maximum_[h] = m;
      p[h] = exp2_fast(p[h] - m);
      p[h + 2] = exp2_fast(p[h + 2] - m);
      sum_[h] = sum_[h] * keep[h] + p[h] + p[h + 2];
    }
  }

  KOGC_DEVICE void accumulate(const float (&p)[4], const float (&keep)[2]) {
    u32 high[2], low[2];  // [positions 0-7, 8-15], transposed: lane holds head row(), positions column() and + 1
    KOGC_UNROLL for (int t = 0; t < 2; t++) {
      const u16 a = float_to_bf16(p[2 * t]), b = float_to_bf16(p[2 * t + 1]);
      high[t] = transpose8x8(pack16(a, b));
      low[t] = transpose8x8(pack16(float_to_bf16(p[2 * t] - bf16_to_float(a)), float_to_bf16(p[2 * t + 1] - bf16_to_float(b))));
    }
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++) {
      KOGC_UNROLL for (int e = 0; e < 4; e++) o_[j][e] *= keep[e % 2];
      mma<false>(o_[j], v_[j].x, v_[j].z, v_[j].y, v_[j].w, high[0], high[1]);
      mma<false>(o_[j], v_[j].x, v_[j].z, v_[j].y, v_[j].w, low[0], low[1]);
    }
  }

  Words k_[2][DIM / 32], v_[DIM / 16];
  float o_[DIM / 16][4] = {};  // [16 dimensions]: (row(), column()), (row(), column() + 1), and the same of row() + 8
  float maximum_[2] = {LOWEST, LOWEST}, sum_[2] = {};  // of heads column() and + 1; the sums over this lane's positions only
};

}  // namespace kogc
