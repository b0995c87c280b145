// What the common code asks of the hardware, on any machine with a C++ compiler: a stand-in for cuda/machine.cuh, as
// bulk_copies.h and async_copies.h are for theirs, so that the source of a CUDA kernel also runs without a GPU (slowly, and in
// more orders than a GPU would ever show).
#pragma once
#define KOGC_COLD static __attribute__((noinline))
#define KOGC_DEVICE inline
#define KOGC_KERNEL extern "C"
#define KOGC_UNROLL
#define KOGC_BOUNDS(threads)
#define KOGC_PARAMETER const

#include "common/args.h"
#include "emulate/memory.h"
#include "emulate/numbers.h"


namespace kogc {

constexpr int LANES = emulated::WARP, WARPS = 8, THREADS = LANES * WARPS;
constexpr int PRODUCER = WARPS;  // the warp that issues the copies

using emulated::machine;

template <class T> KOGC_DEVICE T opaque(T v) { return v; }
KOGC_DEVICE int thread() { return machine->current->thread; }
KOGC_DEVICE int lane() { return thread() % LANES; }
KOGC_DEVICE int warp() { return thread() / LANES; }
KOGC_DEVICE int block() { return machine->current->block; }
KOGC_DEVICE int block_count() { return (int)machine->blocks.size(); }
KOGC_DEVICE int block_threads() { return machine->threads; }
KOGC_DEVICE char* shared() { return machine->blocks[block()].shared; }

// --- barriers and shuffles -------------------------------------------------------------------------------------------
KOGC_DEVICE void sync() { emulated::meet(machine->blocks[block()].consumers, THREADS); }
KOGC_DEVICE void sync_block() { emulated::meet(machine->blocks[block()].all, machine->threads); }
KOGC_DEVICE void sync_warp() { emulated::together(emulated::SYNC_WARP, 0, [](emulated::Warp&) {}); }
template <class T> KOGC_DEVICE T shuffle_xor(T v, int mask) {
  emulated::Warp& w = machine->warp();
  const int self = lane();
  w.value[self] = 0;
  memcpy(&w.value[self], &v, sizeof v);
  emulated::together(emulated::SHUFFLE, mask, [mask](emulated::Warp& all) {
    for (int i = 0; i < LANES; i++) all.exchanged[i] = all.value[i ^ mask];
  });
  memcpy(&v, &w.exchanged[self], sizeof v);
  return v;
}
template <class T> KOGC_DEVICE T shuffle_from(T v, int source) {
  emulated::Warp& w = machine->warp();
  const int self = lane();
  w.value[self] = 0;
  memcpy(&w.value[self], &v, sizeof v);
  emulated::together(emulated::BROADCAST, source, [source](emulated::Warp& all) {
    for (int i = 0; i < LANES; i++) all.exchanged[i] = all.value[source];
  });
  memcpy(&v, &w.exchanged[self], sizeof v);
  return v;
}
KOGC_DEVICE bool all_lanes(bool v) {
  emulated::Warp& w = machine->warp();
  w.value[lane()] = v;
  emulated::together(emulated::VOTE, 0, [](emulated::Warp& all) {
    bool every = true;
    for (int i = 0; i < LANES; i++) every &= all.value[i] != 0;
    for (int i = 0; i < LANES; i++) all.exchanged[i] = every;
  });
  return w.exchanged[lane()] != 0;
}
KOGC_DEVICE int scalar(int v) {  // the hardware takes one lane's value for all
  emulated::Warp& w = machine->warp();
  w.value[lane()] = (u32)v;
  emulated::together(emulated::VOTE, 0, [](emulated::Warp& all) {
    for (int i = 1; i < LANES; i++)
      if (all.value[i] != all.value[0]) emulated::violation("a scalar that is not the same on all lanes");
  });
  return v;
}
template <class T> KOGC_DEVICE T* global(T* p) {
  if (emulated::in_shared(p, 1)) emulated::violation("a pointer into memory that points into shared memory");
  return p;
}
template <class T> KOGC_DEVICE T* opaque(T* p) { return p; }
KOGC_DEVICE void add_shared(u64* p, u64 v) {
  if (!emulated::in_shared(p, 8)) emulated::violation("an addition outside of shared memory");
  emulated::maybe_yield();
  *p += v;  // seen by other threads as a whole, which two additions on a GPU are not: they read it after a barrier
}
KOGC_DEVICE u32 take_place(u32* count) {
  if (!emulated::in_shared(count, 4)) emulated::violation("a count outside of shared memory");
  emulated::maybe_yield();
  return (*count)++;
}

// --- words that carry their own readiness: relaxed, device scope -----------------------------------------------------
struct alignas(16) Words { u32 x, y, z, w; };

KOGC_DEVICE void store_word(void* p, u32 v) { emulated::store_later(p, v, 4); }
KOGC_DEVICE void store_words(void* p, Words v) {
  if ((size_t)p % 16) emulated::violation("a vector store that is not aligned");
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; i++) store_word((u32*)p + i, words[i]);
}
KOGC_DEVICE void store_key(void* p, u64 v) { emulated::store_later(p, v, 8); }
template <class T> T load_relaxed(const void* p) {
  if ((size_t)p % sizeof(T)) emulated::violation("a load that is not aligned");
  emulated::maybe_yield();
  return *(const volatile T*)p;
}
KOGC_DEVICE u32 load_word(const void* p) { return load_relaxed<u32>(p); }
KOGC_DEVICE u64 load_key(const void* p) { return load_relaxed<u64>(p); }
KOGC_DEVICE Words load_words(const void* p) {  // only its words are atomic
  if ((size_t)p % 16) emulated::violation("a vector load that is not aligned");
  const u32* w = (const u32*)p;
  const u32 x = load_word(w), y = load_word(w + 1), z = load_word(w + 2);
  return {x, y, z, load_word(w + 3)};
}
KOGC_DEVICE void load_word_if(bool wanted, u32& v, const void* p) { if (wanted) v = load_word(p); }
KOGC_DEVICE void load_words_if(bool wanted, Words& v, const void* p) { if (wanted) v = load_words(p); }
KOGC_DEVICE void add_word(u32* p, u32 v) {
  emulated::maybe_yield();
  *(volatile u32*)p += v;
  machine->events++;
}
KOGC_DEVICE void add_released(u32* p, u32 v) {  // after a barrier of the block: what any of its threads has stored is seen
  emulated::flush_block();
  add_word(p, v);
}
KOGC_DEVICE u32 load_acquired(const u32* p) { return load_relaxed<u32>(p); }
KOGC_DEVICE void store_host(void* p, i32 v) { *(volatile i32*)p = v; }
KOGC_DEVICE i32 load_host(const void* p) { return load_relaxed<i32>(p); }

KOGC_DEVICE void publish(u32* p, u32 v) {
  emulated::maybe_yield();
  *(volatile u32*)p = v;
  machine->events++;
}
KOGC_DEVICE u32 published(u32* p) {
  emulated::maybe_yield();
  return *(volatile u32*)p;
}

// --- tensor cores: c[16][8] += a[16][16] * b[16][8] ------------------------------------------------------------------------
template <bool FP16> KOGC_DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  emulated::Warp& w = machine->warp();
  const int self = lane();
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  for (int i = 0; i < 4; i++) w.a[i][self] = a[i];
  for (int i = 0; i < 2; i++) w.b[i][self] = b[i];
  for (int i = 0; i < 4; i++) w.c[i][self] = c[i];
  emulated::together(emulated::MMA, FP16, [](emulated::Warp& all) {
    emulated::multiply(all, [](u16 v) { return FP16 ? half_to_float(v) : bf16_to_float(v); });
  });
  for (int i = 0; i < 4; i++) c[i] = w.c[i][self];
}

KOGC_DEVICE u32 transpose8x8(u32 v) {
  emulated::Warp& w = machine->warp();
  const int self = lane();
  w.value[self] = v;
  emulated::together(emulated::TRANSPOSE, 0, [](emulated::Warp& all) {
    const auto element = [&](int row, int column) { return all.value[row * 4 + column / 2] >> column % 2 * 16 & 0xffff; };
    for (int i = 0; i < LANES; i++) all.exchanged[i] = element(i % 4 * 2, i / 4) | element(i % 4 * 2 + 1, i / 4) << 16;
  });
  return (u32)w.exchanged[self];
}

// --- barriers in shared memory that count arrivals; what they wait for besides, and how: *_copies.h -------------------------
using Barrier = u64;
KOGC_DEVICE emulated::ByteBarrier* counting(Barrier* b) {
  if (!emulated::in_shared(b, 8) || (size_t)b % 8) emulated::violation("a barrier outside of shared memory");
  return (emulated::ByteBarrier*)b;
}
KOGC_DEVICE void barrier_init(Barrier* b, int arrivals) { *counting(b) = {0, (u32)arrivals & 0x7fff, (u32)arrivals & 0xffff, 0}; }
KOGC_DEVICE void barrier_arrive(Barrier* b) {
  emulated::maybe_yield();
  counting(b)->arrive();
}
KOGC_DEVICE bool barrier_test(Barrier* b, u32 parity) {
  emulated::maybe_yield();
  return counting(b)->phase != parity;
}
KOGC_DEVICE bool barrier_poll(Barrier* b, u32 parity) {
  const bool passed = barrier_test(b, parity);
  int& missed = machine->current->missed;
  if (passed) missed = 0;
  else if (++missed > 1) emulated::miss();  // a loop that does not call relax()
  return passed;
}
using CachePolicy = u64;
KOGC_DEVICE CachePolicy read_once() { return 0; }
KOGC_DEVICE CachePolicy read_again() { return 0; }

// --- time, and the end of patience -----------------------------------------------------------------------------------------
KOGC_DEVICE long long clock_cycles() { return (long long)(machine->switches * 64); }
KOGC_DEVICE u64 nanoseconds() {  // passes only with work done, and by leaps once nothing can happen any more
  if (machine->stalled) machine->switches += 6000000000ull;
  return 1 + machine->switches;
}
KOGC_DEVICE void fence_host() { emulated::flush_stores(); }
[[noreturn]] KOGC_DEVICE void stop_kernel() {
  machine->stopped = true;
  for (;;) emulated::leave();
}
KOGC_DEVICE void relax() {
  machine->current->missed = 0;
  emulated::miss();
}

}  // namespace kogc

#include "emulate/launch.h"
