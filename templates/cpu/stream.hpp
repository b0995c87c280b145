// The weight stream: a pointer that goes through this thread's slab once a step, phase after phase. What is fetched ahead
// beyond a phase's end arrives while the next activation is awaited.
#pragma once

namespace kogc {

template <class P> struct Stream {
  const u8* at;

  KOGC_DEVICE void rewind(const u8* slabs) { at = slabs + (u64)block() * P::SLAB_BYTES; }
};

template <class P> KOGC_DEVICE void exchange_begins() {}
template <class P> KOGC_DEVICE void exchange_ends() {}
template <class P> KOGC_DEVICE void cache_written(const Where&) {}

}  // namespace kogc
