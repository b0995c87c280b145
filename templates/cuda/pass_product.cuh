// Products of a pass: Y = X W for all tokens, this block's tiles of rows and slices of columns, on tensor cores.
//
// Tokens are rows of A, sixteen at a time, and rows of the weights columns of B. A lane's 16 bytes of a row's 32 columns are
// B of two mma, register for register, and the activations lie so that a lane's next 16 bytes are A: nothing is moved
// between loading and multiplying. A warp holds up to four tiles of 16 weight rows times half of the tokens.
#pragma once

namespace kogc {

template <class P> class PassProduct {
  using Q = typename P::Pass;
  static constexpr int OWN = (Q::SWEEP_TILES + WARPS / HALVES - 1) / (WARPS / HALVES);  // tiles of a warp, at most
  static constexpr int TOKEN_TILES = Q::TOKENS / TOKEN_TILE / HALVES;                  // of a warp
  using Sums = float[OWN][2][TOKEN_TILES][4];  // [tile][its upper and lower eight rows][tokens]

 public:
  // `result(row, token, y)`: rows `row` and `row` + 1 of tokens `token` (y[0], y[1]) and `token` + 8 (y[2], y[3]).
  template <class Result> KOGC_DEVICE void run(PassCursor<P>& at, int phase, const Where& where, Result result) {
    PassSlices<P> slices;
    slices.phase = phase;
    const PassPhase& p = slices.now();
    if (!p.tiles) return;
    Moved moved;
    do {
      Sums c = {};
      const int tiles = slices.tiles(), first = p.first_tile + slices.sweep;
      do {
        wait(at, where);
        multiply(c, at.slot, slices, p.unit, p.slice, tiles);
        sync_warp();
        if (lane() == 0) barrier_arrive(PassRing<P>::empty(at.slot));
        at.advance();
        moved = slices.advance();
      } while (moved == SAME_ROWS);
      KOGC_UNROLL for (int j = 0; j < OWN; j++) {
        const int tile = warp_ / HALVES + j * (WARPS / HALVES);
        if (tile >= tiles) continue;
        KOGC_UNROLL for (int h = 0; h < 2; h++) KOGC_UNROLL for (int m = 0; m < TOKEN_TILES; m++)
          result((first + tile) * TILE_ROWS + h * 8 + (lane() & 3) * 2, (warp_ % HALVES * TOKEN_TILES + m) * TOKEN_TILE + lane() / 4, c[j][h][m]);
      }
    } while (moved == OTHER_ROWS);
  }

 private:
  static KOGC_DEVICE void wait(const PassCursor<P>& at, const Where& where) {
    Spin spin;
    while (!barrier_passed(PassRing<P>::full(at.slot), at.parity)) spin.step(where, STAGE_FULL, at.parity);
  }

  KOGC_DEVICE void multiply(Sums& c, int slot, const PassSlices<P>& slices, int unit, int slice, int tiles) const {
    const bool eight = unit == 8;
    const int fragments = slices.fragments(), steps = eight ? fragments : 2 * fragments;
    const char* stage = PassRing<P>::stage(slot);
    // In units of 4 rows a lane reads its 16 bytes from one of two units; they hold 64 columns a fragment, in two halves.
    const int stride = eight ? FRAGMENT_BYTES : FRAGMENT_BYTES / 2, half_tile = slice * FRAGMENT_BYTES * (eight ? 1 : 2);
    const char* weights = stage + (eight ? lane() * 16 : lane() / 16 * (half_tile / 2) + lane() % 16 * 16) + warp_ / HALVES * (2 * half_tile);
    const char* x = stage + Q::STAGE_BYTES - steps * (STEP_COLUMNS * Q::TOKENS * 2) + warp_ % HALVES * (TOKEN_TILES * 2 * FRAGMENT_BYTES) + lane() * 16;
#pragma unroll 2
    for (int step = 0; step < steps; step++) {
      Words a[TOKEN_TILES][2];
      KOGC_UNROLL for (int m = 0; m < TOKEN_TILES; m++) KOGC_UNROLL for (int k = 0; k < 2; k++) a[m][k] = *(const Words*)(x + (m * 2 + k) * FRAGMENT_BYTES);
      KOGC_UNROLL for (int j = 0; j < OWN; j++) {
        if (warp_ / HALVES + j * (WARPS / HALVES) >= tiles) continue;
        const char* from = weights + j * (WARPS / HALVES) * (2 * half_tile);
        KOGC_UNROLL for (int h = 0; h < 2; h++) {
          const Words w = *(const Words*)(from + h * half_tile);
          KOGC_UNROLL for (int m = 0; m < TOKEN_TILES; m++) {
            mma<P::FP16>(c[j][h][m], a[m][0].x, a[m][0].y, a[m][0].z, a[m][0].w, w.x, w.y);
            mma<P::FP16>(c[j][h][m], a[m][1].x, a[m][1].y, a[m][1].z, a[m][1].w, w.z, w.w);
          }
        }
      }
      weights += stride;
      x += STEP_COLUMNS * Q::TOKENS * 2;
    }
  }

  const int warp_ = scalar(warp());
};

}  // namespace kogc
