// Products of samples: Y = X W, columns as rows of A, eight rows of weights as columns of B, as in pass_product.cuh. With few
// tiles of rows each warp takes all of them and every eighth step of the columns, and what the warps have is added up in
// shared memory, in their order; with many a warp has tiles of its own.
#pragma once

namespace kogc {

template <class P> class SampleProduct {
  using Q = typename P::Samples;
  using Ring = SampleRing<P>;
  using Sums = float[MOST_OF_WARP][4];
  struct alignas(16) Four { float y[4]; };

 public:
  // `result(row, column, y)`: rows `row` and `row` + 1 of columns `column` (y[0], y[1]) and `column` + 8 (y[2], y[3]), on
  // lane (column * 4 + row / 2 % 4) of some warp. The rows from the block's end_row on mean nothing.
  template <class Result> KOGC_DEVICE void run(PassCursor<Sampled<P>>& at, int phase, bool narrow, const Where& where, Result result) {
    SampleSlices<P> slices;
    slices.phase = phase;
    const SamplePhase& p = slices.now();
    if (!p.tiles) return;
    const bool split = p.split;
    Moved moved;
    do {
      Sums c = {};
      const int tiles = slices.tiles(), first = p.first_row + slices.sweep * COLUMN_ROWS + (lane() & 3) * 2;
      do {
        Spin spin;
        while (!barrier_passed(Ring::full(at.slot), at.parity) || !barrier_passed(Ring::landed(at.slot), at.parity)) spin.step(where, STAGE_FULL, at.parity);
        multiply(c, at.slot, slices, narrow, tiles);
        sync_warp();
        if (lane() == 0) barrier_arrive(Ring::empty(at.slot));
        at.advance();
        moved = slices.advance();
      } while (moved == SAME_ROWS);
      if (split) {
        KOGC_UNROLL for (int j = 0; j < MOST_OF_WARP; j++)
          if (j < tiles) *sums(warp(), j) = {{c[j][0], c[j][1], c[j][2], c[j][3]}};
        sync();
        if (warp() < tiles) {
          Four all = {};
          KOGC_UNROLL for (int w = 0; w < WARPS; w++) {
            const Four one = *sums(w, warp());
            KOGC_UNROLL for (int e = 0; e < 4; e++) all.y[e] += one.y[e];
          }
          result(first + warp() * COLUMN_ROWS, lane() / 4, all.y);
        }
      } else {
        KOGC_UNROLL for (int j = 0; j < MOST_OF_WARP; j++)
          if (warp() + j * WARPS < tiles) result(first + (warp() + j * WARPS) * COLUMN_ROWS, lane() / 4, c[j]);
      }
    } while (moved == OTHER_ROWS);
  }

 private:
  static KOGC_DEVICE Four* sums(int warp, int tile) {
    return (Four*)(shared() + Q::WORK_OFFSET) + (warp * MOST_OF_WARP + tile) * LANES + lane();
  }

  // This warp's part of a stage: `count` steps of 32 columns, `step` apart in the weights and `x_step` in the activations, of
  // tiles that are `tile` apart.
  struct Share { const char *weights, *x; int count, step, x_step, tile; };

  static KOGC_DEVICE void multiply(Sums& c, int slot, const SampleSlices<P>& slices, bool narrow, int tiles) {
    const SamplePhase& p = slices.now();
    const bool eight = p.unit == 8;
    const int steps = (eight ? 1 : 2) * slices.fragments(), step = eight ? FRAGMENT_BYTES : FRAGMENT_BYTES / 2, x_step = step_bytes(narrow);
    const int of_unit = p.slice * FRAGMENT_BYTES, of_tile = eight ? of_unit : 2 * of_unit;
    // In units of 4 rows a lane reads its 16 bytes from one of two units; they hold 64 columns a fragment, in two halves.
    const char* weights = Ring::stage(slot) + (eight ? lane() * 16 : lane() / 16 * of_unit + lane() % 16 * 16);
    const char* x = Ring::stage(slot) + Q::STAGE_BYTES - steps * x_step + lane() * 16;
    const int shared_out = ((p.split ? steps : tiles) - warp() + WARPS - 1) / WARPS;
    if (shared_out <= 0) return;
    if (p.split) multiply(c, {weights + warp() * step, x + warp() * x_step, shared_out, WARPS * step, WARPS * x_step, of_tile}, narrow, tiles);
    else multiply(c, {weights + warp() * of_tile, x, steps, step, x_step, WARPS * of_tile}, narrow, shared_out);
  }
  static KOGC_DEVICE void multiply(Sums& c, const Share& share, bool narrow, int tiles) {
    if (narrow) multiply<true>(c, share, tiles);
    else multiply<false>(c, share, tiles);
  }
  template <bool NARROW_TILE> static KOGC_DEVICE void multiply(Sums& c, const Share& share, int tiles) {
    switch (tiles) {  // how many is known where they are multiplied: no branch stands between the loads
      case 1: return multiply<NARROW_TILE, 1>(c, share);
      case 2: return multiply<NARROW_TILE, 2>(c, share);
      case 3: return multiply<NARROW_TILE, 3>(c, share);
      default: return multiply<NARROW_TILE, 4>(c, share);
    }
  }

  template <bool NARROW_TILE, int TILES> struct Operands {
    Words a, b, w[TILES];
    KOGC_DEVICE void load(const Share& share) {
      a = *(const Words*)share.x;
      if constexpr (!NARROW_TILE) b = *(const Words*)(share.x + LANES * 16);
      KOGC_UNROLL for (int j = 0; j < TILES; j++) w[j] = *(const Words*)(share.weights + j * share.tile);
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

  // The operands of a step are loaded while those of the step before are multiplied.
  template <bool NARROW_TILE, int TILES> static KOGC_DEVICE void multiply(Sums& c, Share share) {
    Operands<NARROW_TILE, TILES> even, odd;
    even.load(share);
#pragma unroll 1
    for (; share.count > 1; share.count -= 2) {
      next(share);
      odd.load(share);
      even.multiply(c);
      if (share.count > 2) next(share);  // else what is loaded is not used
      even.load(share);
      odd.multiply(c);
    }
    if (share.count) even.multiply(c);
  }
  static KOGC_DEVICE void next(Share& share) {
    share.weights += share.step;
    share.x += share.x_step;
  }
};

}  // namespace kogc
