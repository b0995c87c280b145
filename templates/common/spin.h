// A wait that ends: a poll loop calls step() after each miss. When a wait outlasts SPIN_LIMIT the kernel writes down who
// waited for what and stops, and the loader says so: a stalled kernel must never hang a machine.
#pragma once

namespace kogc {

constexpr u64 SPIN_LIMIT = 5000000000ull;  // nanoseconds

struct Where {  // what a report needs to know
  const KernelArgs& args;
  int step, layer;
};

#ifndef KOGC_NORETURN
#define KOGC_NORETURN [[noreturn]]
#endif

// Out of line: waits are everywhere, and what they hardly ever do must not fill the instruction cache.
KOGC_NORETURN KOGC_COLD void give_up(const KernelArgs& args, Site site, int layer, int step, u32 expected) {
  u32* r = args.report;
  if (load_host(r) == 0) {
    store_host(r + 1, block());
    store_host(r + 2, thread());
    store_host(r + 3, site);
    store_host(r + 4, layer);
    store_host(r + 5, step);
    store_host(r + 6, (i32)expected);
    fence_host();
    store_host(r, 1);
    fence_host();
  }
  stop_kernel();
}

struct Spin {
  u32 polls = 0;
  u64 since = 0;

  KOGC_DEVICE void step(const Where& where, Site site, u32 expected) {
    relax();
    if ((++polls & 0xfff) != 0) return;
    const u64 now = nanoseconds();
    if (since == 0) since = now;
    if (now - since > SPIN_LIMIT) give_up(where.args, site, where.layer, where.step, expected);
  }
};

}  // namespace kogc
