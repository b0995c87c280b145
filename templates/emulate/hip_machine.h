// A stand-in for hip/machine.h: the emulated machine with what AMD GPUs have besides, or in place of what NVIDIA's have.
#pragma once
#include "emulate/machine.h"

namespace kogc {

KOGC_DEVICE const KernelArgs& arguments(const KernelArgs& args) { return args; }
template <int BIT> KOGC_DEVICE float neighbour(float v) { return shuffle_xor(v, BIT); }

// A load that is under way until it is used: the hardware counts it and the compiler waits, so here it is done at once.
KOGC_DEVICE Words load_once(const u8* from, u32 offset) {
  if (((size_t)from + offset) % 16) emulated::violation("a load that is not aligned");
  return *(const Words*)(from + offset);
}
KOGC_DEVICE void keep_order() {}

}  // namespace kogc
