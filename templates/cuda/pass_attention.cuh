// Attention of a pass. Columns are (token, head of the group) pairs of one KV head, in tiles of eight as attention.cuh has
// heads; each has a position of its own. A block takes P::Pass::TILES_TOGETHER tiles of columns, its warps 16 positions of each
// chunk, straight from the cache: keys of the next chunk are on their way while this one's values are used.
#pragma once

namespace kogc {

template <class P> class PassAttention {
  using Q = typename P::Pass;
  static constexpr int DIM = P::HEAD_DIM, ROW = DIM + 16, STEPS = DIM / 16, TILE = 16, TOGETHER = Q::TILES_TOGETHER;
  static constexpr int COLUMNS = Q::TOKENS * P::GROUP, TILES = (COLUMNS + 7) / 8, ITEMS = (TILES + TOGETHER - 1) / TOGETHER;

 public:
  static constexpr int COUNT = P::KV_HEADS * ITEMS;

  // Item `item` of COUNT, for tokens at positions `start` .. `start` + `count` - 1. prepare(token, head): a HeadVector, ready.
  template <class Prepare, class Store>
  KOGC_DEVICE void run(const KernelArgs& args, int item, int layer, int start, int count, Prepare prepare, Store store) {
    const int kv_head = item / ITEMS, first = item % ITEMS * (8 * TOGETHER);
    if (first / P::GROUP >= count) return;
    for (int i = warp_; i < 8 * TOGETHER; i += WARPS) {
      const int token = (first + i) / P::GROUP, head = kv_head * P::GROUP + (first + i) % P::GROUP;
      if (token < count) {
        prepare(token, head).store([&](int d, float v) {
          v *= LOG2E * P::INVERSE_SQRT_HEAD_DIM * Scales<P>::UNIT;
          const u16 high = float_to_bf16(v);
          query(i / 8, i % 8)[d] = high;
          query(i / 8, 8 + i % 8)[d] = float_to_bf16(v - bf16_to_float(high));
        });
      } else {
        for (int d = lane(); d < DIM; d += LANES) query(i / 8, i % 8)[d] = query(i / 8, 8 + i % 8)[d] = 0;
      }
    }
    sync();
    const int window = P::window(layer), last_token = (first + 8 * TOGETHER - 1) / P::GROUP;
    const int last = start + (last_token < count ? last_token : count - 1), first_position = start + first / P::GROUP;
    const int lowest = window && first_position >= window ? first_position - window + 1 : 0;
    KOGC_UNROLL for (int k = 0; k < TOGETHER; k++) KOGC_UNROLL for (int h = 0; h < 2; h++) {
      const int token = (first + k * 8 + column() + h) / P::GROUP;
      position_[k][h] = start + (token < count ? token : count - 1);
      lowest_[k][h] = window && position_[k][h] >= window ? position_[k][h] - window + 1 : 0;
    }
    products(args, layer, kv_head, lowest, last);
    KOGC_UNROLL for (int k = 0; k < TOGETHER; k++) {
      merge().put(softmax_[k]);
      sync();
      merge().outputs(8, [&](int c, int d, const float (&four)[4]) {
        const int token = (first + 8 * k + c) / P::GROUP, head = kv_head * P::GROUP + (first + 8 * k + c) % P::GROUP;
        if (token < count) store(token, head * DIM + d, four);
      });
      sync();
    }
  }

 private:
  static KOGC_DEVICE u16* query(int tile, int row) { return (u16*)(shared() + Q::ATTENTION_OFFSET) + (tile * 16 + row) * ROW; }
  static KOGC_DEVICE Merge<P> merge() { return {query(TOGETHER, 0)}; }
  static KOGC_DEVICE int row() { return lane() >> 2; }
  static KOGC_DEVICE int column() { return (lane() & 3) * 2; }

  KOGC_DEVICE void products(const KernelArgs& args, int layer, int kv_head, int lowest, int last) {
    const int first = lowest / CHUNK, end = last / CHUNK + 1;
    const auto tile = [&](int chunk) {
      return (const Piece<P>*)(chunk_address<P>(args.kv, layer, kv_head, chunk) + warp_ * CachePlace<P>::BYTES) + lane();
    };
    const auto seen = [&](int chunk) {
      const int base = chunk * CHUNK + warp_ * TILE;
      return base <= last && base + TILE - 1 >= lowest;
    };
    Piece<P> k[STEPS] = {};
    if (seen(first)) load(k, tile(first));
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk++) {
      if (!seen(chunk)) {
        if (chunk + 1 < end && seen(chunk + 1)) load(k, tile(chunk + 1));
        continue;
      }
      Piece<P> v[1][STEPS];
      Scales<P> scales;
      load(v[0], tile(chunk) + STEPS * 32);
      scales.load(tile(chunk));
      float p[TOGETHER][1][4];
      KOGC_UNROLL for (int t = 0; t < TOGETHER; t++) scores(p[t][0], k, scales, t, chunk * CHUNK + warp_ * TILE);
      if (chunk + 1 < end && seen(chunk + 1)) load(k, tile(chunk + 1));
      KOGC_UNROLL for (int t = 0; t < TOGETHER; t++) {
        float keep[2];
        softmax_[t].softmax(p[t], keep);
        scales.values(p[t][0]);
        softmax_[t].accumulate(p[t], keep, v);
      }
    }
  }

  static KOGC_DEVICE void load(Piece<P> (&to)[STEPS], const Piece<P>* from) { KOGC_UNROLL for (int s = 0; s < STEPS; s++) to[s] = from[s * 32]; }

  // Scores of 16 positions from `base` on: p[h] for (position row(), column column() + h), p[2 + h] for row() + 8.
  KOGC_DEVICE void scores(float (&p)[4], const Piece<P> (&k)[STEPS], const Scales<P>& scales, int tile, int base) {
    float c[2][2][4] = {};
    KOGC_UNROLL for (int part = 0; part < 2; part++) {
      const u16* from = query(tile, 8 * part + row()) + column() * 2;
      KOGC_UNROLL for (int s = 0; s < STEPS; s++) {
        const Quad q = *(const Quad*)(from + s * 16);
        const Words a = operand(k[s]);
        mma<false>(c[part][s % 2], a.x, a.y, a.z, a.w, q.low, q.high);
      }
    }
    KOGC_UNROLL for (int i = 0; i < 4; i++) {
      const int at = base + row() + i / 2 * 8;
      const float score = scales.key((c[0][0][i] + c[0][1][i]) + (c[1][0][i] + c[1][1][i]), i);
      p[i] = at >= lowest_[tile][i % 2] && at <= position_[tile][i % 2] ? score : LOWEST;
    }
  }

  const int warp_ = scalar(warp());
  RunningSoftmax<DIM> softmax_[TOGETHER];
  int position_[TOGETHER][2], lowest_[TOGETHER][2];
};

}  // namespace kogc
