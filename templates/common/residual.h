// The residual stream: every block holds all of it, in FP32, in its shared memory. A thread meets only vectors of four
// that are its own.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE float* warp_sums() { return (float*)(shared() + P::REDUCE_OFFSET); }

template <class P> struct Residual {
  static constexpr int VECTORS = P::HIDDEN / 4;
  static constexpr int OWN = (VECTORS + THREADS - 1) / THREADS;  // vectors of one thread
  static constexpr int BATCH = OWN < 8 ? OWN : 8;                // vectors polled at once

  struct alignas(16) Vector { float a, b, c, d; };

  static KOGC_DEVICE Vector& own(int i) { return ((Vector*)(shared() + P::RESIDUAL_OFFSET))[vector(i)]; }
  static KOGC_DEVICE int vector(int i) { return i * THREADS + thread(); }
  static KOGC_DEVICE bool owns(int i) { return VECTORS % THREADS == 0 || vector(i) < VECTORS; }

  static KOGC_DEVICE void load_embedding(const u16* row) {
    KOGC_UNROLL for (int i = 0; i < OWN; i++) {
      if (!owns(i)) continue;
      const Quad16 q = ((const Quad16*)row)[vector(i)];
      own(i) = {to_float<P::FP16>(q.a), to_float<P::FP16>(q.b), to_float<P::FP16>(q.c), to_float<P::FP16>(q.d)};
    }
  }

  // Adds the vector that the phase before has put into `slot`.
  static KOGC_DEVICE void add(const float* slot, u32 parity, const Where& where, Site site) {
    KOGC_UNROLL for (int i0 = 0; i0 < OWN; i0 += BATCH) {
      Words v[BATCH];
      int count = 0;
      KOGC_UNROLL for (int i = 0; i < BATCH; i++) count += i0 + i < OWN && owns(i0 + i);
      take_vectors<BATCH>(v, first_bits(count), parity, where, site, [&](int i) { return slot + 4 * vector(i0 + i); });
      KOGC_UNROLL for (int i = 0; i < BATCH; i++) {
        if (i0 + i >= OWN || !owns(i0 + i)) continue;
        Vector& r = own(i0 + i);
        r = {r.a + as_float(v[i].x), r.b + as_float(v[i].y), r.c + as_float(v[i].z), r.d + as_float(v[i].w)};
      }
    }
  }

  // x = residual * gamma, rounded to the weights' type. The root mean square is one number: its inverse multiplies the
  // results of the mat-vec (`scale`), so the reduction does not stand before it. FP16 could overflow: it is scaled first.
  static KOGC_DEVICE void normalise(const Quad16 (&gamma)[OWN], u16* x, int padded) {
    float squares = 0;
    KOGC_UNROLL for (int i = 0; i < OWN; i++) {
      if (!owns(i)) continue;
      const Vector r = own(i);
      squares += r.a * r.a + r.b * r.b + r.c * r.c + r.d * r.d;
    }
    float early = 1;
    if constexpr (P::FP16) {
      reduce(squares);
      sync();
      early = inverse_rms();
    }
    KOGC_UNROLL for (int i = 0; i < OWN; i++) {
      if (!owns(i)) continue;
      const Vector r = own(i);
      ((Quad16*)x)[vector(i)] = {from_float<P::FP16>(r.a * early * to_float<P::FP16>(gamma[i].a)),
                                 from_float<P::FP16>(r.b * early * to_float<P::FP16>(gamma[i].b)),
                                 from_float<P::FP16>(r.c * early * to_float<P::FP16>(gamma[i].c)),
                                 from_float<P::FP16>(r.d * early * to_float<P::FP16>(gamma[i].d))};
    }
    for (int i = P::HIDDEN + thread(); i < padded; i += THREADS) x[i] = 0;
    sync();
    if constexpr (!P::FP16) reduce(squares);  // the sums are read after the barrier that ends the mat-vec
  }

  // What multiplies the results of a mat-vec over a normalised x.
  static KOGC_DEVICE float scale() { return P::FP16 ? 1.0f : inverse_rms(); }

  static KOGC_DEVICE void load_gamma(Quad16 (&gamma)[OWN], const u16* row) {
    KOGC_UNROLL for (int i = 0; i < OWN; i++) gamma[i] = owns(i) ? ((const Quad16*)row)[vector(i)] : Quad16{};
  }

 private:
  static KOGC_DEVICE void reduce(float squares) {
    for (int m = LANES / 2; m; m /= 2) squares += shuffle_xor(squares, m);
    if (lane() == 0) warp_sums<P>()[warp()] = squares;
  }

  static KOGC_DEVICE float inverse_rms() {
    float total = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++) total += warp_sums<P>()[w];
    return reciprocal_sqrt(total * (1.0f / P::HIDDEN) + P::NORM_EPS);
  }
};

// Fetches `words` FP32 words from `slot` into x, rounded to the weights' type.
template <class P, int WORDS>
KOGC_DEVICE void gather(const float* slot, u16* x, int padded, u32 parity, const Where& where, Site site) {
  constexpr int VECTORS = WORDS / 4, BATCH = VECTORS >= 8 * THREADS ? 8 : (VECTORS + THREADS - 1) / THREADS;
  for (int v0 = thread(); v0 < VECTORS; v0 += BATCH * THREADS) {
    Words v[BATCH];
    const int left = (VECTORS - v0 + THREADS - 1) / THREADS, count = left < BATCH ? left : BATCH;
    take_vectors<BATCH>(v, first_bits(count), parity, where, site, [&](int i) { return slot + 4 * (v0 + i * THREADS); });
    KOGC_UNROLL for (int i = 0; i < BATCH; i++) {
      if (i >= count) continue;
      Quad16 q = {from_float<P::FP16>(as_float(v[i].x)), from_float<P::FP16>(as_float(v[i].y)),
                  from_float<P::FP16>(as_float(v[i].z)), from_float<P::FP16>(as_float(v[i].w))};
      ((Quad16*)x)[v0 + i * THREADS] = q;
    }
  }
  for (int i = WORDS + thread(); i < padded; i += THREADS) x[i] = 0;
  sync();
}

}  // namespace kogc
