// A wait that ends: a poll loop calls step() after each miss. When a wait outlasts SPIN_LIMIT the kernel writes down who
// waited for what and stops, and the loader says so: a stalled kernel must never hang a machine.
#pragma once

namespace kogc {

constexpr u64 SPIN_LIMIT = 5000000000ull;  // nanoseconds

struct Where {  // what a report needs to know
  const KernelArgs& args;
  int step, layer;
};

struct Spin {
  u32 polls = 0;
  u64 since = 0;

  KOGC_DEVICE void step(const Where& where, Site site, u32 expected) {
    relax();
    if ((++polls & 0xfff) == 0) give_up_late(where, site, expected);
  }

  KOGC_DEVICE void give_up_late(const Where& where, Site site, u32 expected) {
    const u64 now = nanoseconds();
    if (since == 0) since = now;
    if (now - since < SPIN_LIMIT) return;
    u32* r = where.args.report;
    if (load_host(r) == 0) {
      store_host(r + 1, block());
      store_host(r + 2, thread());
      store_host(r + 3, site);
      store_host(r + 4, where.layer);
      store_host(r + 5, where.step);
      store_host(r + 6, (i32)expected);
      fence_host();
      store_host(r, 1);
      fence_host();
    }
    stop_kernel();
  }
};

}  // namespace kogc
