// Randomness that depends on (seed, position, row of the vocabulary) alone: a run repeats on any number of blocks.
#pragma once

namespace kogc {

struct Bits { u32 w[4]; };

// Philox4x32-10 (Salmon et al., 2011).
KOGC_DEVICE Bits philox(u64 seed, u32 a, u32 b) {
  u32 x = a, y = b, z = 0, w = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
  KOGC_UNROLL for (int round = 0; round < 10; round++) {
    const u64 p = (u64)x * 0xd2511f53u, q = (u64)z * 0xcd9e8d57u;
    x = (u32)(q >> 32) ^ y ^ k0;
    z = (u32)(p >> 32) ^ w ^ k1;
    y = (u32)q;
    w = (u32)p;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{x, y, z, w}};
}

// Base-2 logarithm of a positive normal number, to about 1e-7 of the result also near 1.
KOGC_DEVICE float log2_near(float v) {
  const u32 shifted = as_word(v) - 0x3f3504f3u;  // of the square root of a half
  const float exponent = (float)((i32)shifted >> 23);
  const float m = as_float((shifted & 0x7fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) * reciprocal(m + 1.0f), t = s * s;
  return exponent + s * (2.0f * LOG2E) * (1.0f + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9)))));
}
KOGC_DEVICE float natural_log(float v) { return log2_near(v) * (1.0f / LOG2E); }

// Gumbel noise from 32 random bits: the row with the largest (logit + noise) is a draw from the softmax of the logits.
// -log(1 - v) is taken as a series where v is small: there lies the tail that decides among many rows.
KOGC_DEVICE float gumbel(u32 bits) {
  const float v = ((float)bits + 0.5f) * (1.0f / 4294967296.0f);
  if (v < 0.01f) return -natural_log(v * (1.0f + v * (1.0f / 2 + v * (1.0f / 3 + v * (1.0f / 4)))));
  const float rest = 1.0f - v;
  return -natural_log(-natural_log(rest > 0.0f ? rest : 1.0f / 8589934592.0f));
}

}  // namespace kogc
