// Attention over the KV cache on all blocks. A unit is a KV head with up to eight of its query heads; SPLITS blocks share
// a unit's context in chunks of 128 positions, dealt in turns, so that the same block always meets the same chunk: what it
// wrote there it alone reads. Each split puts its unnormalised output with its maximum and sum; the readers combine.
//
// Keys and values follow the weights of the QKV phase in the stream. The target's AttentionCore<P> does the products.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE float* partial_address(u8* exchange, int head, int split) {
  return (float*)(exchange + P::X_PARTIAL) + ((u64)head * P::SPLITS + split) * (P::HEAD_DIM + 4);
}

// One vector of a head: words (i, i + HEAD_DIM / 2) on a lane, as rotary embedding pairs them.
template <class P> struct HeadVector {
  static constexpr int HALF = P::HEAD_DIM / 2, PAIRS = (HALF + LANES - 1) / LANES;
  float low[PAIRS] = {}, high[PAIRS] = {};

  static KOGC_DEVICE int index(int j) { return j * LANES + lane(); }
  static KOGC_DEVICE bool owns(int j) { return HALF % LANES == 0 || index(j) < HALF; }

  KOGC_DEVICE void take_from(const float* slot, u32 parity, const Where& where) {
    KOGC_UNROLL for (int j0 = 0; j0 < PAIRS; j0 += BATCH) {
      float v[2 * BATCH];
      u32 pending = 0;
      KOGC_UNROLL for (int j = 0; j < BATCH; j++) if (j0 + j < PAIRS && owns(j0 + j)) pending |= 3u << 2 * j;
      take<2 * BATCH>(v, pending, parity, where, WAIT_QKV, [&](int i) { return slot + index(j0 + i / 2) + i % 2 * HALF; });
      KOGC_UNROLL for (int j = 0; j < BATCH; j++) {
        if (j0 + j >= PAIRS || !owns(j0 + j)) continue;
        low[j0 + j] = v[2 * j];
        high[j0 + j] = v[2 * j + 1];
      }
    }
  }

  template <class Value> KOGC_DEVICE void fill(Value value) {
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) {
      if (!owns(j)) continue;
      low[j] = value(index(j));
      high[j] = value(index(j) + HALF);
    }
  }

  template <class Value> KOGC_DEVICE void add(Value value) {
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) {
      if (!owns(j)) continue;
      low[j] += value(index(j));
      high[j] += value(index(j) + HALF);
    }
  }

  // Norm weights and rotation, on their way while the vector is awaited.
  KOGC_DEVICE void fetch(const u16* gamma, const float* rope) {  // rope: [HEAD_DIM / 2][cos, sin] of the position
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) {
      if (!owns(j)) continue;
      cosine_[j] = rope[2 * index(j)];
      sine_[j] = rope[2 * index(j) + 1];
      if constexpr (P::QK_NORM) {
        gamma_[j][0] = gamma[index(j)];
        gamma_[j][1] = gamma[index(j) + HALF];
      }
    }
  }

  KOGC_DEVICE void normalise() {
    float squares = 0;
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) if (owns(j)) squares += low[j] * low[j] + high[j] * high[j];
    for (int m = LANES / 2; m; m /= 2) squares += shuffle_xor(squares, m);
    const float scale = reciprocal_sqrt(squares * (1.0f / P::HEAD_DIM) + P::NORM_EPS);
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) {
      if (!owns(j)) continue;
      low[j] *= scale * to_float<P::FP16>(gamma_[j][0]);
      high[j] *= scale * to_float<P::FP16>(gamma_[j][1]);
    }
  }

  KOGC_DEVICE void rotate() {
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) {
      const float a = low[j], b = high[j];
      low[j] = a * cosine_[j] - b * sine_[j];
      high[j] = b * cosine_[j] + a * sine_[j];
    }
  }

  KOGC_DEVICE float largest() const {  // magnitude, on all lanes
    float m = 0;
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) {
      const float a = magnitude(low[j]), b = magnitude(high[j]), larger = a > b ? a : b;
      m = larger > m ? larger : m;
    }
    for (int s = LANES / 2; s; s /= 2) {
      const float other = shuffle_xor(m, s);
      m = other > m ? other : m;
    }
    return m;
  }

  template <class Store> KOGC_DEVICE void store(Store to) const {
    KOGC_UNROLL for (int j = 0; j < PAIRS; j++) {
      if (!owns(j)) continue;
      to(index(j), low[j]);
      to(index(j) + HALF, high[j]);
    }
  }

 private:
  static constexpr int BATCH = PAIRS < 16 ? PAIRS : 16;
  static KOGC_DEVICE float magnitude(float v) { return as_float(as_word(v) & 0x7fffffff); }
  float cosine_[PAIRS] = {}, sine_[PAIRS] = {};
  u16 gamma_[PAIRS][2] = {};
};

// A key or value as the cache holds it: each number to `number(d, bits)`, the exponent of an FP8 vector to `scale`. What is
// no finite number is not kept: a later text would find it in its last tile, behind its own position, where a probability
// of zero does not make it zero.
template <class P, class Number, class Scale> KOGC_DEVICE void to_cache(const HeadVector<P>& v, Number number, Scale scale) {
  if constexpr (P::KV_FP8) {
    const u32 exponent = fp8_exponent(v.largest());
    const float divisor = fp8_divisor(exponent);
    v.store([&](int d, float x) { number(d, float_to_fp8(x * divisor)); });
    if (lane() == 0) scale(exponent);
  } else {
    v.store([&](int d, float x) {
      const u16 bits = float_to_bf16(x);
      number(d, (bits & 0x7f80) == 0x7f80 ? (u16)0 : bits);
    });
  }
}

// Queries of the unit (normalised, rotated, scaled for exp2) and, where this split owns the new position, its key and value.
template <class P>
KOGC_DEVICE void prepare(const KernelArgs& args, AttentionCore<P>& core, int kv_head, int first_head, int heads, int position,
                         bool owner, u32 parity, const Where& where) {
  const float* qkv = (const float*)(args.exchange + P::X_QKV);
  const float* rope = args.rope + (u64)position * P::HEAD_DIM;
  const u16* gamma = args.qk_norms + (u64)where.layer * 2 * P::HEAD_DIM;
  const float scale = LOG2E * P::INVERSE_SQRT_HEAD_DIM;
  u8* chunk = chunk_address<P>(args.kv, where.layer, kv_head, position / CHUNK);
  for (int i = scalar(warp()); i < heads + 2 * owner; i += WARPS) {
    HeadVector<P> v;
    const bool query = i < heads, key = i == heads;
    const int row = query ? (first_head + i) * P::HEAD_DIM : P::Q_ROWS + ((key ? 0 : P::KV_HEADS) + kv_head) * P::HEAD_DIM;
    if (query || key) v.fetch(gamma + key * P::HEAD_DIM, rope);
    v.take_from(qkv + row, parity, where);
    if (query || key) {
      if constexpr (P::QK_NORM) v.normalise();
      v.rotate();
    }
    if (query) v.store([&](int d, float x) { core.store_query(i, d, x * scale); });
    else if (key) to_cache(v, [&](int d, u16 x) { core.store_key(chunk, position % CHUNK, d, x); },
                           [&](u32 e) { core.store_key_scale(chunk, position % CHUNK, e); });
    else to_cache(v, [&](int d, u16 x) { core.store_value(chunk, position % CHUNK, d, x); },
                  [&](u32 e) { core.store_value_scale(chunk, position % CHUNK, e); });
  }
}

// Puts words of a partial output, as many at a time as the target's AttentionCore finds best.
template <class P> struct PutPartial {
  u8* exchange;
  int first_head, split;
  u32 parity;

  template <int N> KOGC_DEVICE void operator()(int head, int d, const float (&words)[N]) const {
    put_vector(partial_address<P>(exchange, first_head + head, split) + d, words, parity);
  }
};

// One unit of attention on one of its splits. Every split puts a partial output, an empty one where it has no chunk, so
// that the parity of every word changes with every layer.
template <class P>
KOGC_DEVICE void attend(Stream<P>& stream, const KernelArgs& args, int unit, int split, int position, u32 parity, const Where& where) {
  const int kv_head = unit / P::HEAD_TILES, tile = unit % P::HEAD_TILES;
  const int first_head = kv_head * P::GROUP + tile * P::HEADS_PER_BLOCK;
  const int left = P::GROUP - tile * P::HEADS_PER_BLOCK, heads = left < P::HEADS_PER_BLOCK ? left : P::HEADS_PER_BLOCK;
  const Span<P> ahead(position, P::window(where.layer));
  if (ahead.first_chunk(split) >= ahead.end) {
    constexpr int VECTORS = P::HEAD_DIM / 4 + 1;
    for (int i = thread(); i < heads * VECTORS; i += THREADS) {
      const bool sums = i % VECTORS == VECTORS - 1;
      put_vector(partial_address<P>(args.exchange, first_head + i / VECTORS, split) + i % VECTORS * 4, {sums ? LOWEST : 0, 0, 0, 0}, parity);
    }
    return;
  }
  AttentionCore<P> core;
  core.load_keys(stream, ahead.first_chunk(split), position, where);
  prepare<P>(args, core, kv_head, first_head, heads, position, ahead.owner(position) == split, parity, where);
  sync();
  Trace<P>::mark(args, QUERY);
  const Span<P> span(opaque(position), P::window(where.layer));  // opaque: not kept while the query is awaited
  for (int chunk = span.first_chunk(split);;) {
    const int second = AttentionCore<P>::PAIRS_CHUNKS ? span.next_chunk(chunk) : span.end;
    if (second < span.end) {
      if constexpr (AttentionCore<P>::PAIRS_CHUNKS) core.take_chunks(stream, chunk, second, span.lowest, position, where);
      chunk = second;
    } else {
      core.take_chunk(stream, chunk_address<P>(args.kv, where.layer, kv_head, chunk), chunk, span.lowest, position, where);
    }
    chunk = span.next_chunk(chunk);
    if (chunk >= span.end) break;
    core.leave(stream);  // the last chunk's stages later: others wait for this block's outputs
    core.load_keys(stream, chunk, position, where);
  }
  core.finish(heads);
  sync();
  Trace<P>::mark(args, ATTENTION_PRODUCTS);
  core.outputs(heads, PutPartial<P>{args.exchange, first_head, split, parity});
  core.leave(stream);
  sync();
  Trace<P>::mark(args, ATTENTION_PUT);
}

// This block's part of attention.
template <class P>
KOGC_DEVICE void attend(Stream<P>& stream, const KernelArgs& args, int position, u32 parity, const Where& where) {
  if constexpr (Units<P>::COUNT <= Units<P>::STRIDE) {  // the same without a loop, whose count would take a register
    if (Units<P>::first() < Units<P>::COUNT) attend(stream, args, Units<P>::first(), Units<P>::split(), position, parity, where);
  } else {
    for (int unit = Units<P>::first(); unit < Units<P>::COUNT; unit += Units<P>::STRIDE)
      attend(stream, args, unit, Units<P>::split(), position, parity, where);
  }
  cache_written<P>(where);
}

}  // namespace kogc
