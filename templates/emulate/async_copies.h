// The copies of cuda/async_copies.cuh on the emulated machine: pieces of 16 bytes arrive late, in any order. A lane's arrival
// that waits for its pieces is an arrival at once at a barrier that also counts their bytes: both must be complete.
#pragma once

namespace kogc {

constexpr int COPIERS = 4 * LANES;
constexpr bool KEYS_AHEAD = false;
KOGC_DEVICE int copier() { return thread() - THREADS; }
KOGC_DEVICE bool agreed(bool v) { return all_lanes(v); }

KOGC_DEVICE void barrier_init_done() {}
KOGC_DEVICE void barrier_expect(Barrier*, int) {}
KOGC_DEVICE bool barrier_passed(Barrier* b, u32 parity) { return barrier_poll(b, parity); }
KOGC_DEVICE void start_copy(void* to, const void* from, int bytes, Barrier* b, CachePolicy policy) {
  for (int at = copier() * 16; at < bytes; at += COPIERS * 16) {
    counting(b)->bytes += 16;
    emulated::start_copy((char*)to + at, (const char*)from + at, 16, counting(b));
  }
  barrier_arrive(b);
}
constexpr int PIECE_COPIERS = LANES;
KOGC_DEVICE void expect_pieces(Barrier*, int) {}
KOGC_DEVICE void copy_pieces(int count, char* to, int stride, const u8* from, int bytes, Barrier* b, CachePolicy policy) {
  count = scalar(count);  // else lanes might part in a loop that broadcasts
  for (int i = 0; i < count && i < LANES; i++) {
    const u8* piece = (const u8*)shuffle_from((u64)from, i);
    for (int at = lane() * 16; at < bytes; at += LANES * 16) {
      counting(b)->bytes += 16;
      emulated::start_copy(to + i * stride + at, piece + at, 16, counting(b));
    }
  }
}
KOGC_DEVICE void end_pieces(Barrier* b) { barrier_arrive(b); }
KOGC_DEVICE void fence_copies() {}
KOGC_DEVICE void fence_stage() {}
KOGC_DEVICE void prefetch(const void* from, int bytes) {
  if ((size_t)from % 16) emulated::violation("a prefetch that is not aligned to 16 bytes");
}

}  // namespace kogc
