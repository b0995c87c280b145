// Vectors that cross blocks. Each FP32 word carries in its lowest mantissa bit the parity of its use, so a reader polls
// the data itself: no flag, no fence, no reset. The reader strips the bit, so that no result depends on the parity of its
// launch. It is sound because a slot is rewritten only after the next exchange has
// shown that every reader is done (kogc/plan/check.py proves it for the plan).
#pragma once

namespace kogc {

// Two BF16 values share a word, where the reader rounds to BF16 anyway: they are scaled by 2^-64, which leaves the highest
// exponent bit of all that is smaller than 2^65 free for the parity; the mat-vec's result is scaled back.
constexpr int FLOAT_BIT = 0, PAIR_BIT = 14;  // where a word has its parity
constexpr float PAIR_SCALE = 5.421010862427522e-20f, PAIR_UNSCALE = 18446744073709551616.0f;

KOGC_DEVICE void put(float* slot, float v, u32 parity) { store_word(slot, (as_word(v) & ~1u) | parity); }

KOGC_DEVICE void put_vector(float* slot, const float (&v)[1], u32 parity) { put(slot, v[0], parity); }
KOGC_DEVICE void put_vector(float* slot, const float (&v)[4], u32 parity) {  // on a boundary of 16 bytes
  store_words(slot, {(as_word(v[0]) & ~1u) | parity, (as_word(v[1]) & ~1u) | parity, (as_word(v[2]) & ~1u) | parity,
                     (as_word(v[3]) & ~1u) | parity});
}

KOGC_DEVICE void put_pair(u32* slot, float a, float b, u32 parity) {
  const u32 w = floats_to_bf16(a * PAIR_SCALE, b * PAIR_SCALE);
  store_word(slot, (w & ~(1u << PAIR_BIT)) | parity << PAIR_BIT);
}

template <int BIT = FLOAT_BIT> KOGC_DEVICE bool ready(const Words& w, u32 parity) {
  const u32 p = parity << BIT, differs = opaque(w.x ^ p | w.y ^ p | w.z ^ p | w.w ^ p);  // opaque: not one word at a time
  return (differs >> BIT & 1u) == 0;
}

// Fetch the vectors of four words that `pending` names, `address(i)` each; the others are zero. A warp polls as one, until
// all its lanes have all that they want; all loads are issued before the first is checked: one after the other they would
// cost a round trip each. (A load alone is made by all lanes, for a branch around it would cost more: any lane's address can
// be read.)
template <int N, int BIT = FLOAT_BIT, class Address>
KOGC_DEVICE void take_vectors(Words (&v)[N], u32 pending, u32 parity, const Where& where, Site site, Address address) {
  static_assert(N <= 32);
  KOGC_UNROLL for (int i = 0; i < N; i++) v[i] = {0, 0, 0, 0};
  for (Spin spin;; spin.step(where, site, parity)) {
    KOGC_UNROLL for (int i = 0; i < N; i++) load_words_if(N == 1 || (pending >> i & 1), v[i], address(i));
    KOGC_UNROLL for (int i = 0; i < N; i++) pending &= ~((u32)ready<BIT>(v[i], parity) << i);
    if (all_lanes(pending == 0)) break;
  }
  constexpr u32 KEEP = ~(1u << BIT);
  KOGC_UNROLL for (int i = 0; i < N; i++) v[i] = {v[i].x & KEEP, v[i].y & KEEP, v[i].z & KEEP, v[i].w & KEEP};
}

// The same for single words.
template <int N, class Address>
KOGC_DEVICE void take(float (&v)[N], u32 pending, u32 parity, const Where& where, Site site, Address address) {
  static_assert(N <= 32);
  u32 w[N];
  KOGC_UNROLL for (int i = 0; i < N; i++) w[i] = 0;
  for (Spin spin;; spin.step(where, site, parity)) {
    KOGC_UNROLL for (int i = 0; i < N; i++) load_word_if(pending >> i & 1, w[i], address(i));
    KOGC_UNROLL for (int i = 0; i < N; i++) pending &= ~((u32)((w[i] & 1u) == parity) << i);
    if (all_lanes(pending == 0)) break;
  }
  KOGC_UNROLL for (int i = 0; i < N; i++) v[i] = as_float(w[i] & ~1u);
}

KOGC_DEVICE u32 first_bits(int count) { return (1u << count) - 1; }

}  // namespace kogc
