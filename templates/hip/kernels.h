// The kernels of a code object: the generation itself, and two helpers of the loader (dummy weights, read ceiling).
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE void generate(const KernelArgs& args) {
  init_words<P>();
  sync();
  Stream<P> stream(args);
  Decoder<P> decoder(args, stream);
  const int steps = Generation<P>::steps(args);
#pragma unroll 1
  for (int step = 0; step < steps; step++)
    if (!scalar(decoder.step(step))) break;
}

// to[i] = uniform in (-amplitude, amplitude)
KOGC_DEVICE void fill(u16* to, u64 n, u32 seed, float amplitude, int fp16) {
  const u64 stride = (u64)block_count() * block_threads();
  for (u64 i = (u64)block() * block_threads() + thread(); i < n; i += stride) {
    const float v = uniform(seed, i) * amplitude;
    to[i] = fp16 ? float_to_half(v) : float_to_bf16(v);
  }
}

// Reads `bytes` READ_PASSES times, each block its share as the weight stream does, with nothing to wait for. Several passes,
// so that a launch is long beside its start.
constexpr int READ_PASSES = 4;

template <class P> KOGC_DEVICE void read_ceiling(const void* from, u64 bytes, u32* sink) {
  constexpr int SLOTS = P::IN_FLIGHT;
  const int rounds = (int)(bytes / P::BLOCKS / ROUND) / SLOTS;
  const u8* share = (const u8*)from + (u64)block() * rounds * SLOTS * ROUND;
  Words queue[SLOTS];
  u32 seen = 0;
#pragma unroll 1
  for (int i = 0; i <= READ_PASSES * rounds; i++) {
    const u8* round = share + (u64)(rounds ? i % rounds : 0) * SLOTS * ROUND;
    KOGC_UNROLL for (int slot = 0; slot < SLOTS; slot++) {
      if (i) seen ^= queue[slot].x ^ queue[slot].y ^ queue[slot].z ^ queue[slot].w;
      queue[slot] = load_once(round + slot * ROUND, (u32)thread() * 16);
      keep_order();
    }
  }
  if (seen == 0x9e3779b9u) *sink = seen;  // never taken in practice, but the reads must be kept
}

}  // namespace kogc
