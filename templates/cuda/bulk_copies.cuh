// Copies from memory into the ring where one instruction copies a whole stage, and a barrier counts its bytes: from sm_90a on.
#pragma once

namespace kogc {

constexpr int COPIERS = 1;  // lanes of the producer warp that copy
constexpr bool KEYS_AHEAD = true;  // whether registers are left for keys while the query is awaited
KOGC_DEVICE bool agreed(bool v) { return v; }  // what each of them decides

KOGC_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
KOGC_DEVICE void barrier_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
KOGC_DEVICE bool barrier_passed(Barrier* b, u32 parity) {
  u32 ok;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0,1,0,p; }"
               : "=r"(ok) : "r"(shared_address(b)), "r"(parity) : "memory");
  return ok;
}
// To `shared::cta`: where `shared::cluster` might be another block's memory, the compiler for sm_120 calls a function that
// copies there, and with a call in it believes no loop of the producer.
KOGC_DEVICE void start_copy(void* to, const void* from, int bytes, Barrier* b, CachePolicy policy) {
  asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(policy) : "memory");
}
// Copies that the whole producer warp shares: lane i takes piece i, of `count`, from its own `from`.
constexpr int PIECE_COPIERS = 1;  // arrivals of expect_pieces() and end_pieces() together
KOGC_DEVICE void expect_pieces(Barrier* b, int bytes) { if (lane() == 0) barrier_expect(b, bytes); }
KOGC_DEVICE void copy_pieces(int count, char* to, int stride, const u8* from, int bytes, Barrier* b, CachePolicy policy) {
  if (lane() < count) start_copy(to + lane() * stride, from, bytes, b, policy);
}
KOGC_DEVICE void end_pieces(Barrier*) {}
// Between plain stores and bulk copies: out of memory, and into a stage.
KOGC_DEVICE void fence_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
KOGC_DEVICE void fence_stage() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
KOGC_DEVICE void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

}  // namespace kogc
