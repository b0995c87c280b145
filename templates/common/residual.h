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

  // Adds the vector that the phase before has put into `slot`.
  static KOGC_DEVICE void add(const float* slot, int token, u32 parity, const Where& where, Site site) {
    KOGC_UNROLL for (int i0 = 0; i0 < OWN; i0 += BATCH) {
      Words v[BATCH];
      int count = 0;
      KOGC_UNROLL for (int i = 0; i < BATCH; i++) count += i0 + i < OWN && owns(i0 + i);
      take_vectors<BATCH>(v, first_bits(count), parity, where, site, [&](int i) { return slot + 4 * vector(i0 + i); });
      KOGC_UNROLL for (int i = 0; i < BATCH; i++) {
        if (i0 + i >= OWN || !owns(i0 + i)) continue;
        Vector& r = own(i0 + i, token);
        r = {r.a + as_float(v[i].x), r.b + as_float(v[i].y), r.c + as_float(v[i].z), r.d + as_float(v[i].w)};
      }
    }
  }

  // x = residual * gamma, rounded to the weights' type. The root mean square is one number: its inverse multiplies the
  // results of the mat-vec (`scale`), so the reduction does not stand before it. FP16 could overflow: it is scaled first.
  static KOGC_DEVICE void normalise(const Quad (&gamma)[OWN], int token, u16* x, int padded) {
    float squares = 0;
    KOGC_UNROLL for (int i = 0; i < OWN; i++) {
      if (!owns(i)) continue;
      const Vector r = own(i, token);
      squares += r.a * r.a + r.b * r.b + r.c * r.c + r.d * r.d;
    }
    float early = 1;
    if constexpr (P::FP16) {
      reduce(squares, token);
      sync();
      early = inverse_rms(token);
    }
    KOGC_UNROLL for (int i = 0; i < OWN; i++) {
      if (!owns(i)) continue;
      const Vector r = own(i, token);
      const Quad g = {opaque(gamma[i].low), opaque(gamma[i].high)};
      store_activation(x, vector(i), pack<P::FP16>(r.a * early * element<P::FP16>(g, 0), r.b * early * element<P::FP16>(g, 1),
                                                   r.c * early * element<P::FP16>(g, 2), r.d * early * element<P::FP16>(g, 3)));
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
  for (int v0 = thread(); v0 < VECTORS; v0 += BATCH * THREADS) {
    Words v[BATCH];
    const int left = (VECTORS - v0 + THREADS - 1) / THREADS, count = left < BATCH ? left : BATCH;
    const auto address = [&](int i) { return (const Words*)slot + v0 + i * THREADS; };
    take_vectors<BATCH, PAIRS ? PAIR_BIT : FLOAT_BIT>(v, first_bits(count), parity, where, site, address);
    KOGC_UNROLL for (int i = 0; i < BATCH; i++) {
      if (i >= count) continue;
      const int vector = v0 + i * THREADS;
      if constexpr (PAIRS) {
        store_activation(x, 2 * vector, Quad{v[i].x, v[i].y});
        store_activation(x, 2 * vector + 1, Quad{v[i].z, v[i].w});
      } else {
        store_activation(x, vector, pack<P::FP16>(as_float(v[i].x), as_float(v[i].y), as_float(v[i].z), as_float(v[i].w)));
      }
    }
  }
  clear_activation(x, PAIRS ? 2 * WORDS : WORDS, padded);
  sync();
}

}  // namespace kogc
