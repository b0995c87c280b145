// The 16-bit formats and the approximate functions, rounded to nearest.
#pragma once
#include <math.h>
#include <string.h>

namespace kogc {

KOGC_DEVICE float as_float(u32 v) {
  float f;
  memcpy(&f, &v, sizeof f);
  return f;
}
KOGC_DEVICE u32 as_word(float v) {
  u32 w;
  memcpy(&w, &v, sizeof w);
  return w;
}
KOGC_DEVICE float bf16_to_float(u16 v) { return as_float((u32)v << 16); }
KOGC_DEVICE float half_to_float(u16 v) {
  const u32 sign = (u32)(v & 0x8000) << 16, rest = v & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float magnitude = as_float(rest << 13) * 0x1p112f;  // the exponent's bias goes from 15 to 127, subnormals too
  return as_float(sign | as_word(magnitude));
}
KOGC_DEVICE u16 float_to_bf16(float v) {
  const u32 w = as_word(v);
  if (v != v) return 0x7fff;
  return (u16)((w + 0x7fff + (w >> 16 & 1)) >> 16);
}
KOGC_DEVICE u32 floats_to_bf16(float low, float high) { return (u32)float_to_bf16(low) | (u32)float_to_bf16(high) << 16; }
KOGC_DEVICE u16 float_to_half(float v) {
  const u32 w = as_word(v), sign = w >> 16 & 0x8000, rest = w & 0x7fffffff;
  if (v != v) return 0x7fff;
  if (rest >= 0x477ff000) return (u16)(sign | 0x7c00);  // rounds to 65536 or more
  if (rest < 0x38800000) return (u16)(sign | (u32)(as_word(fabsf(v) + 0.5f) - as_word(0.5f)));  // subnormal: the sum rounds it
  return (u16)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
KOGC_DEVICE float exp2_fast(float v) { return exp2f(v); }
KOGC_DEVICE float reciprocal(float v) { return 1.0f / v; }
KOGC_DEVICE float reciprocal_sqrt(float v) { return 1.0f / sqrtf(v); }

}  // namespace kogc
