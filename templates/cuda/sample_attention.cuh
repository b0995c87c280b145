// Attention of samples. A block takes a sample and a KV head: columns are the heads of the group, keys and values those of
// the prompt, which all samples share, and then the sample's own. Its warps deal with 16 positions at a time in turns. The
// block also turns the new key and value into what the cache holds, in the sample's own pages.
#pragma once

namespace kogc {

template <class P> class SampleAttention {
  using Q = typename P::Samples;
  static constexpr int DIM = P::HEAD_DIM, ROW = DIM + 16, STEPS = DIM / 16, TILE = 16, HEADS = P::HEADS_PER_BLOCK;
  static constexpr bool VALUES_AHEAD = KEYS_AHEAD && DIM <= 64;  // wider heads leave no registers for values before their scores are known
  static constexpr int CHAINS = KEYS_AHEAD ? 2 : 1;  // of dependent products

 public:
  KOGC_DEVICE SampleAttention(const SampleArgs& args, int layer, int position, int sample, int kv_head)
      : args_(args), layer_(layer), position_(position), sample_(sample), kv_head_(kv_head) {}

  // vector(row, value): a HeadVector of the sample, from row `row` of the QKV results. store(column, four): an output.
  template <class Vector, class Store> KOGC_DEVICE void run(Vector vector, Store store) {
    const int window = P::window(layer_);
    lowest_ = window && position_ >= window ? position_ - window + 1 : 0;
#pragma unroll 1
    for (int tile = 0; tile < P::HEAD_TILES; tile++) {
      const int first = kv_head_ * P::GROUP + tile * HEADS, left = P::GROUP - tile * HEADS, heads = left < HEADS ? left : HEADS;
      const Tiles tiles = this->tiles();
      Piece<P> k[STEPS] = {}, v[1][STEPS] = {};
      const bool early = KEYS_AHEAD && warp_ < tiles.count - 1, late = !early && warp_ < tiles.count;  // the last one waits for the new key
      if (early) load(k, tiles.at(*this, warp_));
      if (VALUES_AHEAD && early) load(v[0], tiles.at(*this, warp_) + STEPS * 32);
      prepare(first, heads, tile == 0, vector);
      sync();
      if (late) load(k, tiles.at(*this, warp_));
      if (VALUES_AHEAD && late) load(v[0], tiles.at(*this, warp_) + STEPS * 32);
      products(tiles, k, v);
      merge().put(softmax_);
      sync();
      merge().outputs(heads, [&](int head, int d, const float (&four)[4]) { store((first + head) * DIM + d, four); });
      sync();
    }
  }

 private:
  static KOGC_DEVICE u16* query(int row) { return (u16*)(shared() + Q::WORK_OFFSET) + row * ROW; }
  static KOGC_DEVICE Merge<P> merge() { return {query(16)}; }
  static KOGC_DEVICE int row() { return lane() >> 2; }
  static KOGC_DEVICE int column() { return (lane() & 3) * 2; }

  KOGC_DEVICE u8* own_page(int chunk) const {
    const u64 head = (u64)opaque(layer_) * P::KV_HEADS + kv_head_;  // opaque: not kept in registers from tile to tile
    return args_.pages + ((head * args_.n_samples + sample_) * args_.n_pages + chunk - args_.start / CHUNK) * P::CHUNK_BYTES;
  }

  template <class Vector> KOGC_DEVICE void prepare(int first, int heads, bool with_key, Vector vector) {
    using Place = CachePlace<P>;
    u8* page = own_page(position_ / CHUNK);
    const int at = position_ % CHUNK;
    for (int i = warp_; i < 8 + 2 * with_key; i += WARPS) {
      if (i < heads) {
        vector((first + i) * DIM, false).store([&](int d, float v) {
          v *= LOG2E * P::INVERSE_SQRT_HEAD_DIM * Scales<P>::UNIT;
          const u16 high = float_to_bf16(v);
          query(i)[d] = high;
          query(8 + i)[d] = float_to_bf16(v - bf16_to_float(high));
        });
      } else if (i < 8) {
        for (int d = lane(); d < DIM; d += LANES) query(i)[d] = query(8 + i)[d] = 0;
      } else {
        const bool value = i > 8;
        to_cache(vector(P::Q_ROWS + (value * P::KV_HEADS + kv_head_) * DIM, value),
            [&](int d, u16 x) { Place::put(page, value ? Place::value(at, d) : Place::key(at, d), x); },
            [&](u32 exponent) { page[Place::scale(at, value)] = (u8)exponent; });
      }
    }
  }

  // Tiles of the prompt from the window's first on, then the sample's own. The one in which the prompt ends is in both.
  struct Tiles {
    int first, of_prompt, first_own, count;
    KOGC_DEVICE bool own(int i) const { return i >= of_prompt; }
    KOGC_DEVICE int number(int i) const { return own(i) ? first_own + i - of_prompt : first + i; }
    KOGC_DEVICE const Piece<P>* at(const SampleAttention& a, int i) const {
      const int chunk = number(i) / (CHUNK / TILE);
      const u8* page = own(i) ? a.own_page(chunk) : chunk_address<P>(a.args_.kv, a.layer_, a.kv_head_, chunk);
      return (const Piece<P>*)(page + number(i) % (CHUNK / TILE) * CachePlace<P>::BYTES) + lane();
    }
  };
  KOGC_DEVICE Tiles tiles() const {
    const int start = args_.start, first = lowest_ / TILE, of_prompt = start > lowest_ ? (start + TILE - 1) / TILE - first : 0;
    const int first_own = (start > lowest_ ? start : lowest_) / TILE;
    return {first, of_prompt, first_own, of_prompt + position_ / TILE + 1 - first_own};
  }

  KOGC_DEVICE void products(const Tiles& tiles, Piece<P> (&k)[STEPS], Piece<P> (&v)[1][STEPS]) {
#pragma unroll 1
    for (int i = warp_; i < tiles.count; i += WARPS) {
      const bool own = tiles.own(i);
      if (!VALUES_AHEAD) load(v[0], tiles.at(*this, i) + STEPS * 32);
      Scales<P> scales;
      scales.load(tiles.at(*this, i));
      float p[1][4], keep[2];
      scores(p[0], k, scales, tiles.number(i) * TILE, own ? args_.start : 0, own ? position_ : args_.start - 1);
      if (i + WARPS < tiles.count) load(k, tiles.at(*this, i + WARPS));
      softmax_.softmax(p, keep);
      scales.values(p[0]);
      softmax_.accumulate(p, keep, v);
      if (VALUES_AHEAD && i + WARPS < tiles.count) load(v[0], tiles.at(*this, i + WARPS) + STEPS * 32);
    }
  }

  static KOGC_DEVICE void load(Piece<P> (&to)[STEPS], const Piece<P>* from) { KOGC_UNROLL for (int s = 0; s < STEPS; s++) to[s] = from[s * 32]; }

  // Scores of 16 positions from `base` on, of which those from `from` to `last` count.
  KOGC_DEVICE void scores(float (&p)[4], const Piece<P> (&k)[STEPS], const Scales<P>& scales, int base, int from, int last) {
    float c[2][CHAINS][4] = {};
    KOGC_UNROLL for (int part = 0; part < 2; part++) {
      const u16* q_row = query(8 * part + row()) + column() * 2;
      KOGC_UNROLL for (int s = 0; s < STEPS; s++) {
        const Quad q = *(const Quad*)(q_row + s * 16);
        const Words a = operand(k[s]);
        mma<false>(c[part][s % CHAINS], a.x, a.y, a.z, a.w, q.low, q.high);
      }
    }
    KOGC_UNROLL for (int i = 0; i < 4; i++) {
      const int at = base + row() + i / 2 * 8;
      p[i] = at >= lowest_ && at >= from && at <= last ? scales.key(sum(c[0], i) + sum(c[1], i), i) : LOWEST;
    }
  }

  static KOGC_DEVICE float sum(const float (&c)[CHAINS][4], int i) { return CHAINS == 2 ? c[0][i] + c[CHAINS - 1][i] : c[0][i]; }

  const SampleArgs& args_;
  const int layer_, position_, sample_, kv_head_;
  const int warp_ = scalar(warp());
  int lowest_ = 0;  // position in the window
  RunningSoftmax<DIM> softmax_;
};

}  // namespace kogc
