// Numbers of an FP8 cache: E4M3 (finite), rounded to nearest even. A key or value is first divided by a power of two that
// brings its largest number to 128 .. 256: so it neither saturates nor becomes subnormal, whatever the model's range. The
// power is a byte of its own, E8M0: a number is worth E4M3 * 2^(byte - 127). kogc/kv_numbers.py has the same in numpy.
#pragma once

namespace kogc {

constexpr int FP8_TOP = 7;               // log2 of what the largest number becomes at least
constexpr int FP8_MOST_EXPONENT = 194;   // what a factor of 2^60 more still leaves finite

KOGC_DEVICE u32 fp8_exponent(float largest) {
  const int e = (int)(as_word(largest) >> 23) - FP8_TOP;
  return e < 1 ? 1 : e > FP8_MOST_EXPONENT ? FP8_MOST_EXPONENT : e;
}
KOGC_DEVICE float fp8_divisor(u32 exponent) { return as_float((254 - exponent) << 23); }  // to multiply with
KOGC_DEVICE u16 float_to_fp8(float v) {
  const u32 sign = as_word(v) >> 24 & 0x80, w = as_word(v) & 0x7fffffff;
  const float magnitude = as_float(w);
  if (!(magnitude < 448.0f)) return (u16)(sign | 0x7e);
  if (magnitude < 0x1p-6f) return (u16)(sign | (as_word(magnitude + 0x1p14f) - as_word(0x1p14f)));  // the sum rounds it
  return (u16)(sign | (((w + 0x7ffff + (w >> 20 & 1)) >> 20) - (120 << 3)));
}

// On GPUs a word of four numbers becomes two operands of a product: bytes 0 and 2, bytes 1 and 3. Taken as BF16 without
// another bias of the exponent they are 2^-120 times their worth, exactly. Half of that is made up for where queries
// (or outputs) are scaled, half in the scale of the position: each half is far from the ends of FP32.
constexpr float FP8_HALF = 0x1p60f;
KOGC_DEVICE u32 fp8_even(u32 w) { return (w << 8 & 0x80008000u) | (w << 4 & 0x07f007f0u); }
KOGC_DEVICE u32 fp8_odd(u32 w) { return (w & 0x80008000u) | (w >> 4 & 0x07f007f0u); }
KOGC_DEVICE float fp8_scale(u32 exponent) { return as_float((exponent + 60) << 23); }
KOGC_DEVICE int fp8_byte(int element) { return element / 4 * 4 + element % 2 * 2 + element / 2 % 2; }  // where it lies for that
KOGC_DEVICE u32 replaced(u32 word, u32 by, int shift, u32 mask = 0xff) { return (word & ~(mask << shift)) | by << shift; }

// What a lane loads of eight numbers, and the operand of a product that it is.
template <bool FP8> struct CachePieces { using Piece = Words; };
template <> struct CachePieces<true> { using Piece = Quad; };
template <class P> using Piece = typename CachePieces<P::KV_FP8>::Piece;
KOGC_DEVICE const Words& operand(const Words& bf16) { return bf16; }
KOGC_DEVICE Words operand(const Quad& fp8) { return {fp8_even(fp8.low), fp8_odd(fp8.low), fp8_even(fp8.high), fp8_odd(fp8.high)}; }

}  // namespace kogc
