// Barriers that count bytes, bulk copies and stores that arrive late, and tensor-core products, in plain C++.
#pragma once
#include "emulate/scheduler.h"

namespace kogc {
namespace emulated {

// --- mbarrier: arrivals and bytes that a phase still waits for -----------------------------------------------------------
struct ByteBarrier {
  word phase : 1, count : 15, pending : 16;
  int bytes;

  void settle() {
    if (pending || bytes) return;
    phase ^= 1;
    pending = count;
    machine->events++;
  }
  void arrive() {
    if (!pending) violation("more arrivals at a barrier than it was initialised for");
    pending--;
    settle();
  }
};
static_assert(sizeof(ByteBarrier) == 8, "the size of the hardware's");

inline bool in_shared(const void* p, int bytes) {
  const char* start = machine->blocks[machine->current->block].shared;
  return (const char*)p >= start && (const char*)p + bytes <= start + machine->shared_bytes;
}

inline void start_copy(void* to, const void* from, int bytes, void* barrier) {
  if (((size_t)to | (size_t)from | (size_t)bytes) % 16) violation("a bulk copy that is not aligned to 16 bytes");
  if (!in_shared(to, bytes) || !in_shared(barrier, 8)) violation("a bulk copy outside of shared memory");
  memset(to, 0xff, bytes);  // whoever still reads the slot, or reads it too soon, finds NaN
  const bool early = machine->random.once_in(2);  // the source may be read at once, or as late as the copy lands
  machine->later.push_back({to, early ? memcpy(malloc(bytes), from, bytes) : from, early, 0, bytes, barrier, 0});
}

inline void complete_copy(const Later& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  if (copy.early) free((void*)copy.from);
  ByteBarrier& b = *(ByteBarrier*)copy.barrier;
  b.bytes -= copy.bytes;
  b.settle();
}

// --- relaxed stores: visible later, in any order but that of one thread to one address -----------------------------------
inline void store_later(void* to, wide value, int bytes) {
  if ((size_t)to % bytes) violation("a store that is not aligned");
  maybe_yield();
  Machine& m = *machine;
  const int fiber = (int)(m.current - m.fibers.data());
  for (size_t i = 0; m.current->stores && i < m.later.size(); i++)
    if (!m.later[i].barrier && m.later[i].to == to && m.later[i].fiber == fiber) {
      perform(i);
      break;
    }
  m.current->stores++;
  m.later.push_back({to, nullptr, false, value, bytes, nullptr, fiber});
  while (m.later.size() > 512) perform_any();
}

inline void flush_stores() {
  Machine& m = *machine;
  const int fiber = (int)(m.current - m.fibers.data());
  for (size_t i = m.later.size(); i-- > 0 && m.current->stores;)
    if (!m.later[i].barrier && m.later[i].fiber == fiber) perform(i);
}

inline void flush_block() {
  Machine& m = *machine;
  for (size_t i = m.later.size(); i-- > 0;)
    if (!m.later[i].barrier && m.fibers[m.later[i].fiber].block == m.current->block) perform(i);
}

// --- instructions in which the lanes of a warp meet ----------------------------------------------------------------------
template <class Work> inline void together(int instruction, int mask, Work work) {
  Warp& w = machine->warp();
  if (w.arrived && (w.instruction != instruction || w.mask != mask)) violation("lanes of a warp meet in different instructions");
  w.instruction = instruction;
  w.mask = mask;
  w.arrived |= machine->bit();
  if (w.arrived != ALL_LANES) return leave();
  work(w);
  w.arrived = 0;
  w.runnable |= ALL_LANES & ~machine->bit();
}

inline void meet(Meeting& at, int expected) {
  Machine& m = *machine;
  at.waiting.push_back(m.current->thread);
  if ((int)at.waiting.size() < expected) return leave();
  for (int t : at.waiting) m.blocks[m.current->block].warps[t / WARP].runnable |= 1ull << t % WARP;
  m.events++;
  at.waiting.clear();
  leave();
}

// c[16][8] += a[16][16] * b[16][8] in the fragment layout of mma.m16n8k16; `number` turns 16 bits into a float.
template <class Number> inline void multiply(Warp& w, Number number) {
  float a[16][16], b[16][8];
  bool used[16] = {};
  for (int lane = 0; lane < 32; lane++) {
    const int row = lane / 4, k = lane % 4 * 2;
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < 2; e++) a[row + i % 2 * 8][k + i / 2 * 8 + e] = number((unsigned short)(w.a[i][lane] >> 16 * e));
    for (int i = 0; i < 2; i++)
      for (int e = 0; e < 2; e++) b[k + i * 8 + e][row] = number((unsigned short)(w.b[i][lane] >> 16 * e));
    used[row] |= (w.a[0][lane] | w.a[2][lane]) != 0;
    used[row + 8] |= (w.a[1][lane] | w.a[3][lane]) != 0;
  }
  for (int row = 0; row < 16; row++) {
    if (!used[row]) continue;
    float sum[8];
    for (int n = 0; n < 8; n++) sum[n] = w.c[row / 8 * 2 + n % 2][row % 8 * 4 + n / 2];
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) sum[n] += a[row][k] * b[k][n];
    for (int n = 0; n < 8; n++) w.c[row / 8 * 2 + n % 2][row % 8 * 4 + n / 2] = sum[n];
  }
}

}  // namespace emulated
}  // namespace kogc
