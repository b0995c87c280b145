// Attention products on matrix instructions. A wave takes 16 positions of a chunk, whose keys are in registers since before
// the query was there. Scores are a = keys (16 positions) times b = queries: eight heads, and in columns 8 to 15 what BF16
// leaves of them, so that only keys and values are as coarse as the cache. Outputs are a = values (16 dimensions) times b =
// probabilities, split in the same way, which lie in the lanes as the scores came.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE char* scratch() { return shared() + P::ACTIVATION_OFFSET; }

template <class P> class AttentionCore {
  static constexpr int DIM = P::HEAD_DIM, ROW = DIM + 16;  // padded row of a query
  static constexpr int HEADS = P::HEADS_PER_BLOCK, OUT = DIM + 4;
  static constexpr int LOADS = 2 * DIM / LANES;  // of a tile's keys, and as many of its values
  static constexpr int GROUPS = 8 / ROWS;        // of 16 dimensions, in one load of values
  // Where a block has one unit in every layer, it knows its chunk before it is told.
  static constexpr bool AHEAD = Units<P>::COUNT <= Units<P>::STRIDE;
  static constexpr bool VALUES_AHEAD = AHEAD && LANES == 64;  // else they would take more registers than RDNA4 has
  struct alignas(16) Four { float a, b, c, d; };
  struct alignas(16) Values { Slice slice[GROUPS]; };

 public:
  static constexpr bool PAIRS_CHUNKS = false;
  KOGC_DEVICE void store_query(int head, int d, float v) {
    v *= UNIT;
    const u16 high = float_to_bf16(v);
    queries()[head * ROW + d] = high;
    queries()[(8 + head) * ROW + d] = float_to_bf16(v - bf16_to_float(high));
  }
  // A tile holds 16 positions: keys, then values, each in the order in which lanes load them, then the exponents of an FP8
  // cache (kogc/kv_layout.py).
  KOGC_DEVICE void store_key(u8* chunk, int row, int d, u16 v) {
    put((u8*)new_key(), d / 8, d % 8, v);
    put(chunk + row / 16 * TILE, d / 8 * 16 + row % 16, d % 8, v);
  }
  KOGC_DEVICE void store_value(u8* chunk, int row, int d, u16 v) {
    new_value()[d] = v;
    const int r = row % 16, group = d / 16, owner = r / ROWS * 16 + d % 16, element = group % GROUPS * ROWS + r % ROWS;
    put(chunk + row / 16 * TILE + HALF, group / GROUPS * LANES + owner, element, v);
  }
  KOGC_DEVICE void store_key_scale(u8* chunk, int row, u32 exponent) { store_scale(chunk, row, 0, exponent); }
  KOGC_DEVICE void store_value_scale(u8* chunk, int row, u32 exponent) { store_scale(chunk, row, 1, exponent); }

  KOGC_DEVICE void load_keys(const Stream<P>&, int chunk, int position, const Where& where) {
    if (!AHEAD || chunk * CHUNK + warp() * 16 > position) return;
    const u8* from = tile(chunk_address<P>(where.args.kv, where.layer, Units<P>::first() / P::HEAD_TILES, chunk));
    load_tile_keys(from);
    if constexpr (VALUES_AHEAD) load_tile_values(from);
  }
  KOGC_DEVICE void take_chunk(Stream<P>&, const u8* from, int chunk, int lowest, int position, const Where&) {
    const int base = chunk * CHUNK + warp() * 16;
    if (base > position || base + 15 < lowest) return;
    if constexpr (!AHEAD) load_tile_keys(tile(from));
    if constexpr (!VALUES_AHEAD) load_tile_values(tile(from));
    float p[ROWS];
    insert_key(position - base);
    scores(p, base, lowest, position);
    insert_value(position - base);
    const float keep = softmax(p);
    if constexpr (P::KV_FP8) KOGC_UNROLL for (int i = 0; i < ROWS; i++) p[i] *= scale(1, i);
    accumulate(p, keep);
  }

  KOGC_DEVICE void leave(Stream<P>&) {}

  // This wave's sums and outputs, to where all waves' meet.
  KOGC_DEVICE void finish(int heads) {
    for (int m = 16; m < LANES; m *= 2) sum_ += shuffle_xor(sum_, m);
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++) KOGC_UNROLL for (int i = 0; i < ROWS; i++) o_[j].v[i] += neighbour<8>(o_[j].v[i]);
    if (column() >= heads) return;
    float* to = out(warp(), column());
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++)
      KOGC_UNROLL for (int i = 0; i < ROWS; i += 4)
        *(Four*)(to + j * 16 + sixteen() * ROWS + i) = {o_[j].v[i] * UNIT, o_[j].v[i + 1] * UNIT, o_[j].v[i + 2] * UNIT, o_[j].v[i + 3] * UNIT};
    if (sixteen() == 0) *(Four*)(to + DIM) = {maximum_, sum_, 0, 0};
  }

  // Hands each vector of the partial output to `result(head, index, values)`: DIM outputs; maximum, sum, two zeros.
  template <class Result> KOGC_DEVICE void outputs(int heads, Result result) {
    constexpr int VECTORS = OUT / 4;
    for (int i = thread(); i < heads * VECTORS; i += THREADS) {
      const int head = i / VECTORS, d = i % VECTORS * 4;
      float maximum = LOWEST, sums[4] = {};
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, out(w, head)[DIM]);
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
        const float weight = exp2_fast(out(w, head)[DIM] - maximum);  // of a wave without positions: zero
        const Four four = *(const Four*)(out(w, head) + d);
        sums[0] += weight * four.a;
        sums[1] += weight * four.b;
        sums[2] += weight * four.c;
        sums[3] += weight * four.d;
      }
      if (d == DIM) sums[0] = maximum;
      result(head, d, sums);
    }
  }

 private:
  static constexpr int HALF = 16 * DIM * (P::KV_FP8 ? 1 : 2), TILE = P::CHUNK_BYTES / (CHUNK / 16);  // bytes
  static constexpr float UNIT = P::KV_FP8 ? FP8_HALF : 1.0f;  // queries and outputs are multiplied with it

  static KOGC_DEVICE void put(u8* to, int piece, int element, u16 v) {
    if constexpr (P::KV_FP8) to[piece * 8 + fp8_byte(element)] = (u8)v;
    else ((u16*)to)[piece * 8 + element] = v;
  }
  static KOGC_DEVICE void store_scale(u8* chunk, int row, int which, u32 exponent) {
    new_scales()[which] = (u16)exponent;
    chunk[row / 16 * TILE + 2 * HALF + which * 16 + row % 16] = (u8)exponent;
  }
  KOGC_DEVICE float scale(int which, int i) const { return fp8_scale(scales_[which][i / 4] >> i % 4 * 8 & 0xff); }

  static KOGC_DEVICE u16* queries() { return (u16*)scratch<P>(); }
  static KOGC_DEVICE u16* new_key() { return queries() + 16 * ROW; }
  static KOGC_DEVICE u16* new_value() { return new_key() + DIM; }
  static KOGC_DEVICE u16* new_scales() { return new_value() + DIM; }  // exponents: of the key, of the value
  static KOGC_DEVICE float* out(int warp, int head) { return (float*)(new_scales() + (P::KV_FP8 ? 8 : 0)) + (warp * HEADS + head) * OUT; }
  static KOGC_DEVICE int sixteen() { return lane() / 16; }
  static KOGC_DEVICE int column() { return lane() % 16; }  // of b and c: a head, its coarse part or its rest; row of a

  static KOGC_DEVICE const u8* tile(const u8* chunk) { return chunk + warp() * TILE; }
  KOGC_DEVICE void load_tile_keys(const u8* tile) {
    const Piece<P>* from = (const Piece<P>*)tile + lane();
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) k_[i] = from[i * LANES];
    if constexpr (P::KV_FP8) {
      const u32* scales = (const u32*)(tile + 2 * HALF) + sixteen() * (ROWS / 4);
      KOGC_UNROLL for (int i = 0; i < ROWS / 4; i++) {
        scales_[0][i] = scales[i];
        scales_[1][i] = scales[4 + i];
      }
    }
  }
  KOGC_DEVICE void load_tile_values(const u8* tile) {
    const Piece<P>* from = (const Piece<P>*)(tile + HALF) + lane();
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) v_[i] = from[i * LANES];
  }

  // The token at hand is not yet in what was loaded: row `r` of these 16, if it is among them.
  KOGC_DEVICE void insert_key(int r) {
    if constexpr (P::KV_FP8) insert_scales(r);
    if (r >= 16 || r != column()) return;
    const Piece<P>* from = (const Piece<P>*)new_key() + sixteen();
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) k_[i] = from[i * (DEPTH / 8)];
  }
  KOGC_DEVICE void insert_scales(int r) {
    if (r >= 16 || r / ROWS != sixteen()) return;
    KOGC_UNROLL for (int which = 0; which < 2; which++) KOGC_UNROLL for (int i = 0; i < ROWS / 4; i++) {
      u32& w = scales_[which][i];
      if (i == r % ROWS / 4) w = replaced(w, new_scales()[which], r % 4 * 8);
    }
  }
  KOGC_DEVICE void insert_value(int r) {
    if (r >= 16 || r / ROWS != sixteen()) return;
    KOGC_UNROLL for (int i = 0; i < LOADS; i++)
      KOGC_UNROLL for (int group = 0; group < GROUPS; group++)
        replace_value(v_[i], group, new_value()[(i * GROUPS + group) * 16 + column()], r);
  }
  static KOGC_DEVICE void replace_value(Words& words, int group, u32 by, int r) {
    Values v = bits<Values>(words);
    KOGC_UNROLL for (int pair = 0; pair < ROWS / 2; pair++) {
      u32& w = v.slice[group].w[pair];
      if (pair == r % ROWS / 2) w = replaced(w, by, r % 2 * 16, 0xffff);
    }
    words = bits<Words>(v);
  }
  static KOGC_DEVICE void replace_value(Quad& v, int group, u32 by, int r) {
    const int byte = fp8_byte(r % 4) * 8;
    if (group * ROWS / 4 + r % ROWS / 4 == 0) v.low = replaced(v.low, by, byte);
    else v.high = replaced(v.high, by, byte);
  }

  // Scores of 16 positions: p[i] of position sixteen() * ROWS + i, for head column() % 8.
  KOGC_DEVICE void scores(float (&p)[ROWS], int base, int lowest, int position) {
    Sums c = {};
    const u16* from = queries() + (column() % 8 < HEADS ? column() : 0) * ROW + sixteen() * 8;
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) multiply_tile<false>(c, operand(k_[i]), *(const Words*)(from + i * DEPTH));
    KOGC_UNROLL for (int i = 0; i < ROWS; i++) {
      const int at = base + sixteen() * ROWS + i;
      float score = c.v[i] + neighbour<8>(c.v[i]);
      if constexpr (P::KV_FP8) score *= scale(0, i);
      p[i] = at >= lowest && at <= position ? score : LOWEST;
    }
  }

  // Turns scores into probabilities relative to the new maximum; returns what the sums so far must be multiplied with.
  KOGC_DEVICE float softmax(float (&p)[ROWS]) {
    float m = maximum_;
    KOGC_UNROLL for (int i = 0; i < ROWS; i++) m = fmaxf(m, p[i]);
    for (int s = 16; s < LANES; s *= 2) m = fmaxf(m, shuffle_xor(m, s));
    const float keep = exp2_fast(maximum_ - m);
    maximum_ = m;
    sum_ *= keep;
    KOGC_UNROLL for (int i = 0; i < ROWS; i++) {
      p[i] = exp2_fast(p[i] - m);
      sum_ += p[i];
    }
    return keep;
  }

  KOGC_DEVICE void accumulate(const float (&p)[ROWS], float keep) {
    Slice b;
    KOGC_UNROLL for (int i = 0; i < ROWS; i += 2) b.w[i / 2] = pack16(part_of(p[i]), part_of(p[i + 1]));
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++) {
      KOGC_UNROLL for (int i = 0; i < ROWS; i++) o_[j].v[i] *= keep;
      multiply_positions(o_[j], bits<Values>(operand(v_[j / GROUPS])).slice[j % GROUPS], b);
    }
  }
  static KOGC_DEVICE u16 part_of(float p) {
    const u16 coarse = float_to_bf16(p);
    return column() < 8 ? coarse : float_to_bf16(p - bf16_to_float(coarse));
  }

  Piece<P> k_[LOADS], v_[LOADS];
  u32 scales_[2][ROWS / 4] = {};  // exponents of four positions each: of keys, of values
  Sums o_[DIM / 16] = {};  // 16 dimensions each: sixteen() * ROWS + i, for column()
  float maximum_ = LOWEST, sum_ = 0;  // of head column() % 8; the sum over this lane's positions only
};

}  // namespace kogc
