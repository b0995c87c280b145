// Attention products on tensor cores. A warp takes 16 positions of a chunk at a time: scores are A = keys (16 positions)
// times B = queries (8 heads), outputs are A = values (16 dimensions) times B = probabilities (8 heads). Queries and
// probabilities go through as two BF16 numbers each, what is rounded off being the second, so that only keys and values
// are as coarse as the cache.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE char* scratch() { return shared() + P::ACTIVATION_OFFSET; }

template <class P> class AttentionCore {
  static constexpr int DIM = P::HEAD_DIM, ROW = DIM + 16;  // padded row of a query: rows of a fragment in different banks
  static constexpr int HEADS = P::HEADS_PER_BLOCK, OUT = DIM + 4, STEPS = DIM / 16;

 public:
  KOGC_DEVICE void store_query(int head, int d, float v) {
    const u16 high = float_to_bf16(v);
    queries()[head * ROW + d] = high;
    queries()[(8 + head) * ROW + d] = float_to_bf16(v - bf16_to_float(high));
  }
  KOGC_DEVICE void load_queries() {
    const u16* from = queries() + row() * ROW + column() * 2;
    KOGC_UNROLL for (int s = 0; s < STEPS; s++) {
      q_[0][s] = *(const Quad*)(from + s * 16);
      q_[1][s] = *(const Quad*)(from + 8 * ROW + s * 16);
    }
  }

  // A tile holds 16 positions: keys, then values, in fragments of 16 dimensions, each in the order in which lanes load it.
  KOGC_DEVICE void store_key(u16* chunk, int row, int d, u16 v) {
    new_key()[d] = v;
    const int r = row % 16, owner = r % 8 * 4 + d % 16 / 4, element = d % 4 / 2 * 4 + r / 8 * 2 + d % 2;
    chunk[row / 16 * (32 * DIM) + (d / 16 * 32 + owner) * 8 + element] = v;
  }
  KOGC_DEVICE void store_value(u16* chunk, int row, int d, u16 v) {
    new_value()[d] = v;
    const int r = row % 16, element = d % 16 / 8 * 4 + r % 2 + r / 8 * 2, owner = d % 8 * 4 + r % 8 / 2;
    chunk[row / 16 * (32 * DIM) + 16 * DIM + (d / 16 * 32 + owner) * 8 + element] = v;
  }

  // One chunk of the cache, from the ring: each warp multiplies its tile.
  KOGC_DEVICE void chunk(Stream<P>& stream, const u16*, int first_position, int lowest, int position, const Where& where) {
    constexpr int IN_STAGE = Tiles<P>::IN_STAGE;
    const int stages = (Tiles<P>::in_use(first_position / CHUNK, position) + IN_STAGE - 1) / IN_STAGE;
    const int base = first_position + warp() * 16;
    wait_full<P, Tiles<P>::MOST_STAGES>(stream, stages, where);
    if (base <= position && base + 15 >= lowest) {
      Stream<P> mine = stream;
      mine.advance(warp() / IN_STAGE);
      tile(Ring<P>::stage(mine.slot) + warp() % IN_STAGE * Tiles<P>::BYTES, base, lowest, position);
    }
    give_back(stream, stages);
  }

  // This warp's sums and outputs, to where all warps' meet.
  KOGC_DEVICE void finish(int heads) {
    KOGC_UNROLL for (int m = 4; m < 32; m *= 2) KOGC_UNROLL for (int h = 0; h < 2; h++) sum_[h] += shuffle_xor(sum_[h], m);
    KOGC_UNROLL for (int h = 0; h < 2; h++) {
      const int head = column() + h;
      if (head >= heads) continue;
      float* to = out(warp(), head) + row();
      KOGC_UNROLL for (int j = 0; j < STEPS; j++) {
        to[j * 16] = o_[j][h];
        to[j * 16 + 8] = o_[j][h + 2];
      }
      if (row() == 0) {
        to[DIM] = maximum_[h];
        to[DIM + 1] = sum_[h];
      }
    }
  }

  // Hands each vector of the partial output to `result(head, index, values)`: DIM outputs; maximum, sum, two zeros.
  template <class Result> KOGC_DEVICE void outputs(int heads, Result result) {
    constexpr int VECTORS = OUT / 4;
    for (int i = thread(); i < heads * VECTORS; i += THREADS) {
      const int head = i / VECTORS, d = i % VECTORS * 4;
      float maximum = LOWEST, weights[WARPS], four[4] = {};
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) weights[w] = out(w, head)[DIM];
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, weights[w]);
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
        const Words o = *(const Words*)(out(w, head) + d);
        const float weight = exp2_fast(weights[w] - maximum);  // zero for a warp without positions, whose outputs are zeros
        four[0] += weight * (d == DIM ? 0 : as_float(o.x));
        four[1] += weight * as_float(o.y);
        four[2] += weight * (d == DIM ? 0 : as_float(o.z));
        four[3] += weight * (d == DIM ? 0 : as_float(o.w));
      }
      if (d == DIM) four[0] = maximum;
      result(head, d, four);
    }
  }

 private:
  static KOGC_DEVICE u16* queries() { return (u16*)scratch<P>(); }
  static KOGC_DEVICE u16* new_key() { return queries() + 16 * ROW; }
  static KOGC_DEVICE u16* new_value() { return new_key() + DIM; }
  static KOGC_DEVICE float* out(int warp, int head) { return (float*)(new_value() + DIM) + (warp * HEADS + head) * OUT; }
  static KOGC_DEVICE int row() { return lane() >> 2; }          // of A and C: a position or dimension; of B: a head
  static KOGC_DEVICE int column() { return (lane() & 3) * 2; }  // first of this lane's two columns of C: heads

  KOGC_DEVICE void tile(const char* from, int base, int lowest, int position) {
    const Words* fragments = (const Words*)from + lane();
    Words k[STEPS], v[STEPS];
    KOGC_UNROLL for (int s = 0; s < STEPS; s++) k[s] = fragments[s * 32];
    KOGC_UNROLL for (int j = 0; j < STEPS; j++) v[j] = fragments[(STEPS + j) * 32];
    float p[4], keep[2];
    insert_key(k, position - base);
    scores(p, k, base, lowest, position);
    softmax(p, keep);
    insert_value(v, position - base);
    accumulate(p, keep, v);
  }

  // The token at hand may not yet be in the copied keys and values: row `r` of these 16, if it is among them.
  KOGC_DEVICE void insert_key(Words (&k)[STEPS], int r) {
    if (r >= 16 || r % 8 != row()) return;
    KOGC_UNROLL for (int s = 0; s < STEPS; s++) {
      const Quad key = *(const Quad*)(new_key() + s * 16 + column() * 2);
      if (r < 8) {
        k[s].x = key.low;
        k[s].z = key.high;
      } else {
        k[s].y = key.low;
        k[s].w = key.high;
      }
    }
  }
  KOGC_DEVICE void insert_value(Words (&v)[STEPS], int r) {
    if (r >= 16 || r % 8 / 2 != (lane() & 3)) return;
    const u32 keep = r % 2 ? 0x0000ffffu : 0xffff0000u, shift = r % 2 * 16;
    KOGC_UNROLL for (int j = 0; j < STEPS; j++) {
      const u32 low = (u32)new_value()[j * 16 + row()] << shift, high = (u32)new_value()[j * 16 + 8 + row()] << shift;
      if (r < 8) {
        v[j].x = (v[j].x & keep) | low;
        v[j].z = (v[j].z & keep) | high;
      } else {
        v[j].y = (v[j].y & keep) | low;
        v[j].w = (v[j].w & keep) | high;
      }
    }
  }

  // Scores of 16 positions: p[h] for (position row(), head column() + h), p[2 + h] for (position row() + 8, the same).
  KOGC_DEVICE void scores(float (&p)[4], const Words (&k)[STEPS], int base, int lowest, int position) {
    float c[2][2][4] = {};  // chains of dependent products
    KOGC_UNROLL for (int s = 0; s < STEPS; s++) KOGC_UNROLL for (int part = 0; part < 2; part++)
      mma<false>(c[part][s % 2], k[s].x, k[s].y, k[s].z, k[s].w, q_[part][s].low, q_[part][s].high);
    KOGC_UNROLL for (int i = 0; i < 4; i++) {
      const int at = base + row() + i / 2 * 8;
      p[i] = at >= lowest && at <= position ? (c[0][0][i] + c[0][1][i]) + (c[1][0][i] + c[1][1][i]) : LOWEST;
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

  KOGC_DEVICE void accumulate(const float (&p)[4], const float (&keep)[2], const Words (&v)[STEPS]) {
    u32 high[2], low[2];  // [positions 0-7, 8-15], transposed: lane holds head row(), positions column() and + 1
    KOGC_UNROLL for (int t = 0; t < 2; t++) {
      const u16 a = float_to_bf16(p[2 * t]), b = float_to_bf16(p[2 * t + 1]);
      high[t] = transpose8x8(pack16(a, b));
      low[t] = transpose8x8(pack16(float_to_bf16(p[2 * t] - bf16_to_float(a)), float_to_bf16(p[2 * t + 1] - bf16_to_float(b))));
    }
    KOGC_UNROLL for (int j = 0; j < STEPS; j++) {
      KOGC_UNROLL for (int e = 0; e < 4; e++) o_[j][e] *= keep[e % 2];
      mma<false>(o_[j], v[j].x, v[j].z, v[j].y, v[j].w, high[0], high[1]);
      mma<false>(o_[j], v[j].x, v[j].z, v[j].y, v[j].w, low[0], low[1]);
    }
  }

  Quad q_[2][STEPS];  // queries of head row(), dimensions column() * 2 .. + 3 of each 16: [what BF16 holds, what it leaves]
  float o_[STEPS][4] = {};  // [16 dimensions]: (row(), column()), (row(), column() + 1), and the same of row() + 8
  float maximum_[2] = {LOWEST, LOWEST}, sum_[2] = {};  // of heads column() and + 1; the sums over this lane's positions only
};

}  // namespace kogc
