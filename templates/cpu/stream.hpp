// The weight stream: a pointer that goes through this thread's slab once a step, phase after phase. The processor fetches
// ahead by itself; what is asked for beyond a phase's end arrives while the next activation is awaited.
#pragma once

namespace kogc {

template <class P> struct Stream {
  static constexpr int AHEAD = 2048;  // bytes from the weights at hand to those asked for

  const u8* at;

  KOGC_DEVICE void rewind(const u8* slabs) { at = slabs + (u64)block() * P::SLAB_BYTES; }
};

}  // namespace kogc
