// Runs the fibers of a launch until all have returned, one stops the kernel, or none can go on.
#pragma once
#include "emulate/fibers.h"

namespace kogc {
namespace emulated {

inline void leave() { machine->current->context.swap(machine->scheduler); }

// This thread can go on; others may come first.
inline void yield() {
  machine->warp().runnable |= machine->bit();
  leave();
}

// This thread waits for something to change.
inline void miss() {
  if (machine->stalled) return;  // it alone runs, until its patience ends
  machine->warp().polling |= machine->bit();
  leave();
}

inline void maybe_yield() {
  if (machine->random.once_in(16)) yield();
}

// The kernel or the machine is used as the hardware does not allow.
[[noreturn]] inline void violation(const char* what) {
  snprintf(machine->message, sizeof machine->message, "%s (block %d, thread %d)", what, machine->current->block, machine->current->thread);
  machine->stopped = true;
  for (;;) leave();
}

void complete_copy(const Later& copy);  // memory.h

inline void perform(size_t i) {
  const Later op = machine->later[i];
  machine->later[i] = machine->later.back();
  machine->later.pop_back();
  machine->events++;
  if (op.barrier) return complete_copy(op);
  memcpy(op.to, &op.value, op.bytes);
  machine->fibers[op.fiber].stores--;
}

inline void perform_any() { perform(machine->random.below((word)machine->later.size())); }

inline void thread_main() {
  machine->body();
  machine->live--;
  machine->events++;
  for (;;) leave();
}

class Scheduler {
 public:
  // 0: every thread returned. 1: the kernel stopped itself. 2: threads wait at a barrier for ever. 3: a violation.
  int run() {
    Machine& m = *machine;
    while (m.live && !m.stopped) {
      while (!m.later.empty() && m.random.once_in(2)) perform_any();
      if (!m.stalled && m.random.once_in(8)) wake(m.random.below((word)warps()));
      if (m.random.once_in(1000)) rest();
      const int warp = pick();
      if (warp >= 0) run_warp(warp);
      else if (!m.later.empty()) perform_any();
      else if (m.events != woken_ || !calm_) wake_all();
      else if (!give_up()) return 2;
    }
    while (!m.stopped && !m.later.empty()) perform_any();
    return !m.stopped ? 0 : m.message[0] ? 3 : 1;
  }

 private:
  static int per_block() { return machine->threads / WARP; }
  static int warps() { return (int)machine->blocks.size() * per_block(); }
  static Warp& warp(int i) { return machine->blocks[i / per_block()].warps[i % per_block()]; }

  static void wake(int i) {
    warp(i).runnable |= warp(i).polling;
    warp(i).polling = 0;
  }
  // Once more than things have changed: a warp that polls together may have mixed what its lanes saw before and after.
  void wake_all() {
    calm_ = woken_ == machine->events;
    woken_ = machine->events;
    for (int i = 0; i < warps(); i++) wake(i);
  }

  // Half of the blocks stand still for a while, or none does.
  void rest() {
    resting_.assign(machine->blocks.size(), 0);
    if (machine->random.once_in(3)) return;
    for (auto& r : resting_) r = machine->random.once_in(2);
  }

  int pick() {
    const int n = warps(), start = (int)machine->random.below((word)n);
    for (int awake = 1; awake >= 0; awake--)
      for (int i = 0; i < n; i++) {
        const int w = start + i < n ? start + i : start + i - n;
        if (warp(w).runnable && !(awake && !resting_.empty() && resting_[w / per_block()])) return w;
      }
    return -1;
  }

  static void resume(int i, int lane) {
    Machine& m = *machine;
    warp(i).runnable &= ~(1ull << lane);
    m.switches++;
    m.current = &m.fibers[i * WARP + lane];
    m.scheduler.swap(m.current->context);
  }

  static void run_warp(int i) {
    word first = machine->random.next() % WARP;
    for (word left = 1 + machine->random.below(256); left && warp(i).runnable && !machine->stopped; left--) {
      const wide r = warp(i).runnable, turned = first ? r >> first | r << (WARP - first) : r;
      const word lane = (first + __builtin_ctzll(turned)) % WARP;
      resume(i, (int)lane);
      first = (lane + 1) % WARP;
    }
  }

  // Nothing can change any more: a poller runs on (with its warp, if that polls together) until its own patience ends and
  // it stops the kernel.
  static bool give_up() {
    machine->stalled = true;
    for (int i = 0; i < warps(); i++)
      if (const wide polling = warp(i).polling) {
        const int lane = __builtin_ctzll(polling);
        warp(i).polling &= ~(1ull << lane);  // it may go on to meet the others of its warp
        resume(i, lane);
        return true;
      }
    return false;
  }

  wide woken_ = 0;
  bool calm_ = false;
  std::vector<char> resting_;
};

}  // namespace emulated
}  // namespace kogc
