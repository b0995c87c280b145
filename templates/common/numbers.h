// The two 16-bit formats of weights. The KV cache is BF16 for both, or FP8 (fp8.h).
#pragma once

namespace kogc {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // below every attention score, and harmless in exp2
constexpr int CHUNK = 128;        // positions of the KV cache that a block takes at a time

template <bool FP16> KOGC_DEVICE float to_float(u16 v) { return FP16 ? half_to_float(v) : bf16_to_float(v); }
template <bool FP16> KOGC_DEVICE u16 from_float(float v) { return FP16 ? float_to_half(v) : float_to_bf16(v); }
KOGC_DEVICE u32 pack16(u16 low, u16 high) { return (u32)low | (u32)high << 16; }

// Four 16-bit floats, kept packed: a value that is unpacked where it is loaded is waited for there.
struct alignas(8) Quad { u32 low, high; };

template <bool FP16> KOGC_DEVICE Quad pack(float a, float b, float c, float d) {
  if constexpr (FP16) return {pack16(float_to_half(a), float_to_half(b)), pack16(float_to_half(c), float_to_half(d))};
  else return {floats_to_bf16(a, b), floats_to_bf16(c, d)};
}
template <bool FP16> KOGC_DEVICE float element(const Quad& q, int i) { return to_float<FP16>((u16)((i < 2 ? q.low : q.high) >> i % 2 * 16)); }

KOGC_DEVICE float silu(float v) { return v * reciprocal(1.0f + exp2_fast(-LOG2E * v)); }

// Order-preserving map of a float to an unsigned integer.
KOGC_DEVICE u32 ordered(float v) {
  const u32 w = as_word(v);
  return w & 0x80000000u ? ~w : w | 0x80000000u;
}
KOGC_DEVICE float unordered(u32 v) { return as_float(v & 0x80000000u ? v & 0x7fffffffu : ~v); }

// Element i of a sequence of dummy weights, uniform in (-1, 1): the same on every target.
KOGC_DEVICE u32 hash(u32 seed, u64 i) {
  u32 h = (u32)i * 0x9e3779b1u ^ (u32)(i >> 32) * 0x85ebca77u ^ seed * 0xc2b2ae3du;
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ h >> 16;
}
KOGC_DEVICE float uniform(u32 seed, u64 i) { return (float)hash(seed, i) * (2.0f / 4294967296.0f) - 1.0f; }

}  // namespace kogc
