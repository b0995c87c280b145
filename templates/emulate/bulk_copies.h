// The copies of cuda/bulk_copies.cuh on the emulated machine: a stage arrives as a whole, late, and its bytes are counted.
#pragma once

namespace kogc {

constexpr int COPIERS = 1;
constexpr bool KEYS_AHEAD = true;
KOGC_DEVICE bool agreed(bool v) { return v; }

KOGC_DEVICE void barrier_init_done() {}
KOGC_DEVICE void barrier_expect(Barrier* b, int bytes) {
  counting(b)->bytes += bytes;
  counting(b)->arrive();
}
KOGC_DEVICE bool barrier_passed(Barrier* b, u32 parity) { return barrier_poll(b, parity); }
KOGC_DEVICE void start_copy(void* to, const void* from, int bytes, Barrier* b, CachePolicy policy) {
  emulated::start_copy(to, from, bytes, counting(b));
}
constexpr int PIECE_COPIERS = 1;
KOGC_DEVICE void expect_pieces(Barrier* b, int bytes) { if (lane() == 0) barrier_expect(b, bytes); }
KOGC_DEVICE void copy_pieces(int count, char* to, int stride, const u8* from, int bytes, Barrier* b, CachePolicy policy) {
  if (lane() < count) start_copy(to + lane() * stride, from, bytes, b, policy);
}
KOGC_DEVICE void end_pieces(Barrier*) {}
KOGC_DEVICE void fence_copies() {}
KOGC_DEVICE void fence_stage() {}
KOGC_DEVICE void prefetch(const void* from, int bytes) {
  if (((size_t)from | (size_t)bytes) % 16) emulated::violation("a prefetch that is not aligned to 16 bytes");
}

}  // namespace kogc
