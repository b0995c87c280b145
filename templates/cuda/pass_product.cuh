// Products of a pass: Y = W X for this block's tiles of rows and slices of columns, on tensor cores.
//
// A tile's upper eight rows and its lower eight are A's: a lane's 16 bytes of a row's 32 columns serve two mma, and the 16
// bytes of a token's activation at the same columns are B of both. A warp holds up to four tiles times half of the tokens.
#pragma once

namespace kogc {

template <class P> class PassProduct {
  using Q = typename P::Pass;
  static constexpr int OWN = (Q::SWEEP_TILES + WARPS / HALVES - 1) / (WARPS / HALVES);  // tiles of a warp, at most
  static constexpr int COLUMN_TILES = Q::TOKENS / 8 / HALVES;                          // tiles of eight tokens, of a warp

 public:
  // `result(row, token, upper, lower)`: for rows `row` and `row` + 8, the results of tokens `token` and `token` + 1.
  template <class Result> KOGC_DEVICE void run(PassCursor<P>& at, int phase, const Where& where, Result result) {
    PassSlices<P> slices;
    slices.phase = phase;
    const PassPhase& p = slices.now();
    if (!p.part.tiles) return;
    Moved moved;
    do {
      float c[OWN][COLUMN_TILES][4] = {};
      const int tiles = slices.tiles(), first = p.part.first_tile + slices.sweep;
      do {
        wait(at, where);
        multiply(c, at.slot, slices, p.unit, p.slice, tiles);
        sync_warp();
        if (lane() == 0) barrier_arrive(PassRing<P>::empty(at.slot));
        at.advance();
        moved = slices.advance();
      } while (moved == SAME_ROWS);
      KOGC_UNROLL for (int j = 0; j < OWN; j++) {
        const int tile = warp() / HALVES + j * (WARPS / HALVES);
        if (tile >= tiles) continue;
        KOGC_UNROLL for (int n = 0; n < COLUMN_TILES; n++)
          result((first + tile) * TILE_ROWS + lane() / 4, (warp() % HALVES * COLUMN_TILES + n) * 8 + (lane() & 3) * 2,
                 c[j][n][0], c[j][n][1], c[j][n][2], c[j][n][3]);
      }
    } while (moved == OTHER_ROWS);
  }

 private:
  static KOGC_DEVICE void wait(const PassCursor<P>& at, const Where& where) {
    Spin spin;
    while (!barrier_passed(PassRing<P>::full(at.slot), at.parity)) spin.step(where, STAGE_FULL, at.parity);
  }

  static KOGC_DEVICE void multiply(float (&c)[OWN][COLUMN_TILES][4], int slot, const PassSlices<P>& slices, int unit, int slice, int tiles) {
    const bool eight = unit == 8;
    const int fragments = slices.fragments(), steps = eight ? fragments : 2 * fragments;
    const char* stage = PassRing<P>::stage(slot);
    // In units of 4 rows a lane reads its 16 bytes from one of two units; they hold 64 columns a fragment, in two halves.
    const int stride = eight ? FRAGMENT_BYTES : FRAGMENT_BYTES / 2, half_tile = slice * FRAGMENT_BYTES * (eight ? 1 : 2);
    const char* weights = stage + (eight ? lane() * 16 : lane() / 16 * (half_tile / 2) + lane() % 16 * 16) + warp() / HALVES * (2 * half_tile);
    const char* x = stage + Q::STAGE_BYTES - steps * (STEP_COLUMNS * Q::TOKENS * 2) + warp() % HALVES * (COLUMN_TILES * FRAGMENT_BYTES) + lane() * 16;
#pragma unroll 2
    for (int step = 0; step < steps; step++) {
      Words b[COLUMN_TILES];
      KOGC_UNROLL for (int n = 0; n < COLUMN_TILES; n++) b[n] = *(const Words*)(x + n * FRAGMENT_BYTES);
      KOGC_UNROLL for (int j = 0; j < OWN; j++) {
        if (warp() / HALVES + j * (WARPS / HALVES) >= tiles) continue;
        const char* from = weights + j * (WARPS / HALVES) * (2 * half_tile);
        const Words upper = *(const Words*)from, lower = *(const Words*)(from + half_tile);
        KOGC_UNROLL for (int n = 0; n < COLUMN_TILES; n++) {
          mma<P::FP16>(c[j][n], upper.x, lower.x, upper.y, lower.y, b[n].x, b[n].y);
          mma<P::FP16>(c[j][n], upper.z, lower.z, upper.w, lower.w, b[n].z, b[n].w);
        }
      }
      weights += stride;
      x += STEP_COLUMNS * Q::TOKENS * 2;
    }
  }
};

}  // namespace kogc
