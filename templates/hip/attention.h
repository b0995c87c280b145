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

 public:
  KOGC_DEVICE void store_query(int head, int d, float v) {
    const u16 high = float_to_bf16(v);
    queries()[head * ROW + d] = high;
    queries()[(8 + head) * ROW + d] = float_to_bf16(v - bf16_to_float(high));
  }
  // A tile holds 16 positions: keys, then values, each in the order in which lanes load them (kogc/kv_layout.py).
  KOGC_DEVICE void store_key(u16* chunk, int row, int d, u16 v) {
    new_key()[d] = v;
    chunk[row / 16 * (32 * DIM) + (d / 8 * 16 + row % 16) * 8 + d % 8] = v;
  }
  KOGC_DEVICE void store_value(u16* chunk, int row, int d, u16 v) {
    new_value()[d] = v;
    const int r = row % 16, group = d / 16, owner = r / ROWS * 16 + d % 16, element = group % GROUPS * ROWS + r % ROWS;
    chunk[row / 16 * (32 * DIM) + 16 * DIM + (group / GROUPS * LANES + owner) * 8 + element] = v;
  }

  KOGC_DEVICE void load_keys(const Stream<P>&, int chunk, int position, const Where& where) {
    if (!AHEAD || chunk * CHUNK + warp() * 16 > position) return;
    const Words* from = tile(chunk_address<P>(where.args.kv, where.layer, Units<P>::first() / P::HEAD_TILES, chunk));
    load_tile_keys(from);
    if constexpr (VALUES_AHEAD) load_tile_values(from);
  }
  KOGC_DEVICE void take_chunk(Stream<P>&, const u16* from, int chunk, int lowest, int position, const Where&) {
    const int base = chunk * CHUNK + warp() * 16;
    if (base > position || base + 15 < lowest) return;
    if constexpr (!AHEAD) load_tile_keys(tile(from));
    if constexpr (!VALUES_AHEAD) load_tile_values(tile(from));
    float p[ROWS];
    insert_key(position - base);
    scores(p, base, lowest, position);
    insert_value(position - base);
    const float keep = softmax(p);
    accumulate(p, keep);
  }

  // This wave's sums and outputs, to where all waves' meet.
  KOGC_DEVICE void finish(int heads) {
    for (int m = 16; m < LANES; m *= 2) sum_ += shuffle_xor(sum_, m);
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++) KOGC_UNROLL for (int i = 0; i < ROWS; i++) o_[j].v[i] += neighbour<8>(o_[j].v[i]);
    if (column() >= heads) return;
    float* to = out(warp(), column());
    KOGC_UNROLL for (int j = 0; j < DIM / 16; j++)
      KOGC_UNROLL for (int i = 0; i < ROWS; i += 4)
        *(Four*)(to + j * 16 + sixteen() * ROWS + i) = {o_[j].v[i], o_[j].v[i + 1], o_[j].v[i + 2], o_[j].v[i + 3]};
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
  static KOGC_DEVICE u16* queries() { return (u16*)scratch<P>(); }
  static KOGC_DEVICE u16* new_key() { return queries() + 16 * ROW; }
  static KOGC_DEVICE u16* new_value() { return new_key() + DIM; }
  static KOGC_DEVICE float* out(int warp, int head) { return (float*)(new_value() + DIM) + (warp * HEADS + head) * OUT; }
  static KOGC_DEVICE int sixteen() { return lane() / 16; }
  static KOGC_DEVICE int column() { return lane() % 16; }  // of b and c: a head, its coarse part or its rest; row of a

  static KOGC_DEVICE const Words* tile(const u16* chunk) { return (const Words*)chunk + warp() * (4 * DIM) + lane(); }
  KOGC_DEVICE void load_tile_keys(const Words* from) {
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) k_[i] = from[i * LANES];
  }
  KOGC_DEVICE void load_tile_values(const Words* from) {
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) v_[i] = from[2 * DIM + i * LANES];
  }

  // The token at hand is not yet in what was loaded: row `r` of these 16, if it is among them.
  KOGC_DEVICE void insert_key(int r) {
    if (r >= 16 || r != column()) return;
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) k_[i] = *(const Words*)(new_key() + i * DEPTH + sixteen() * 8);
  }
  KOGC_DEVICE void insert_value(int r) {
    if (r >= 16 || r / ROWS != sixteen()) return;
    const u32 keep = r % 2 ? 0x0000ffffu : 0xffff0000u;
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) KOGC_UNROLL for (int group = 0; group < GROUPS; group++) {
      const u32 v = (u32)new_value()[(i * GROUPS + group) * 16 + column()] << r % 2 * 16;
      KOGC_UNROLL for (int pair = 0; pair < ROWS / 2; pair++) {
        u32& w = v_[i].slice[group].w[pair];
        if (pair == r % ROWS / 2) w = (w & keep) | v;
      }
    }
  }

  // Scores of 16 positions: p[i] of position sixteen() * ROWS + i, for head column() % 8.
  KOGC_DEVICE void scores(float (&p)[ROWS], int base, int lowest, int position) {
    Sums c = {};
    const u16* from = queries() + (column() % 8 < HEADS ? column() : 0) * ROW + sixteen() * 8;
    KOGC_UNROLL for (int i = 0; i < LOADS; i++) multiply_tile<false>(c, k_[i], *(const Words*)(from + i * DEPTH));
    KOGC_UNROLL for (int i = 0; i < ROWS; i++) {
      const int at = base + sixteen() * ROWS + i;
      const float score = c.v[i] + neighbour<8>(c.v[i]);
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
      multiply_positions(o_[j], v_[j / GROUPS].slice[j % GROUPS], b);
    }
  }
  static KOGC_DEVICE u16 part_of(float p) {
    const u16 coarse = float_to_bf16(p);
    return column() < 8 ? coarse : float_to_bf16(p - bf16_to_float(coarse));
  }

  struct alignas(16) Values {
    Slice slice[GROUPS];
    KOGC_DEVICE Values& operator=(const Words& w) {
      *this = bits<Values>(w);
      return *this;
    }
  };
  Words k_[LOADS];
  Values v_[LOADS];
  Sums o_[DIM / 16] = {};  // 16 dimensions each: sixteen() * ROWS + i, for column()
  float maximum_ = LOWEST, sum_ = 0;  // of head column() % 8; the sum over this lane's positions only
};

}  // namespace kogc
