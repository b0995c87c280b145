// Matrix instructions, on operands as 16-byte loads leave them in registers. CDNA calls them MFMA, RDNA4 calls them WMMA.
//
// A tile is c[16][16] += a[16][DEPTH] * b[DEPTH][16]: lane l brings row l % 16 of a and column l % 16 of b, of both the
// eight elements from l / 16 * 8 on, and holds column l % 16 of c, ROWS rows from l / 16 * ROWS on.
// A product over 16 positions takes ROWS elements a lane, from l / 16 * ROWS on: just the rows of c that a lane holds, so
// that the c of one product is the b of the next, without a shuffle.
#pragma once

namespace kogc {

constexpr int DEPTH = LANES / 2, ROWS = 256 / LANES;
struct Sums { float v[ROWS]; };
struct Slice { u32 w[ROWS / 2]; };  // ROWS 16-bit elements

template <class To, class From> KOGC_DEVICE To bits(const From& v) { return __builtin_bit_cast(To, v); }

typedef float Result __attribute__((ext_vector_type(ROWS)));
typedef short Short4 __attribute__((ext_vector_type(4)));
typedef _Float16 Half4 __attribute__((ext_vector_type(4)));
typedef short Short8 __attribute__((ext_vector_type(8)));
typedef _Float16 Half8 __attribute__((ext_vector_type(8)));
typedef __bf16 Brain8 __attribute__((ext_vector_type(8)));

#if defined(__GFX9__)
// 8 bytes of either operand a lane.
template <bool FP16> KOGC_DEVICE Result multiply_slices(u64 a, u64 b, Result c) {
  if constexpr (FP16) return __builtin_amdgcn_mfma_f32_16x16x16f16(bits<Half4>(a), bits<Half4>(b), c, 0, 0, 0);
  else return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(bits<Short4>(a), bits<Short4>(b), c, 0, 0, 0);
}
KOGC_DEVICE Result multiply_slices(const Slice& a, const Slice& b, Result c) { return multiply_slices<false>(bits<u64>(a), bits<u64>(b), c); }
#endif

#if defined(__gfx942__)  // two products of half the depth: which columns either takes is free, if a and b agree
struct Halves { u64 low, high; };
template <bool FP16> KOGC_DEVICE Result multiply_whole(const Words& a, const Words& b, Result c) {
  const Halves x = bits<Halves>(a), y = bits<Halves>(b);
  return multiply_slices<FP16>(x.high, y.high, multiply_slices<FP16>(x.low, y.low, c));
}
#elif defined(__gfx950__)
template <bool FP16> KOGC_DEVICE Result multiply_whole(const Words& a, const Words& b, Result c) {
  if constexpr (FP16) return __builtin_amdgcn_mfma_f32_16x16x32_f16(bits<Half8>(a), bits<Half8>(b), c, 0, 0, 0);
  else return __builtin_amdgcn_mfma_f32_16x16x32_bf16(bits<Brain8>(a), bits<Brain8>(b), c, 0, 0, 0);
}
#else
template <bool FP16> KOGC_DEVICE Result multiply_whole(const Words& a, const Words& b, Result c) {
  if constexpr (FP16) return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(bits<Half8>(a), bits<Half8>(b), c);
  else return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(bits<Short8>(a), bits<Short8>(b), c);
}
KOGC_DEVICE Result multiply_slices(const Slice& a, const Slice& b, Result c) { return multiply_whole<false>(bits<Words>(a), bits<Words>(b), c); }
#endif

template <bool FP16> KOGC_DEVICE void multiply_tile(Sums& c, const Words& a, const Words& b) {
  c = bits<Sums>(multiply_whole<FP16>(a, b, bits<Result>(c)));
}
KOGC_DEVICE void multiply_positions(Sums& c, const Slice& a, const Slice& b) {  // BF16, as the KV cache is
  c = bits<Sums>(multiply_slices(a, b, bits<Result>(c)));
}

}  // namespace kogc
