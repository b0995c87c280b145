// Attention products on tensor cores. A warp takes 16 positions of a chunk at a time: scores are A = keys (16 positions)
// times B = queries (8 heads), outputs are A = values (16 dimensions) times B = probabilities (8 heads). Queries and
// probabilities go through as two BF16 numbers each, what is rounded off being the second, so that only keys and values
// are as coarse as the cache.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE char* scratch() { return shared() + P::ACTIVATION_OFFSET; }

template <class P> class AttentionCore {
  static constexpr int DIM = P::HEAD_DIM, ROW = DIM + 16;  // padded row of a query: rows of a fragment in different banks
  static constexpr int HEADS = P::HEADS_PER_BLOCK, OUT = DIM + 4, PAIRS = (HEADS + 1) / 2, STEPS = DIM / 16;
  struct alignas(8) Pair { float a, b; };

 public:
  KOGC_DEVICE void store_query(int head, int d, float v) {
    v *= Scales<P>::UNIT;
    const u16 high = float_to_bf16(v);
    queries()[head * ROW + d] = high;
    queries()[(8 + head) * ROW + d] = float_to_bf16(v - bf16_to_float(high));
  }
  KOGC_DEVICE void store_key(u8* chunk, int row, int d, u16 v) {
    new_key()[d] = v;
    CachePlace<P>::put(chunk, CachePlace<P>::key(row, d), v);
  }
  KOGC_DEVICE void store_value(u8* chunk, int row, int d, u16 v) {
    new_value()[d % 8 * (DIM / 8) + d / 8] = v;
    CachePlace<P>::put(chunk, CachePlace<P>::value(row, d), v);
  }
  KOGC_DEVICE void store_key_scale(u8* chunk, int row, u32 exponent) { store_scale(chunk, row, false, exponent); }
  KOGC_DEVICE void store_value_scale(u8* chunk, int row, u32 exponent) { store_scale(chunk, row, true, exponent); }

  // A chunk of the cache, from the ring, a tile to a warp: its keys are loaded before the query is there, if all tiles are.
  KOGC_DEVICE void load_keys(const Stream<P>& stream, int chunk, int position, const Where& where) {
    if constexpr (Tiles<P>::WHOLE) {
      wait_full<P>(stream, stages(chunk, position), where);
      load_tile_keys(pieces(stream));
    }
  }
  KOGC_DEVICE void take_chunk(Stream<P>& stream, const u8*, int chunk, int lowest, int position, const Where& where) {
    const int base = chunk * CHUNK + warp_ * 16;
    const bool seen = base <= position && base + 15 >= lowest;
    if constexpr (Tiles<P>::WHOLE) {
      if (seen) take_tile(pieces(stream), base, lowest, position);
      held_ = stages(chunk, position);
    } else {  // stage by stage: the next ones come when all warps have given these back
      const int count = stages(chunk, position);
#pragma unroll 1
      for (int stage = 0; stage < count; stage++) {
        wait_full<P>(stream, where);
        if (seen && stage == warp_ / Tiles<P>::IN_STAGE) {
          load_tile_keys(tile(stream));
          take_tile(tile(stream), base, lowest, position);
        }
        give_back(stream, 1);
      }
    }
  }

  // The same of two chunks, whose products and softmax do not wait for each other: FP8 comes twice as fast as BF16.
  static constexpr bool PAIRS_CHUNKS = P::KV_FP8 && Tiles<P>::WHOLE && 2 * Tiles<P>::MOST_STAGES <= P::STAGES;
  KOGC_DEVICE void take_chunks(Stream<P>& stream, int first, int second, int lowest, int position, const Where& where) {
    constexpr int MOST = Tiles<P>::MOST_STAGES;
    Stream<P> behind = stream;
    behind.advance(MOST);  // the first of two is whole
    const int last = stages(second, position), a = first * CHUNK + warp_ * 16, b = second * CHUNK + warp_ * 16;
    wait_full<P>(behind, last, where);
    const bool sees_first = a + 15 >= lowest, sees_second = b <= position;
    // A tile that is not seen scores nothing; where the second has not even been copied, the first lends its numbers.
    if (sees_first || sees_second) take_tiles<2>({pieces(stream), pieces(sees_second ? behind : stream)}, {a, b}, lowest, position);
    held_ = MOST + last;
  }

  // Gives back the stages of what was taken last.
  KOGC_DEVICE void leave(Stream<P>& stream) { if constexpr (Tiles<P>::WHOLE) give_back(stream, held_); }

  // This warp's sums and outputs, to where all warps' meet. The heads of a lane's two columns lie side by side.
  KOGC_DEVICE void finish(int heads) {
    softmax_.add_lanes();
    if (column() >= heads) return;
    Pair* to = out(warp_, column() / 2) + row();
    KOGC_UNROLL for (int j = 0; j < STEPS; j++) {
      to[j * 16] = {softmax_.o[j][0] * Scales<P>::UNIT, softmax_.o[j][1] * Scales<P>::UNIT};
      to[j * 16 + 8] = {softmax_.o[j][2] * Scales<P>::UNIT, softmax_.o[j][3] * Scales<P>::UNIT};
    }
    if (row() == 0) {
      to[DIM] = {softmax_.maximum[0], softmax_.maximum[1]};
      to[DIM + 1] = {softmax_.sum[0], softmax_.sum[1]};
    }
  }

  // Hands each word of the partial output to `result(head, index, {word})`: DIM outputs; maximum, sum, two zeros. A thread has
  // a word of two heads, so that many share the work.
  template <class Result> KOGC_DEVICE void outputs(int heads, Result result) {
    for (int i = thread(); i < (heads + 1) / 2 * DIM; i += THREADS) {
      const int pair = i / DIM, d = i % DIM;
      Pair maximum = {LOWEST, LOWEST}, weights[WARPS], sum = {}, o = {};
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) weights[w] = out(w, pair)[DIM];
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) maximum = {fmaxf(maximum.a, weights[w].a), fmaxf(maximum.b, weights[w].b)};
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
        const Pair weight = {exp2_fast(weights[w].a - maximum.a), exp2_fast(weights[w].b - maximum.b)};
        add(o, weight, out(w, pair)[d]);  // a warp without positions has weight zero and zeros
        add(sum, weight, out(w, pair)[DIM + 1]);
      }
      const Pair extra = d == 0 ? maximum : d == 1 ? sum : Pair{0, 0};
      const auto put = [&](int head, float word, float beside) {
        const float words[2][1] = {{word}, {beside}};
        result(head, d, words[0]);
        if (d < 4) result(head, DIM + d, words[1]);
      };
      put(2 * pair, o.a, extra.a);
      if (2 * pair + 1 < heads) put(2 * pair + 1, o.b, extra.b);
    }
  }

 private:
  static KOGC_DEVICE u16* queries() { return (u16*)scratch<P>(); }
  static KOGC_DEVICE u16* new_key() { return queries() + 16 * ROW; }
  static KOGC_DEVICE u16* new_value() { return new_key() + DIM; }  // [dimension % 8][dimension / 8]
  static KOGC_DEVICE u16* new_scales() { return new_value() + DIM; }  // exponents: of the key, of the value
  static KOGC_DEVICE Pair* out(int warp, int pair) { return (Pair*)(new_scales() + (P::KV_FP8 ? 8 : 0)) + (warp * PAIRS + pair) * OUT; }
  static KOGC_DEVICE void store_scale(u8* chunk, int row, bool value, u32 exponent) {
    new_scales()[value] = (u16)exponent;
    chunk[CachePlace<P>::scale(row, value)] = (u8)exponent;
  }
  static KOGC_DEVICE void add(Pair& to, const Pair& weight, const Pair& v) { to = {to.a + weight.a * v.a, to.b + weight.b * v.b}; }
  static KOGC_DEVICE int row() { return lane() >> 2; }          // of A and C: a position or dimension; of B: a head
  static KOGC_DEVICE int column() { return (lane() & 3) * 2; }  // first of this lane's two columns of C: heads

  static KOGC_DEVICE int stages(int chunk, int position) {
    return (Tiles<P>::in_use(chunk, position) + Tiles<P>::IN_STAGE - 1) / Tiles<P>::IN_STAGE;
  }
  KOGC_DEVICE const Piece<P>* pieces(const Stream<P>& stream) const {
    Stream<P> mine = stream;
    mine.advance(warp_ / Tiles<P>::IN_STAGE);
    return tile(mine);
  }
  KOGC_DEVICE const Piece<P>* tile(const Stream<P>& at) const {  // this lane's of this warp's, in the stage at hand
    return (const Piece<P>*)(Ring<P>::stage(at.slot) + warp_ % Tiles<P>::IN_STAGE * Tiles<P>::BYTES) + lane();
  }
  KOGC_DEVICE void load_tile_keys(const Piece<P>* from) {
    KOGC_UNROLL for (int s = 0; s < STEPS; s++) k_[s] = from[s * 32];
  }

  // 16 positions, whose keys are loaded.
  KOGC_DEVICE void take_tile(const Piece<P>* tile, int base, int lowest, int position) { take_tiles<1>({tile}, {base}, lowest, position); }
  template <int N> KOGC_DEVICE void take_tiles(const Piece<P>* const (&tiles)[N], const int (&bases)[N], int lowest, int position) {
    Piece<P> v[N][STEPS];
    Scales<P> scales[N];
    float p[N][4], keep[2];
    KOGC_UNROLL for (int n = 0; n < N; n++) {
      scales[n].load(tiles[n]);
      if (n) load_tile_keys(tiles[n]);
      if (n == N - 1 && (N == 1 || bases[n] <= position)) insert_key(scales[n], position - bases[n]);
      scores(p[n], scales[n], bases[n], lowest, position);
    }
    KOGC_UNROLL for (int n = 0; n < N; n++) KOGC_UNROLL for (int j = 0; j < STEPS; j++) v[n][j] = tiles[n][(STEPS + j) * 32];
    softmax_.softmax(p, keep);
    KOGC_UNROLL for (int n = 0; n < N; n++) scales[n].values(p[n]);
    if (N == 1 || bases[N - 1] <= position) insert_value(v[N - 1], position - bases[N - 1]);
    softmax_.accumulate(p, keep, v);
  }

  // The token at hand may not yet be in the copied keys and values: row `r` of these 16, if it is among them.
  KOGC_DEVICE void insert_key(Scales<P>& scales, int r) {
    if (r >= 16 || r % 8 != row()) return;
    KOGC_UNROLL for (int s = 0; s < STEPS; s++) replace_key(k_[s], *(const Quad*)(new_key() + s * 16 + column() * 2), r);
    if constexpr (P::KV_FP8) {
      const u32 both = *(const u32*)new_scales();
      scales.bytes = replaced(scales.bytes, both, r / 8 * 8, 0x00ff00ff);
    }
  }
  KOGC_DEVICE void insert_value(Piece<P> (&v)[STEPS], int r) {
    if (r >= 16 || r % 8 / 2 != (lane() & 3)) return;
    const u32* two = (const u32*)(new_value() + row() * (DIM / 8));  // of dimensions row() and row() + 8 of each sixteen
    KOGC_UNROLL for (int j = 0; j < STEPS; j++) replace_value(v[j], (u16)two[j], (u16)(two[j] >> 16), r);
  }
  static KOGC_DEVICE void replace_key(Words& k, const Quad& key, int r) {
    if (r < 8) {
      k.x = key.low;
      k.z = key.high;
    } else {
      k.y = key.low;
      k.w = key.high;
    }
  }
  static KOGC_DEVICE void replace_key(Quad& k, const Quad& key, int r) {
    k = {replaced(k.low, key.low, r / 8 * 8, 0x00ff00ff), replaced(k.high, key.high, r / 8 * 8, 0x00ff00ff)};
  }
  static KOGC_DEVICE void replace_value(Words& v, u16 first, u16 second, int r) {  // of dimensions row() and row() + 8
    const u32 keep = r % 2 ? 0x0000ffffu : 0xffff0000u, shift = r % 2 * 16;
    const u32 low = (u32)first << shift, high = (u32)second << shift;
    if (r < 8) {
      v.x = (v.x & keep) | low;
      v.z = (v.z & keep) | high;
    } else {
      v.y = (v.y & keep) | low;
      v.w = (v.w & keep) | high;
    }
  }
  static KOGC_DEVICE void replace_value(Quad& v, u16 first, u16 second, int r) {
    const int shift = r % 2 * 16 + r / 8 * 8;
    v = {replaced(v.low, first, shift), replaced(v.high, second, shift)};
  }

  // Scores of 16 positions: p[h] for (position row(), head column() + h), p[2 + h] for (position row() + 8, the same).
  KOGC_DEVICE void scores(float (&p)[4], const Scales<P>& scales, int base, int lowest, int position) {
    float c[2][2][4] = {};  // chains of dependent products
    const u16* from = queries() + (row() < HEADS ? row() : 0) * ROW + column() * 2;
    KOGC_UNROLL for (int i = 0; i < 2 * STEPS; i++) {  // a key from FP8 becomes an operand once for both parts
      const int part = P::KV_FP8 ? i % 2 : i / STEPS, s = P::KV_FP8 ? i / 2 : i % STEPS;
      const Quad q = *(const Quad*)(from + part * (8 * ROW) + s * 16);  // what BF16 holds of the queries, and what it leaves
      const Words k = operand(k_[s]);
      mma<false>(c[part][s % 2], k.x, k.y, k.z, k.w, q.low, q.high);
    }
    KOGC_UNROLL for (int i = 0; i < 4; i++) {
      const int at = base + row() + i / 2 * 8;
      p[i] = at >= lowest && at <= position ? scales.key((c[0][0][i] + c[0][1][i]) + (c[1][0][i] + c[1][1][i]), i) : LOWEST;
    }
  }

  const int warp_ = scalar(warp());
  int held_ = 0;  // stages of what was taken last
  Piece<P> k_[STEPS];
  RunningSoftmax<DIM> softmax_;
};

}  // namespace kogc
