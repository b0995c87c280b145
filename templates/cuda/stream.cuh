// The weight stream: one lane copies this block's slab through a ring of shared-memory stages for ever, across phases,
// layers and tokens; it never waits for an activation. Bytes in flight are capped, because the polls of an exchange
// queue behind them; while the ring is full the stream goes on into L2 at its own pace.
#pragma once

namespace kogc {

template <class P> struct Ring {
  static KOGC_DEVICE char* stage(int slot) { return shared() + P::RING_OFFSET + slot * P::STAGE_BYTES; }
  static KOGC_DEVICE Barrier* full(int slot) { return (Barrier*)(shared() + P::BARRIER_OFFSET) + slot; }
  static KOGC_DEVICE Barrier* empty(int slot) { return full(slot) + P::STAGES; }

  static KOGC_DEVICE void init() {
    if (thread() == 0) {
      for (int i = 0; i < P::STAGES; i++) {
        barrier_init(full(i), 1);
        barrier_init(empty(i), WARPS);
      }
      BlockWords& w = words<P>();
      w.finished = 0;
      w.exchanging = 0;
      w.waited = w.events = 0;
      w.searches = w.level_searches[0] = w.level_searches[1] = w.level_searches[2] = 0;
      barrier_init_done();
    }
    sync_block();
  }
};

// A position in the ring and the parity of its barriers there.
template <class P> struct Cursor {
  int slot = 0;
  u32 parity = 0;

  KOGC_DEVICE void advance() {
    if (++slot == P::STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class P> class Producer {
 public:
  KOGC_DEVICE Producer(const KernelArgs& args, const u8* end) : end_(end), where_{args, 0, 0} {}

  // A step begins: the slab from its start.
  KOGC_DEVICE void rewind(const u8* slab) { ahead_ = slab; }

  // Copies this block's part of a phase and moves `from` past it. False: the consumers have finished the generation.
  KOGC_DEVICE bool copy(const u8*& from, int phase, int step) {
    where_.step = step;
    const Work work = work_of<P>(phase);
    const int cap = phase == HEAD ? P::IN_FLIGHT_HEAD : P::IN_FLIGHT;  // stages
    const u8* end = from + (u32)work.units * (work.unit * work.columns * 2);
    while (from < end) {
      const int bytes = end - from < P::STAGE_BYTES ? (int)(end - from) : P::STAGE_BYTES;
      if (!wait_empty(from)) return false;
      while (in_flight_ >= (words<P>().exchanging ? P::IN_FLIGHT_EXCHANGE : cap)) retire();
      barrier_expect(Ring<P>::full(head_.slot), bytes);
      bulk_copy(Ring<P>::stage(head_.slot), from, bytes, Ring<P>::full(head_.slot), policy_);
      head_.advance();
      in_flight_++;
      from += bytes;
    }
    return true;
  }

  // A block may not leave while copies into its shared memory are under way.
  KOGC_DEVICE void drain() {
    while (in_flight_) retire();
  }

 private:
  KOGC_DEVICE bool wait_empty(const u8* next) {
    Barrier* empty = Ring<P>::empty(head_.slot);
    const u32 parity = head_.parity ^ 1;  // a fresh barrier has passed parity 1
    if (barrier_test(empty, parity)) return true;
    if (ahead_ < next) ahead_ = next;
    long long last = clock_cycles();
    Spin spin;
    while (!barrier_test(empty, parity)) {  // does not sleep: there is prefetching to do
      if (words<P>().finished) return false;
      if (P::PREFETCH && ahead_ < next + P::PREFETCH * P::STAGE_BYTES && ahead_ + P::STAGE_BYTES <= end_ &&
          clock_cycles() - last >= P::PACE) {
        bulk_prefetch(ahead_, P::STAGE_BYTES);
        ahead_ += P::STAGE_BYTES;
        last += P::PACE;
      }
      spin.step(where_, STAGE_EMPTY, parity);
    }
    return true;
  }

  KOGC_DEVICE void retire() {
    Spin spin;
    while (!barrier_passed(Ring<P>::full(tail_.slot), tail_.parity)) spin.step(where_, STAGE_FULL, tail_.parity);
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

template <class P> KOGC_DEVICE void exchange_begins() { if (thread() == 0) words<P>().exchanging = 1; }
template <class P> KOGC_DEVICE void exchange_ends() { if (thread() == 0) words<P>().exchanging = 0; }

}  // namespace kogc
