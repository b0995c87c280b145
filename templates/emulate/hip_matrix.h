// A stand-in for hip/matrix.h: the lanes' operands are put together and multiplied in plain C++.
#pragma once

namespace kogc {

constexpr int DEPTH = LANES / 2, ROWS = 256 / LANES;
struct Sums { float v[ROWS]; };
struct Slice { u32 w[ROWS / 2]; };

template <class To, class From> KOGC_DEVICE To bits(const From& v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

// c[16][16] += a[16][depth] * b[depth][16]; each lane has brought EACH elements of a and b.
template <bool FP16, int EACH> KOGC_DEVICE void multiply_operands(Sums& c, const u32* a, const u32* b) {
  emulated::Warp& w = machine->warp();
  const int self = lane();
  for (int i = 0; i < EACH / 2; i++) {
    w.a[i][self] = a[i];
    w.b[i][self] = b[i];
  }
  for (int i = 0; i < ROWS; i++) w.c[i][self] = c.v[i];
  emulated::together(emulated::MMA, FP16 * 16 + EACH, [](emulated::Warp& all) {
    constexpr int K = LANES / 16 * EACH;
    float x[K][16], y[K][16];
    for (int i = 0; i < LANES; i++)
      for (int e = 0; e < EACH; e++) {
        const int k = i / 16 * EACH + e;
        x[k][i % 16] = to_float<FP16>((u16)(all.a[e / 2][i] >> e % 2 * 16));
        y[k][i % 16] = to_float<FP16>((u16)(all.b[e / 2][i] >> e % 2 * 16));
      }
    for (int i = 0; i < LANES; i++)
      for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < K; k++) all.c[r][i] += x[k][i / 16 * ROWS + r] * y[k][i % 16];
  });
  for (int i = 0; i < ROWS; i++) c.v[i] = w.c[i][self];
}

template <bool FP16> KOGC_DEVICE void multiply_tile(Sums& c, const Words& a, const Words& b) {
  multiply_operands<FP16, 8>(c, &a.x, &b.x);
}
KOGC_DEVICE void multiply_positions(Sums& c, const Slice& a, const Slice& b) { multiply_operands<false, ROWS>(c, a.w, b.w); }

}  // namespace kogc
