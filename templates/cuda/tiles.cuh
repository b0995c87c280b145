// Tiles of the cache, 16 positions each, as tensor cores take them: where a chunk has what, the scales of an FP8 cache, and
// what comes of one tile after the other.
#pragma once

namespace kogc {

// Where a chunk of the cache has a key's or value's dimension, in bytes. A tile holds 16 positions: keys, then values, in
// fragments of 16 dimensions, each in the order in which lanes load it; in FP8 the exponents of their scales after that.
template <class P> struct CachePlace {
  static constexpr int HALF = 16 * P::HEAD_DIM * (P::KV_FP8 ? 1 : 2), BYTES = P::CHUNK_BYTES / (CHUNK / 16);

  static KOGC_DEVICE int key(int row, int d) {
    const int r = row % 16, owner = r % 8 * 4 + d % 16 / 4, element = d % 4 / 2 * 4 + r / 8 * 2 + d % 2;
    return row / 16 * BYTES + place(d / 16 * 32 + owner, element);
  }
  static KOGC_DEVICE int value(int row, int d) {
    const int r = row % 16, element = d % 16 / 8 * 4 + r % 2 + r / 8 * 2, owner = d % 8 * 4 + r % 8 / 2;
    return row / 16 * BYTES + HALF + place(d / 16 * 32 + owner, element);
  }
  // Of positions r and r + 8, of keys and of values: four bytes that one lane loads.
  static KOGC_DEVICE int scale(int row, bool value) { return row / 16 * BYTES + 2 * HALF + row % 8 * 4 + value * 2 + row % 16 / 8; }

  static KOGC_DEVICE void put(u8* chunk, int at, u16 v) {
    if constexpr (P::KV_FP8) chunk[at] = (u8)v;
    else *(u16*)(chunk + at) = v;
  }

 private:
  static KOGC_DEVICE int place(int piece, int element) { return P::KV_FP8 ? piece * 8 + fp8_byte(element) : (piece * 8 + element) * 2; }
};

// What products over an FP8 cache are multiplied with: queries and outputs by UNIT, scores and probabilities by their
// position's scale. Of p, elements 0 and 1 are of position `row` of a tile, 2 and 3 of row + 8.
template <class P> struct Scales {
  static constexpr float UNIT = P::KV_FP8 ? FP8_HALF : 1.0f;
  u32 bytes = 0;

  KOGC_DEVICE void load(const Piece<P>* pieces) {  // of this lane, in a tile
    if constexpr (P::KV_FP8) bytes = ((const u32*)((const u8*)(pieces - lane()) + 2 * CachePlace<P>::HALF))[lane() >> 2];
  }
  KOGC_DEVICE float key(float score, int i) const { return P::KV_FP8 ? score * fp8_scale(bytes >> i / 2 * 8 & 0xff) : score; }
  KOGC_DEVICE void values(float (&p)[4]) const {
    if constexpr (P::KV_FP8) KOGC_UNROLL for (int i = 0; i < 4; i++) p[i] *= fp8_scale(bytes >> (16 + i / 2 * 8) & 0xff);
  }
};

// Outputs of a warp's positions so far, for eight columns of queries, relative to the largest score of each.
template <int DIM> struct RunningSoftmax {
  static constexpr int STEPS = DIM / 16;
  // [16 dimensions]: (row lane / 4, column lane % 4 * 2), (the same row, column + 1), and the same of row + 8
  float o[STEPS][4] = {};
  // Of the lane's two columns; the sums over its positions only. The maximum begins above a score that does not count: of a
  // tile that one column of a pass sees nothing of, no number counts there, however large an earlier text has left it.
  float maximum[2] = {LOWEST / 2, LOWEST / 2}, sum[2] = {};

  // Turns scores of N tiles into probabilities relative to the new maximum, with which the sums so far must be multiplied.
  template <int N> KOGC_DEVICE void softmax(float (&p)[N][4], float (&keep)[2]) {
    KOGC_UNROLL for (int h = 0; h < 2; h++) {
      float m = fmaxf(p[0][h], p[0][h + 2]);
      KOGC_UNROLL for (int n = 1; n < N; n++) m = fmaxf(m, fmaxf(p[n][h], p[n][h + 2]));
      KOGC_UNROLL for (int s = 4; s < 32; s *= 2) m = fmaxf(m, shuffle_xor(m, s));
      m = fmaxf(m, maximum[h]);
      keep[h] = exp2_fast(maximum[h] - m);
      maximum[h] = m;
      sum[h] *= keep[h];
      KOGC_UNROLL for (int n = 0; n < N; n++) KOGC_UNROLL for (int e = h; e < 4; e += 2) {
        p[n][e] = exp2_fast(p[n][e] - m);
        sum[h] += p[n][e];
      }
    }
  }

  template <int N, class Piece> KOGC_DEVICE void accumulate(const float (&p)[N][4], const float (&keep)[2], const Piece (&v)[N][STEPS]) {
    constexpr bool FP8 = sizeof(Piece) == sizeof(Quad);  // has no time to wait: products that follow one another are of other sums
    KOGC_UNROLL for (int n = 0; n < N; n++) {
      u32 b[2][2];  // [what BF16 holds, what it leaves][positions 0-7, 8-15], transposed: lane holds column lane / 4, positions lane % 4 * 2 and + 1
      KOGC_UNROLL for (int t = 0; t < 2; t++) {
        const float x = p[n][2 * t], y = p[n][2 * t + 1];
        const u32 both = floats_to_bf16(x, y);
        b[0][t] = transpose8x8(both);
        b[1][t] = transpose8x8(floats_to_bf16(x - bf16_to_float((u16)both), y - as_float(both & 0xffff0000)));
      }
      KOGC_UNROLL for (int i = 0; i < 2 * STEPS; i++) {
        const int part = FP8 ? i / STEPS : i % 2, j = FP8 ? i % STEPS : i / 2;
        if (n == 0 && part == 0) KOGC_UNROLL for (int e = 0; e < 4; e++) o[j][e] *= keep[e % 2];
        const Words a = operand(v[n][j]);
        mma<false>(o[j], a.x, a.z, a.y, a.w, b[part][0], b[part][1]);
      }
    }
  }

  KOGC_DEVICE void add_lanes() {
    KOGC_UNROLL for (int m = 4; m < 32; m *= 2) KOGC_UNROLL for (int h = 0; h < 2; h++) sum[h] += shuffle_xor(sum[h], m);
  }
};

}  // namespace kogc
