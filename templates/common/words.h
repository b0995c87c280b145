// The few words that a block's threads share beside its vectors.
#pragma once

namespace kogc {

struct BlockWords {
  float warp_sums[16];   // a norm's sums, one a warp
  u64 warp_keys[16];     // the choice's keys, one a warp
  i32 stop, chosen;      // whether the host asks to stop; the token chosen last
  u32 searches;          // rounds of searches for a threshold in this launch, and those of each level
  u32 level_searches[3];
  u64 agreed;            // the key of the token that the blocks know to have chosen, each by itself; 0: they must compare
  Work work[HEAD + 1];   // this block's share of each phase: read, it costs a tenth of what deriving it costs
  i32 unused[2];         // what consumers and producer share lies in a line of its own
  volatile i32 finished;    // the generation has ended
  volatile i32 exchanging;  // the consumers wait for other blocks: polls queue behind copies, so fewer are kept in flight
  u32 attended;          // layers, over all steps, whose new key and value are in the cache
  u32 waited, events;    // of a tracing build: cycles waited for weights since the last event, and events so far
};

template <class P> KOGC_DEVICE BlockWords& words() { return *(BlockWords*)(shared() + P::REDUCE_OFFSET); }

// Once, by every thread of a block; a barrier must follow.
template <class P> KOGC_DEVICE void init_words() {
  BlockWords& w = words<P>();
  for (int phase = thread(); phase <= HEAD; phase += THREADS) w.work[phase] = work_of<P>(phase);
  if (thread() != 0) return;
  w.finished = 0;
  w.exchanging = 0;
  w.attended = w.waited = w.events = 0;
  w.agreed = 0;
  w.searches = w.level_searches[0] = w.level_searches[1] = w.level_searches[2] = 0;
}

}  // namespace kogc
