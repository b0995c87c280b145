// Products of samples: Y = X W, columns as rows of A, eight rows of weights as columns of B, as in pass_product.cuh. With few
// tiles of rows each warp takes all of them and every eighth step of the columns, and what the warps have is added up in
// shared memory, in their order; with many a warp has tiles of its own. A warp finds out while it multiplies whether the
// activations of a stage had come when they were copied: if not, which is rare, it fetches them and multiplies again.
#pragma once

namespace kogc {

template <class P> class SampleProduct {
  using Q = typename P::Samples;
  using Ring = SampleRing<P>;
  using Sums = float[MOST_OF_WARP][4];
  struct alignas(16) Four { float y[4]; };

 public:
  KOGC_DEVICE SampleProduct(const SampleArgs& args, const Expected& expected)
      : args_(args), narrow_(narrow(args)), parity_(expected.parity << PAIR_BIT),
        asked_{asked(expected, lane() / 4), asked(expected, lane() / 4 + (narrow_ ? 0 : 8))} {}

  // `result(row, column, y)`: rows `row` and `row` + 1 of columns `column` (y[0], y[1]) and `column` + 8 (y[2], y[3]), on
  // lane (column * 4 + row / 2 % 4) of some warp. The rows from the block's end_row on mean nothing.
  template <class Result> KOGC_DEVICE void run(PassCursor<Sampled<P>>& at, int phase, const Where& where, Result result) {
    const SamplePhase& p = sample_words<P>().phases[phase];
#pragma unroll 1
    for (int sweep = 0; sweep < p.tiles; sweep += Q::SWEEP_TILES) {
      const int left = p.tiles - sweep, tiles = left < Q::SWEEP_TILES ? left : Q::SWEEP_TILES;
      const int first = p.first_row + sweep * COLUMN_ROWS + (lane() & 3) * 2;
      const bool split = p.split;
      Sums c = {};
      multiply(c, at, share(p, tiles), where);
      if (split) {
        KOGC_UNROLL for (int j = 0; j < MOST_OF_WARP; j++)
          if (j < tiles) *sums(warp_, j) = {{c[j][0], c[j][1], c[j][2], c[j][3]}};
        sync();
        if (warp_ < tiles) {
          Four all = {};
          KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
            const Four one = *sums(w, warp_);
            KOGC_UNROLL for (int e = 0; e < 4; e++) all.y[e] += one.y[e];
          }
          result(first + warp_ * COLUMN_ROWS, lane() / 4, all.y);
        }
      } else {
        KOGC_UNROLL for (int j = 0; j < MOST_OF_WARP; j++)
          if (warp_ + j * WARPS < tiles) result(first + (warp_ + j * WARPS) * COLUMN_ROWS, lane() / 4, c[j]);
      }
    }
  }

 private:
  static KOGC_DEVICE Four* sums(int warp, int tile) {
    return (Four*)(shared() + Q::WORK_OFFSET) + (warp * MOST_OF_WARP + tile) * LANES + lane();
  }

  // This warp's part of a sweep. Of the `steps` of 32 columns, `slice` in a stage, it takes all, or every eighth from `first` on, of
  // `tiles` tiles that are `tile` bytes apart. weights, x: where in a stage this lane's first ones are; source: what x is copied from.
  struct Share {
    int weights, x, tiles, tile;
    bool eighth;
    int first, slice, steps, step_bytes, x_bytes;
    const char* source;
  };

  KOGC_DEVICE Share share(const SamplePhase& p, int tiles) const {
    const bool eight = p.unit == 8;
    const int halves = eight ? 1 : 2, step = FRAGMENT_BYTES / halves, x_step = step_bytes(narrow_), slice = halves * p.slice;
    const int of_unit = p.slice * FRAGMENT_BYTES, of_tile = halves * of_unit;
    // In units of 4 rows a lane reads its 16 bytes from one of two units; they hold 64 columns a fragment, in two halves.
    const int weights = eight ? lane() * 16 : lane() / 16 * of_unit + lane() % 16 * 16;
    const int x = Q::STAGE_BYTES - slice * x_step + lane() * 16, steps = halves * p.fragments;
    const char* source = (const char*)args_.scratch + p.x + lane() * 16;
    if (p.split) return {weights + warp_ * step, x + warp_ * x_step, tiles, of_tile, true, warp_, slice, steps, WARPS * step, WARPS * x_step, source};
    return {weights + warp_ * of_tile, x, (tiles - warp_ + WARPS - 1) / WARPS, WARPS * of_tile, false, 0, slice, steps, step, x_step, source};
  }

  KOGC_DEVICE void multiply(Sums& c, PassCursor<Sampled<P>>& at, const Share& share, const Where& where) const {
    if (narrow_) multiply<true>(c, at, share, where);
    else multiply<false>(c, at, share, where);
  }
  template <bool NARROW_TILE> KOGC_DEVICE void multiply(Sums& c, PassCursor<Sampled<P>>& at, const Share& share, const Where& where) const {
    switch (share.tiles) {  // how many is known where they are multiplied: no branch stands between the loads
      case 0: return multiply<NARROW_TILE, 0>(c, at, share, where);
      case 1: return multiply<NARROW_TILE, 1>(c, at, share, where);
      case 2: return multiply<NARROW_TILE, 2>(c, at, share, where);
      case 3: return multiply<NARROW_TILE, 3>(c, at, share, where);
      default: return multiply<NARROW_TILE, 4>(c, at, share, where);
    }
  }

  // All stages of a sweep. What a stage adds counts only if its activations were there.
  template <bool NARROW_TILE, int TILES>
  KOGC_DEVICE void multiply(Sums& c, PassCursor<Sampled<P>>& at, const Share& share, const Where& where) const {
#pragma unroll 1
    for (int from = 0; from < share.steps; from += share.slice) {
      Spin spin;
      while (!barrier_passed(Ring::full(at.slot), at.parity) || !barrier_passed(Ring::landed(at.slot), at.parity)) spin.step(where, STAGE_FULL, at.parity);
      const int left = share.steps - from, steps = left < share.slice ? left : share.slice;
      const int count = share.eighth ? (steps - share.first + WARPS - 1) / WARPS : steps;
      if constexpr (TILES > 0) {
        const char* stage = Ring::stage(at.slot);
        Sums d = {};
        while (!all_lanes(!multiply<NARROW_TILE, TILES>(d, stage + share.weights, stage + share.x, count, share))) {
          fetch((char*)stage + share.x, share.source + (from + share.first) * step_bytes(NARROW_TILE), count, share.x_bytes, where);
          clear<TILES>(d);
        }
        KOGC_UNROLL for (int j = 0; j < TILES; j++) KOGC_UNROLL for (int e = 0; e < 4; e++) c[j][e] += d[j][e];
      }
      sync_warp();
      if (lane() == 0) barrier_arrive(Ring::empty(at.slot));
      at.advance();
    }
  }
  template <int TILES> static KOGC_DEVICE void clear(Sums& d) {
    KOGC_UNROLL for (int j = 0; j < TILES; j++) KOGC_UNROLL for (int e = 0; e < 4; e++) d[j][e] = 0;
  }

  // --- activations that tell whether they are there: of a lane's four words, 0 and 2 are of one sample, 1 and 3 of one -----
  static KOGC_DEVICE u32 asked(const Expected& expected, int column) { return (expected.columns >> column & 1) << PAIR_BIT; }
  // With the right parity only their own bits are left, else PAIR_BIT is set.
  KOGC_DEVICE Words without_parity(const Words& w) const { return {w.x ^ parity_, w.y ^ parity_, w.z ^ parity_, w.w ^ parity_}; }
  KOGC_DEVICE u32 missing(const Words& w) const { return ((w.x | w.z) & asked_[0]) | ((w.y | w.w) & asked_[1]); }

  // Waits for what had not come when the stage was copied. Warps that share activations may all write the same over them.
  KOGC_DEVICE void fetch(char* x, const char* source, int count, int x_bytes, const Where& where) const {
#pragma unroll 1
    for (int i = 0; i < count * x_bytes; i += x_bytes)
#pragma unroll 1
      for (int half = 0; half < (narrow_ ? 1 : 2); half++) {
        const int at = i + half * LANES * 16;
        Words w = load_words(source + at);
        for (Spin spin; !all_lanes(!missing(without_parity(w))); w = load_words(source + at)) spin.step(where, WAIT_PASS, parity_ >> PAIR_BIT);
        *(Words*)(x + at) = w;
      }
    fence_stage();  // the next copy into the stage comes after this
    sync_warp();
  }

  // --- one stage -------------------------------------------------------------------------------------------------------------
  template <bool NARROW_TILE, int TILES> struct Operands {
    Words a, b, w[TILES];
    KOGC_DEVICE void load(const char* weights, const char* x, int tile) {
      a = *(const Words*)x;
      if constexpr (!NARROW_TILE) b = *(const Words*)(x + LANES * 16);
      KOGC_UNROLL for (int j = 0; j < TILES; j++) w[j] = *(const Words*)(weights + j * tile);
    }
    KOGC_DEVICE u32 take(const SampleProduct& product) {  // what is missing
      a = product.without_parity(a);
      u32 missing = product.missing(a);
      if constexpr (!NARROW_TILE) {
        b = product.without_parity(b);
        missing |= product.missing(b);
      }
      return missing;
    }
    KOGC_DEVICE void multiply(Sums& c) const {
      KOGC_UNROLL for (int j = 0; j < TILES; j++) {
        if constexpr (NARROW_TILE) mma<P::FP16>(c[j], a.x, 0, a.y, 0, w[j].x, w[j].y);
        else mma<P::FP16>(c[j], a.x, a.y, a.z, a.w, w[j].x, w[j].y);
      }
      KOGC_UNROLL for (int j = 0; j < TILES; j++) {
        if constexpr (NARROW_TILE) mma<P::FP16>(c[j], a.z, 0, a.w, 0, w[j].z, w[j].w);
        else mma<P::FP16>(c[j], b.x, b.y, b.z, b.w, w[j].z, w[j].w);
      }
    }
  };

  // `count` steps of this warp. The operands of one are loaded while those of the one before are multiplied.
  template <bool NARROW_TILE, int TILES>
  KOGC_DEVICE u32 multiply(Sums& c, const char* weights, const char* x, int count, const Share& share) const {
    Operands<NARROW_TILE, TILES> even, odd;
    u32 missing = 0;
    if (count <= 0) return missing;
    even.load(weights, x, share.tile);
#pragma unroll 1
    for (; count > 1; count -= 2) {
      odd.load(weights += share.step_bytes, x += share.x_bytes, share.tile);
      missing |= even.take(*this);
      even.multiply(c);
      if (count > 2) even.load(weights += share.step_bytes, x += share.x_bytes, share.tile);
      missing |= odd.take(*this);
      odd.multiply(c);
    }
    if (count) {
      missing |= even.take(*this);
      even.multiply(c);
    }
    return missing;
  }

  const SampleArgs& args_;
  const bool narrow_;
  const u32 parity_, asked_[2];
  const int warp_ = scalar(warp());
};

}  // namespace kogc
