// The residual stream: every block holds all of it, in FP32, in its shared memory, of each token of a pass. A thread meets
// only vectors of four that are its own.
#pragma once

namespace kogc {

// Zeros from column `from` to `to`, where the weights are padded.
KOGC_DEVICE void clear_activation(u16* x, int from, int to) {
  for (int i = from / 4 + thread(); i < to / 4; i += THREADS) store_activation(x, i, Quad{0, 0});
}

template <class P> struct Residual {
  static constexpr int VECTORS = P::HIDDEN / 4;
  static constexpr int OWN = (VECTORS + THREADS - 1) / THREADS;  // vectors of one thread
  static constexpr int BATCH = OWN < 8 ? OWN : 8;                // vectors polled at once

  struct alignas(16) Vector { float a, b, c, d; };

  static KOGC_DEVICE Vector& own(int i, int token) { return ((Vector*)(shared() + P::RESIDUAL_OFFSET))[token * VECTORS + vector(i)]; }
  static KOGC_DEVICE int vector(int i) { return i * THREADS + thread(); }
  static KOGC_DEVICE bool owns(int i) { return VECTORS % THREADS == 0 || vector(i) < VECTORS; }

  static KOGC_DEVICE void load_embedding(const u16* row, int token) {
    KOGC_UNROLL for (int i = 0; i < OWN; i++) {
      if (!owns(i)) continue;
      const Quad q = ((const Quad*)row)[vector(i)];
      own(i, token) = {element<P::FP16>(q, 0), element<P::FP16>(q, 1), element<P::FP16>(q, 2), element<P::FP16>(q, 3)};
    }
  }

  // Adds the vector that the phase before has put into `slot` (none: nullptr), and makes x = residual * gamma, rounded to the
  // weights' type. The root mean square is one number: its inverse multiplies the results of the mat-vec (`scale`), so the
  // reduction does not stand before it. FP16 could overflow: it is scaled first.
  static KOGC_DEVICE void advance(const float* slot, const Quad (&gamma)[OWN], int token, u16* x, int padded, u32 parity,
                                  const Where& where, Site site) {
    float squares = 0;
    KOGC_UNROLL for (int i0 = 0; i0 < OWN; i0 += BATCH) {
      Vector r[BATCH];
      Words v[BATCH];
      u32 mine = 0;
      KOGC_UNROLL for (int i = 0; i < BATCH; i++) {
        v[i] = {0, 0, 0, 0};
        if (i0 + i >= OWN || !owns(i0 + i)) continue;
        r[i] = own(i0 + i, token);
        mine |= 1u << i;
      }
      if (slot) take_vectors<BATCH>(v, mine, parity, where, site, [&](int i) { return slot + 4 * vector(i0 + i); });
      KOGC_UNROLL for (int i = 0; i < BATCH; i++) {
        if (i0 + i >= OWN || !owns(i0 + i)) continue;
        r[i] = {r[i].a + as_float(v[i].x), r[i].b + as_float(v[i].y), r[i].c + as_float(v[i].z), r[i].d + as_float(v[i].w)};
        if constexpr (!P::FP16) store(x, i0 + i, r[i], gamma[i0 + i], 1);
        own(i0 + i, token) = r[i];
        squares += r[i].a * r[i].a + r[i].b * r[i].b + r[i].c * r[i].c + r[i].d * r[i].d;
      }
    }
    if constexpr (P::FP16) {
      reduce(squares, token);
      sync();
      const float scale = inverse_rms(token);
      KOGC_UNROLL for (int i = 0; i < OWN; i++) if (owns(i)) store(x, i, own(i, token), gamma[i], scale);
    }
    clear_activation(x, P::HIDDEN, padded);
    sync();
    if constexpr (!P::FP16) reduce(squares, token);  // the sums are read after the barrier that ends the mat-vec
  }

  // What multiplies the results of a mat-vec over a normalised x.
  static KOGC_DEVICE float scale(int token) { return P::FP16 ? 1.0f : inverse_rms(token); }

  static KOGC_DEVICE void load_gamma(Quad (&gamma)[OWN], const u16* row) {
    KOGC_UNROLL for (int i = 0; i < OWN; i++) gamma[i] = owns(i) ? ((const Quad*)row)[vector(i)] : Quad{};
  }

 private:
  static KOGC_DEVICE void store(u16* x, int i, const Vector& r, const Quad& gamma, float scale) {
    const Quad g = {opaque(gamma.low), opaque(gamma.high)};  // opaque: unpacked here, not where it was loaded
    store_activation(x, vector(i), pack<P::FP16>(r.a * scale * element<P::FP16>(g, 0), r.b * scale * element<P::FP16>(g, 1),
                                                 r.c * scale * element<P::FP16>(g, 2), r.d * scale * element<P::FP16>(g, 3)));
  }

  static KOGC_DEVICE float* warp_sums(int token) {
    static_assert(P::TOKENS * WARPS <= sizeof words<P>().warp_sums / sizeof(float));
    return words<P>().warp_sums + token * WARPS;
  }

  static KOGC_DEVICE void reduce(float squares, int token) {
    for (int m = LANES / 2; m; m /= 2) squares += shuffle_xor(squares, m);
    if (lane() == 0) warp_sums(token)[warp()] = squares;
  }

  static KOGC_DEVICE float inverse_rms(int token) {
    float total = 0;
    if constexpr (WARPS == 1) {
      total = *warp_sums(token);
    } else {
      KOGC_UNROLL for (int w = 0; w < WARPS; w += 4) {
        const Vector v = *(const Vector*)(warp_sums(token) + w);
        total += (v.a + v.b) + (v.c + v.d);
      }
    }
    return reciprocal_sqrt(total * (1.0f / P::HIDDEN) + P::NORM_EPS);
  }
};

// Fetches WORDS words from `slot` into x: FP32 values, or (PAIRS) two values a word as put_pair() leaves them.
template <class P, int WORDS, bool PAIRS = false>
KOGC_DEVICE void gather(const void* slot, u16* x, int padded, u32 parity, const Where& where, Site site) {
  constexpr int VECTORS = WORDS / 4, BATCH = VECTORS >= 8 * THREADS ? 8 : (VECTORS + THREADS - 1) / THREADS;
#pragma unroll 1
  for (int first = 0; first < VECTORS; first += BATCH * THREADS) {
    Words v[BATCH];
    const auto vector = [&](int i) { return first + i * THREADS + thread(); };
    const auto mine = [&](int i) { return (BATCH * THREADS >= VECTORS && (i + 1) * THREADS <= VECTORS) || vector(i) < VECTORS; };
    u32 wanted = 0;
    KOGC_UNROLL for (int i = 0; i < BATCH; i++) wanted |= (u32)mine(i) << i;
    const auto address = [&](int i) { return (const Words*)slot + vector(i); };
    take_vectors<BATCH, PAIRS ? PAIR_BIT : FLOAT_BIT>(v, wanted, parity, where, site, address);
    KOGC_UNROLL for (int i = 0; i < BATCH; i++) {
      if (!mine(i)) continue;
      if constexpr (PAIRS) {
        store_activation(x, 2 * vector(i), Quad{v[i].x, v[i].y});
        store_activation(x, 2 * vector(i) + 1, Quad{v[i].z, v[i].w});
      } else {
        store_activation(x, vector(i), pack<P::FP16>(as_float(v[i].x), as_float(v[i].y), as_float(v[i].z), as_float(v[i].w)));
      }
    }
  }
  clear_activation(x, PAIRS ? 2 * WORDS : WORDS, padded);
  sync();
}

}  // namespace kogc
