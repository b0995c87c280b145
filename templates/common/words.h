// The few words that a block's threads share beside its vectors.
#pragma once

namespace kogc {

struct BlockWords {
  float warp_sums[16];   // a norm's sums, one a warp
  u64 warp_keys[16];     // the choice's keys, one a warp
  i32 stop, chosen;      // whether the host asks to stop; the token chosen last
  u32 searches;          // rounds of searches for a threshold in this launch, and those of each level
  u32 level_searches[3];
  i32 unused[10];        // what consumers and producer share lies in a line of its own
  volatile i32 finished;    // the generation has ended
  volatile i32 exchanging;  // the consumers wait for other blocks: polls queue behind copies, so fewer are kept in flight
  u32 waited, events;    // of a tracing build: cycles waited for weights since the last event, and events so far
};

template <class P> KOGC_DEVICE BlockWords& words() { return *(BlockWords*)(shared() + P::REDUCE_OFFSET); }

}  // namespace kogc
