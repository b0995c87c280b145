// What the splits of a unit put, combined: outputs and sums relative to each split's maximum become attention outputs.
#pragma once

namespace kogc {

// Weight of a split's sums when the common maximum is `maximum`.
KOGC_DEVICE float split_weight(const Words& sums, float maximum) {
  return exp2_fast(as_float(sums.x) - maximum);
}

// x = attention outputs, combined from few splits while they are gathered.
template <class P>
KOGC_DEVICE void gather_partials(const KernelArgs& args, const Span<P>& span, u16* x, u32 parity, const Where& where) {
  constexpr int VECTORS = P::Q_ROWS / 4, BATCH = VECTORS > THREADS ? 2 : 1, SPLITS = P::GATHER_SPLITS;
  const int active = span.active();
  for (int first = 0; first < VECTORS; first += BATCH * THREADS) {
    const int v0 = first + thread();
    Words w[SPLITS * 2 * BATCH];  // [split][outputs, sums][vector]
    u32 wanted = 0;
    KOGC_UNROLL for (int i = 0; i < SPLITS * 2 * BATCH; i++)
      if (i / (2 * BATCH) < active && v0 + i % BATCH * THREADS < VECTORS) wanted |= 1u << i;
    take_vectors<SPLITS * 2 * BATCH>(w, wanted, parity, where, WAIT_PARTIAL, [&](int i) {
      const int word = 4 * (v0 + i % BATCH * THREADS), head = word / P::HEAD_DIM;
      return partial_address<P>(args.exchange, head, span.split(i / (2 * BATCH))) + (i / BATCH % 2 ? P::HEAD_DIM : word % P::HEAD_DIM);
    });
    KOGC_UNROLL for (int j = 0; j < BATCH; j++) {
      if (v0 + j * THREADS >= VECTORS) continue;
      float maximum = LOWEST, sum = 0, o[4] = {};
      KOGC_UNROLL for (int s = 0; s < SPLITS; s++) {
        const float m = as_float(w[(s * 2 + 1) * BATCH + j].x);
        if (s < active && m > maximum) maximum = m;
      }
      KOGC_UNROLL for (int s = 0; s < SPLITS; s++) {
        if (s >= active) continue;
        const Words &out = w[s * 2 * BATCH + j], &sums = w[(s * 2 + 1) * BATCH + j];
        const float weight = split_weight(sums, maximum);
        sum += weight * as_float(sums.y);
        o[0] += weight * as_float(out.x);
        o[1] += weight * as_float(out.y);
        o[2] += weight * as_float(out.z);
        o[3] += weight * as_float(out.w);
      }
      const float inverse = reciprocal(sum);
      store_activation(x, v0 + j * THREADS, pack<P::FP16>(o[0] * inverse, o[1] * inverse, o[2] * inverse, o[3] * inverse));
    }
  }
}

// Many splits: block h combines head h (ways of threads take the splits in turn), and the result is one more exchange.
template <class P>
KOGC_DEVICE void combine(const KernelArgs& args, const Span<P>& span, u32 parity, u32 out_parity, const Where& where) {
  constexpr int VECTORS = P::HEAD_DIM / 4, WAYS = THREADS >= VECTORS ? THREADS / VECTORS : 1, ITEMS = WAYS * VECTORS;
  struct Part { float o[4], maximum, sum; };
  Part* parts = (Part*)scratch<P>();
  const int active = span.active();
  for (int head = block(); head < P::HEADS; head += P::BLOCKS) {
    for (int first = 0; first < ITEMS; first += THREADS) {
      const int item = first + thread(), vector = item % VECTORS;
      Part p = {{0, 0, 0, 0}, LOWEST, 0};
      for (int i0 = 0; i0 < active; i0 += 2 * WAYS) {
        const int i = i0 + item / VECTORS, left = item < ITEMS ? active - i : 0, count = left > WAYS ? 2 : left > 0;
        Words w[4];
        take_vectors<4>(w, first_bits(2 * count), parity, where, WAIT_PARTIAL, [&](int k) {
          return partial_address<P>(args.exchange, head, span.split(i + k / 2 * WAYS)) + (k % 2 ? P::HEAD_DIM : 4 * vector);
        });
        KOGC_UNROLL for (int k = 0; k < 2; k++) {
          if (k >= count) continue;
          const Words &out = w[2 * k], &sums = w[2 * k + 1];
          const float m = as_float(sums.x) > p.maximum ? as_float(sums.x) : p.maximum;
          const float keep = exp2_fast(p.maximum - m), weight = split_weight(sums, m);
          p.sum = p.sum * keep + as_float(sums.y) * weight;
          p.o[0] = p.o[0] * keep + as_float(out.x) * weight;
          p.o[1] = p.o[1] * keep + as_float(out.y) * weight;
          p.o[2] = p.o[2] * keep + as_float(out.z) * weight;
          p.o[3] = p.o[3] * keep + as_float(out.w) * weight;
          p.maximum = m;
        }
      }
      if (item < ITEMS) parts[item] = p;
    }
    sync();
    for (int vector = thread(); vector < VECTORS; vector += THREADS) {
      float maximum = LOWEST, sum = 0, o[4] = {};
      for (int i = 0; i < WAYS; i++) maximum = parts[i * VECTORS + vector].maximum > maximum ? parts[i * VECTORS + vector].maximum : maximum;
      for (int i = 0; i < WAYS; i++) {
        const Part& p = parts[i * VECTORS + vector];
        const float weight = exp2_fast(p.maximum - maximum);
        sum += p.sum * weight;
        KOGC_UNROLL for (int e = 0; e < 4; e++) o[e] += p.o[e] * weight;
      }
      float* to = (float*)(args.exchange + P::X_ATTENTION) + head * P::HEAD_DIM + 4 * vector;
      const float inverse = reciprocal(sum);
      put_vector(to, {o[0] * inverse, o[1] * inverse, o[2] * inverse, o[3] * inverse}, out_parity);
    }
    sync();
  }
}

}  // namespace kogc
