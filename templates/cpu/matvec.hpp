// Mat-vec of 16-bit weights. A fragment is eight lines of 32 columns: of eight rows, or (in units of four rows) of four rows
// twice. Each line has an accumulator for each token, so a piece of an activation is loaded once for several lines, and
// a piece of the weights once for several tokens. Which of them are taken together changes no sum's order: the bits of
// a token's results do not depend on the tokens beside it.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE u16* activation(int token = 0) {
  return (u16*)(shared() + P::ACTIVATION_OFFSET + token * P::ACTIVATION_BYTES);
}

// Four columns of the activation, from column 4 * `vector` on.
KOGC_DEVICE void store_activation(u16* x, int vector, Quad q) { ((Quad*)x)[vector] = q; }

// Columns of weights or of an activation, in the form in which they meet.
#if defined(__AVX512BF16__)
constexpr bool BF16_PRODUCTS = true;
#else
constexpr bool BF16_PRODUCTS = false;
#endif

template <bool FP16, bool DIRECT = BF16_PRODUCTS && !FP16> struct Columns {
  static constexpr int WIDTH = 2 * VECTOR;
  Pair x;

  static KOGC_DEVICE Columns at(const u16* from) { return {load_pair<FP16>(from)}; }
  KOGC_DEVICE Vector times(const Columns& w, Vector sum) const { return multiply_add(w.x.b, x.b, multiply_add(w.x.a, x.a, sum)); }
};

#if defined(__AVX512BF16__)
template <> struct Columns<false, true> {
  static constexpr int WIDTH = 32;
  __m512bh x;

  static KOGC_DEVICE Columns at(const u16* from) { return {(__m512bh)_mm512_loadu_si512(from)}; }
  KOGC_DEVICE Vector times(const Columns& w, Vector sum) const { return _mm512_dpbf16_ps(sum, w.x, x); }
};
#endif

// What is multiplied at a time: as much as there are registers for.
template <class P> struct Tile {
  static constexpr int LINES = P::TOKENS == 1 ? 8 : 4, TOKENS = P::TOKENS == 1 ? 1 : VECTOR / 4;
  static_assert(P::TOKENS % TOKENS == 0);
};

// LINES lines of a unit times the activations of TOKENS tokens, to y[token][line]. Meanwhile `fetched` lines of what is
// `ahead` are fetched for each fragment.
template <class P, int UNIT>
KOGC_DEVICE void multiply_tile(const u16* w, const u16* x, int columns, const u8* ahead, int fetched,
                               float (&y)[Tile<P>::TOKENS * Tile<P>::LINES]) {
  using Piece = Columns<P::FP16>;
  constexpr int LINES = Tile<P>::LINES, TOKENS = Tile<P>::TOKENS, ROWS = LINES < UNIT ? LINES : UNIT;
  Vector sum[TOKENS * LINES / 8][8];
  KOGC_UNROLL_ALL for (int i = 0; i < TOKENS * LINES; i++) sum[i / 8][i % 8] = zero();
  for (const u16* const end = x + columns; x < end; x += 256 / UNIT, w += 256, ahead += 64 * fetched) {
    for (int line = 0; line < fetched; line++) prefetch(ahead + 64 * line);
    KOGC_UNROLL_ALL for (int first = 0; first < LINES; first += ROWS) {
      KOGC_UNROLL_ALL for (int c = 0; c < 32; c += Piece::WIDTH) {
        Piece of[TOKENS];
        KOGC_UNROLL_ALL for (int t = 0; t < TOKENS; t++) of[t] = Piece::at(x + t * (P::ACTIVATION_BYTES / 2) + first / UNIT * 32 + c);
        KOGC_UNROLL_ALL for (int line = first; line < first + ROWS; line++) {
          const Piece weights = Piece::at(w + line * 32 + c);
          KOGC_UNROLL_ALL for (int t = 0; t < TOKENS; t++) {
            Vector& s = sum[(t * LINES + line) / 8][(t * LINES + line) % 8];
            s = of[t].times(weights, s);
          }
        }
      }
    }
  }
  KOGC_UNROLL_ALL for (int i = 0; i < TOKENS * LINES / 8; i++) _mm256_storeu_ps(y + 8 * i, sums_of(sum[i]));
}

// y = W x for this block's rows. `multiplied()` runs once before the first result; `result(i, y)` gets the block's rows
// i .. i + 3 of each token.
template <class P> class MatVec {
 public:
  KOGC_DEVICE void begin(Stream<P>&, const Work& work, const Where&) { work_ = work; }

  template <class Multiplied, class Result>
  KOGC_DEVICE void run(Stream<P>& stream, const Where& where, Multiplied multiplied, Result result) {
    multiplied();
    const int tokens = tokens_of<P>(where.args, where.step);
    for (int unit = 0; unit < work_.units; unit++) {
      Rows y;
      if (work_.unit == 8) multiply_unit<8>(stream.at, tokens, y);
      else multiply_unit<4>(stream.at, tokens, y);
      for (int r = 0; r < work_.unit; r += ROWS_TOGETHER) result(unit * work_.unit + r, y[r / ROWS_TOGETHER]);
    }
    read_next(stream.at);
  }

 private:
  using Rows = float[8 / ROWS_TOGETHER][P::TOKENS][ROWS_TOGETHER];  // of a unit
  static constexpr int LINES = Tile<P>::LINES, TOGETHER = Tile<P>::TOKENS;

  // The rows of one unit times the activations; `at` moves past the unit.
  template <int UNIT> KOGC_DEVICE void multiply_unit(const u8*& at, int tokens, Rows& y) const {
    const int bytes = 2 * UNIT * work_.columns;
    // One token passes a unit once, many tokens several times: then each time fetches a share of the next unit.
    const int times = 8 / LINES * ((tokens + TOGETHER - 1) / TOGETHER), fetched = P::TOKENS == 1 ? 8 : (7 + times) / times;
    const u8* ahead = at + (P::TOKENS == 1 ? AHEAD : bytes);
    for (int token = 0; token < tokens; token += TOGETHER) {
      for (int first = 0; first < 8; first += LINES) {
        float sums[TOGETHER * LINES];
        const u16* x = activation<P>(token) + first / UNIT * 32;
        multiply_tile<P, UNIT>((const u16*)at + 32 * first, x, work_.columns, ahead, fetched, sums);
        ahead += work_.columns * UNIT / 256 * 64 * fetched;
        for (int t = 0; t < TOGETHER; t++) {
          for (int line = 0; line < LINES; line++) {
            const int row = (first + line) % UNIT;
            float& to = y[row / ROWS_TOGETHER][token + t][row % ROWS_TOGETHER];
            to = first + line < UNIT ? sums[t * LINES + line] : to + sums[t * LINES + line];
          }
        }
      }
    }
    at += bytes;
  }

  Work work_ = {};
};

}  // namespace kogc
