// The kernels of a CUDA binary: the generation itself, and two helpers of the loader (dummy weights, read ceiling).
#pragma once

namespace kogc {

// The weights of a generation, in the order in which the decoder asks for them.
template <class P> KOGC_DEVICE void produce(const KernelArgs& args, int steps) {
  const u8* slab = args.slabs + block() * P::SLAB_BYTES;
  Producer<P> producer(args, slab + P::SLAB_BYTES);
  bool wanted = true;
  for (int step = 0; wanted && step < steps; step++) {
    const u8* from = slab;
    producer.begin(step, slab);
    for (int i = 0; wanted && i < Generation<P>::phases(args, step); i++) {
      const int phase = phase_at<P>(i);
      producer.at_layer(i / LAYER_PHASES);
      wanted = (phase != O || producer.copy_cache(from)) && producer.copy(from, phase);
    }
  }
  producer.drain();
}

template <class P> KOGC_DEVICE void generate(const KernelArgs& args) {
  init_words<P>();
  Ring<P>::init();
  const int steps = Generation<P>::steps(args);
  if (scalar(warp()) >= PRODUCER) {
    if (thread() - THREADS < COPIERS) produce<P>(args, steps);
    return;
  }
  Stream<P> stream;
  Decoder<P> decoder(args, stream);
#pragma unroll 1
  for (int step = 0; step < steps; step++)
    if (!scalar(decoder.step(step))) break;
  sync();
  if (thread() == 0) words<P>().finished = 1;
}

// to[i] = uniform in (-amplitude, amplitude)
KOGC_DEVICE void fill(u16* to, u64 n, u32 seed, float amplitude, int fp16) {
  const u64 stride = (u64)block_count() * block_threads();
  for (u64 i = (u64)block() * block_threads() + thread(); i < n; i += stride) {
    const float v = uniform(seed, i) * amplitude;
    to[i] = fp16 ? float_to_half(v) : float_to_bf16(v);
  }
}

// Reads `bytes` READ_PASSES times, each block its share through the ring as the weight stream does, with nothing to wait
// for. Several passes, so that a launch is long beside its start.
constexpr int READ_PASSES = 4;

template <class P> KOGC_DEVICE void read_ceiling(const void* from, u64 bytes, u32* sink) {
  Ring<P>::init();
  const u64 share = bytes / P::BLOCKS / P::STAGE_BYTES * P::STAGE_BYTES;
  const u8* source = (const u8*)from + block() * share;
  const int stages = (int)(share / P::STAGE_BYTES), all = stages * READ_PASSES;
  Cursor<P> cursor;
  if (scalar(warp()) >= PRODUCER) {
    if (thread() - THREADS >= COPIERS) return;
    const CachePolicy policy = read_once();
    for (int i = 0; i < all; i++, cursor.advance()) {
      while (!agreed(barrier_passed(Ring<P>::empty(cursor.slot), cursor.parity ^ 1))) {}
      barrier_expect(Ring<P>::full(cursor.slot), P::STAGE_BYTES);
      start_copy(Ring<P>::stage(cursor.slot), source + (u64)(i % stages) * P::STAGE_BYTES, P::STAGE_BYTES, Ring<P>::full(cursor.slot), policy);
    }
    return;
  }
  u32 seen = 0;
  for (int i = 0; i < all; i++, cursor.advance()) {
    while (!barrier_passed(Ring<P>::full(cursor.slot), cursor.parity)) {}
    seen ^= *(const u32*)(Ring<P>::stage(cursor.slot) + thread() * 4);
    sync_warp();
    if (lane() == 0) barrier_arrive(Ring<P>::empty(cursor.slot));
  }
  if (seen == 0x9e3779b9u) *sink = seen;  // never taken in practice, but the reads must be kept
}

}  // namespace kogc
