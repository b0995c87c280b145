// The kernel's own profile: thread 0 of each block notes the clock where a stretch of work or waiting ends. Compiled out
// when P::TRACE is false. kogc/trace.py reads the buffer: [blocks][0: count, then TRACE_EVENTS events].
#pragma once

namespace kogc {

// What ends at a mark.
enum Mark {
  BEGIN, EMBED, QKV_PRODUCTS, QKV_PUT, QUERY, ATTENTION_PRODUCTS, ATTENTION_PUT, ATTENTION_GATHER, O_PRODUCTS, O_PUT, O_GATHER,
  GATE_UP_PRODUCTS, GATE_UP_PUT, HIDDEN_GATHER, DOWN_PRODUCTS, DOWN_PUT, DOWN_GATHER, HEAD_PRODUCTS, HEAD_CHOICE
};

template <class P> struct Trace {
  // An event: 36 bits of clock, 20 bits of cycles spent waiting for weights since the event before, 8 bits of mark.
  static KOGC_DEVICE void mark(const KernelArgs& args, Mark what) {
    if constexpr (P::TRACE) {
      if (thread() != 0 || !args.trace) return;
      u64* events = args.trace + (u64)block() * (1 + P::TRACE_EVENTS);
      const u32 count = words<P>().events, waited = words<P>().waited;
      if (count >= P::TRACE_EVENTS) return;
      words<P>().waited = 0;
      words<P>().events = count + 1;
      events[1 + count] = ((u64)clock_cycles() & ((1ull << 36) - 1)) << 28 | (u64)(waited & 0xfffff) << 8 | what;
      events[0] = count + 1;
    }
  }

  // Time that this block's first thread waits for weights, from the constructor to the destructor.
  struct Waiting {
    long long since = 0;
    KOGC_DEVICE Waiting() {
      if constexpr (P::TRACE) since = clock_cycles();
    }
    KOGC_DEVICE ~Waiting() {
      if constexpr (P::TRACE)
        if (thread() == 0) words<P>().waited += (u32)(clock_cycles() - since);
    }
  };
};

}  // namespace kogc
