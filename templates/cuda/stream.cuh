// The stream: a warp copies this block's slab, and its part of the KV cache between the phases QKV and O, through a ring
// of shared-memory stages for ever, across phases, layers and tokens; it never waits for an activation. Bytes in flight are
// capped, because the polls of an exchange queue behind them; while the ring is full the slab goes on into L2 at its own pace.
#pragma once

namespace kogc {

template <class P> struct Ring {
  static KOGC_DEVICE char* stage(int slot) { return shared() + P::RING_OFFSET + slot * P::SLOT_BYTES; }
  static KOGC_DEVICE Barrier* full(int slot) { return (Barrier*)(shared() + P::BARRIER_OFFSET) + slot; }
  static KOGC_DEVICE Barrier* empty(int slot) { return full(slot) + P::STAGES; }

  static KOGC_DEVICE void init() {
    if (thread() == 0) {
      for (int i = 0; i < P::STAGES; i++) {
        barrier_init(full(i), COPIERS);
        barrier_init(empty(i), WARPS);
      }
      barrier_init_done();
    }
    sync_block();
  }
};

// A position in the ring and the parity of its barriers there.
template <class P> struct Cursor {
  int slot = 0;
  u32 parity = 0;

  KOGC_DEVICE void advance(int stages = 1) {
    slot += stages;
    if (slot >= P::STAGES) {
      slot -= P::STAGES;
      parity ^= 1;
    }
  }
};

// Keys and values cross the ring in tiles of 16 positions, whole tiles to a stage; a chunk ends with the tile of the
// position at hand.
template <class P> struct Tiles {
  static constexpr int POSITIONS = 16, BYTES = P::CHUNK_BYTES / (CHUNK / POSITIONS);
  static constexpr int FIT = P::SLOT_BYTES / BYTES, IN_STAGE = FIT >= 8 ? 8 : FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
  static constexpr int STAGE_BYTES = IN_STAGE * BYTES, MOST_STAGES = CHUNK / POSITIONS / IN_STAGE;
  static constexpr bool WHOLE = KEYS_AHEAD && MOST_STAGES <= P::STAGES;  // whether a chunk is awaited as a whole

  static KOGC_DEVICE int in_use(int chunk, int position) {
    const int left = position / POSITIONS + 1 - chunk * (CHUNK / POSITIONS);
    return left < CHUNK / POSITIONS ? left : CHUNK / POSITIONS;
  }
};

// Runs on each copying lane: what one of them decides by, all must agree on.
template <class P> class Producer {
 public:
  KOGC_DEVICE Producer(const KernelArgs& args, const u8* end) : end_(end), where_{args, 0, 0} {}

  // A step begins: the slab from its start.
  KOGC_DEVICE void begin(int step, const u8* slab) {
    where_.step = step;
    ahead_ = slab;
  }
  KOGC_DEVICE void at_layer(int layer) { where_.layer = layer; }

  // Copies this block's part of a phase and moves `from` past it. False: the consumers have finished the generation.
  KOGC_DEVICE bool copy(const u8*& from, int phase) {
    const Work work = words<P>().work[phase];
    const int cap = phase == HEAD ? P::IN_FLIGHT_HEAD : P::IN_FLIGHT;
    const u8* end = from + (u32)work.units * (work.unit * work.columns * 2);
    while (from < end) {
      const int bytes = end - from < P::STAGE_BYTES ? (int)(end - from) : P::STAGE_BYTES;
      if (!copy_stage(from, bytes, cap, P::IN_FLIGHT_EXCHANGE, from)) return false;
      from += bytes;
    }
    return true;
  }

  // Copies this block's part of a layer's keys and values. `next`: where the slab goes on.
  KOGC_DEVICE bool copy_cache(const u8* next) {
    const int position = where_.args.start + where_.step;
    const Span<P> span(position, P::window(where_.layer));
    if (where_.layer == 0 && !wait_written()) return false;
    for (int unit = Units<P>::first(); unit < Units<P>::COUNT; unit += Units<P>::STRIDE)
      for (int chunk = span.first_chunk(Units<P>::split()); chunk < span.end; chunk = span.next_chunk(chunk))
        if (!copy_chunk(unit / P::HEAD_TILES, chunk, position, next)) return false;
    return true;
  }

  // A block may not leave while copies into its shared memory are under way.
  KOGC_DEVICE void drain() {
    while (in_flight_) retire();
  }

 private:
  KOGC_DEVICE bool copy_chunk(int kv_head, int chunk, int position, const u8* next) {
    const u8* from = chunk_address<P>(where_.args.kv, where_.layer, kv_head, chunk);
    for (int tile = 0; tile < Tiles<P>::in_use(chunk, position); tile += Tiles<P>::IN_STAGE)
      if (!copy_stage(from + tile * Tiles<P>::BYTES, Tiles<P>::STAGE_BYTES, P::IN_FLIGHT_HEAD, P::IN_FLIGHT_HEAD, next)) return false;
    return true;
  }

  // At most `cap` copies under way, or `cap_exchanging` while the consumers wait for other blocks.
  KOGC_DEVICE bool copy_stage(const u8* from, int bytes, int cap, int cap_exchanging, const u8* next) {
    if (!wait_empty(next)) return false;
    while (in_flight_ >= (agreed(words<P>().exchanging) ? cap_exchanging : cap)) retire();
    barrier_expect(Ring<P>::full(head_.slot), bytes);
    start_copy(Ring<P>::stage(head_.slot), from, bytes, Ring<P>::full(head_.slot), policy_);
    head_.advance();
    in_flight_++;
    return true;
  }

  // What the step before has added to the cache must be there. It is, unless a whole step fits the ring; then the
  // generation may even end with the producer a step and more ahead.
  KOGC_DEVICE bool wait_written() {
    const u32 needed = where_.step * P::LAYERS;
    Spin spin;
    const auto written = [&] { return agreed((i32)(published(&words<P>().attended) - needed) >= 0); };
    while (!written()) {
      if (agreed(words<P>().finished) && !written()) return false;  // asked again: all copying warps must end at one stage
      spin.step(where_, CACHE_WRITTEN, needed);
    }
    fence_copies();
    return true;
  }

  KOGC_DEVICE bool wait_empty(const u8* next) {
    Barrier* empty = Ring<P>::empty(head_.slot);
    const u32 parity = head_.parity ^ 1;  // a fresh barrier has passed parity 1
    if (agreed(barrier_test(empty, parity))) return true;
    if (ahead_ < next) ahead_ = next;
    long long last = clock_cycles();
    Spin spin;
    while (!agreed(barrier_test(empty, parity))) {  // does not sleep: there is prefetching to do
      if (agreed(words<P>().finished)) return agreed(barrier_test(empty, parity));  // what is asked may have come first
      if (P::PREFETCH && ahead_ < next + P::PREFETCH * P::STAGE_BYTES && ahead_ + P::STAGE_BYTES <= end_ &&
          agreed(clock_cycles() - last >= P::PACE)) {
        prefetch(ahead_, P::STAGE_BYTES);
        ahead_ += P::STAGE_BYTES;
        last += P::PACE;
      }
      spin.step(where_, STAGE_EMPTY, parity);
    }
    return true;
  }

  KOGC_DEVICE void retire() {
    Spin spin;
    while (!agreed(barrier_passed(Ring<P>::full(tail_.slot), tail_.parity))) spin.step(where_, STAGE_FULL, tail_.parity);
    tail_.advance();
    in_flight_--;
  }

  const CachePolicy policy_ = read_once();
  Cursor<P> head_, tail_;
  int in_flight_ = 0;
  const u8* ahead_ = nullptr;  // next byte to fetch into L2
  const u8* const end_;        // of the slab
  Where where_;
};

template <class P> using Stream = Cursor<P>;

// The consumers' side: a warp waits for a stage, and gives it back when it has read it.
template <class P> KOGC_DEVICE void wait_full(const Stream<P>& stream, const Where& where) {
  const typename Trace<P>::Waiting waiting;
  Spin spin;
  while (!all_lanes(barrier_passed(Ring<P>::full(stream.slot), stream.parity))) spin.step(where, STAGE_FULL, stream.parity);
}
template <class P> KOGC_DEVICE void give_back(int slot) {
  sync_warp();
  if (lane() == 0) barrier_arrive(Ring<P>::empty(slot));
}

// The same for the next `stages`, each tested by a lane: one after the other they would cost a round trip each.
template <class P> KOGC_DEVICE void wait_full(const Stream<P>& stream, int stages, const Where& where) {
  const typename Trace<P>::Waiting waiting;
  Stream<P> mine = stream;
  mine.advance(lane() < stages ? lane() : 0);
  Spin spin;
  for (;;) {
    if (all_lanes(lane() >= stages || barrier_test(Ring<P>::full(mine.slot), mine.parity))) return;
    spin.step(where, STAGE_FULL, stream.parity);
  }
}

template <class P> KOGC_DEVICE void give_back(Stream<P>& stream, int stages) {
  Stream<P> mine = stream;
  mine.advance(lane());
  sync_warp();
  if (lane() < stages) barrier_arrive(Ring<P>::empty(mine.slot));
  stream.advance(stages);
}

// After the layer's attention: its new key and value, if they are this block's, may be copied from the cache.
template <class P> KOGC_DEVICE void cache_written(const Where& where) {
  if (thread() == 0) publish(&words<P>().attended, where.step * P::LAYERS + where.layer + 1);
}

// Said by the last warp: the first has results to put, and all wait for it.
template <class P> KOGC_DEVICE void exchange_begins() { if (thread() == THREADS - LANES) words<P>().exchanging = 1; }
template <class P> KOGC_DEVICE void exchange_ends() { if (thread() == THREADS - LANES) words<P>().exchanging = 0; }

}  // namespace kogc
