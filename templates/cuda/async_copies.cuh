// Copies from memory into the ring where a lane copies 16 bytes at a time, from sm_80 on: all lanes of four producer warps
// share a stage, and each arrives at its barrier when what it has copied is there.
#pragma once

namespace kogc {

constexpr int COPIERS = 4 * LANES;  // one warp alone would issue copies for two thirds of the bandwidth
constexpr bool KEYS_AHEAD = false;  // whether registers are left for keys while the query is awaited
KOGC_DEVICE int copier() { return thread() - THREADS; }
// What the lanes of a warp see alike: whoever waits, leaves or goes on does so with the whole warp. The warps are by
// themselves: each copies its part of every stage.
KOGC_DEVICE bool agreed(bool v) { return __all_sync(~0u, v); }

KOGC_DEVICE void barrier_init_done() {}  // the barrier of the block that follows is enough
KOGC_DEVICE void barrier_expect(Barrier*, int) {}  // each copier's arrival is expected in every phase
KOGC_DEVICE bool barrier_passed(Barrier* b, u32 parity) { return barrier_test(b, parity); }
KOGC_DEVICE void copy_16(u32 to, const void* from, CachePolicy policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}
KOGC_DEVICE void end_pieces(Barrier* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}
KOGC_DEVICE void start_copy(void* to, const void* from, int bytes, Barrier* b, CachePolicy policy) {
  const u32 target = shared_address(to);
  for (int at = copier() * 16; at < bytes; at += COPIERS * 16) copy_16(target + at, (const char*)from + at, policy);
  end_pieces(b);
}
// Copies of several pieces, piece i from the `from` of lane i: all lanes share each.
constexpr int PIECE_COPIERS = LANES;  // arrivals of expect_pieces() and end_pieces() together
KOGC_DEVICE void expect_pieces(Barrier*, int) {}
KOGC_DEVICE void copy_pieces(int count, char* to, int stride, const u8* from, int bytes, Barrier* b, CachePolicy policy) {
  count = scalar(count);  // else lanes might part in a loop that broadcasts
  for (int i = 0; i < count && i < LANES; i++) {
    const u8* piece = (const u8*)shuffle_from((u64)from, i);
    for (int at = lane() * 16; at < bytes; at += LANES * 16) copy_16(shared_address(to + i * stride) + at, piece + at, policy);
  }
}
KOGC_DEVICE void fence_copies() {}  // these copies are ordered as loads and stores are
KOGC_DEVICE void fence_stage() {}
KOGC_DEVICE void prefetch(const void* from, int bytes) {
  for (int at = copier() * 128; at < bytes; at += COPIERS * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)from + at) : "memory");
}

}  // namespace kogc
