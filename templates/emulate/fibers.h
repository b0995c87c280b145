// Threads of a GPU as fibers of one host thread, in an order drawn from a seed. Blocks run at uneven speeds: some rest for
// a while, so that any block can be far ahead of any other. A fiber gives up control at barriers, at polls that miss, and
// now and then at accesses that other threads can see.
#pragma once
#ifndef KOGC_LANES
#define KOGC_LANES 32  // of a warp
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace kogc {
namespace emulated {

using word = unsigned int;
using wide = unsigned long long;

// --- a switch of stacks --------------------------------------------------------------------------------------------------
#if defined(__x86_64__)
extern "C" void kogc_switch_stack(void** from, void* to);
asm(R"(
.text
.local kogc_switch_stack
kogc_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* top = nullptr;
  void start(char* stack, size_t bytes, void (*entry)()) {
    void** at = (void**)(stack + bytes) - 1;  // a function starts 8 bytes off a multiple of 16
    *--at = (void*)entry;
    for (int i = 0; i < 6; i++) *--at = nullptr;
    top = at;
  }
  void swap(Context& to) { kogc_switch_stack(&top, to.top); }
};
#else
struct Context {
  ucontext_t c;
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack;
    c.uc_stack.ss_size = bytes;
    c.uc_link = nullptr;
    makecontext(&c, entry, 0);
  }
  void swap(Context& to) { swapcontext(&c, &to.c); }
};
#endif

// --- the threads of a launch ---------------------------------------------------------------------------------------------
enum Instruction { NONE, SYNC_WARP, SHUFFLE, BROADCAST, TRANSPOSE, MMA, VOTE };
constexpr int WARP = KOGC_LANES;
constexpr wide ALL_LANES = ~0ull >> (64 - WARP);

struct Warp {
  wide runnable = 0, polling = 0;          // lanes that can run; lanes whose last poll missed
  wide arrived = 0;                        // lanes that wait in `instruction` for the others
  int instruction = NONE, mask = 0;
  wide value[WARP], exchanged[WARP];       // of a shuffle or a vote
  word a[4][WARP], b[4][WARP];             // of a tensor-core product
  float c[256 / WARP][WARP];
};

struct Meeting { std::vector<int> waiting; };  // a barrier of a block: the threads that have arrived

struct Block {
  std::vector<Warp> warps;
  Meeting consumers, all;
  std::vector<char> memory;
  char* shared = nullptr;
};

struct Fiber {
  Context context;
  int block, thread, stores = 0, missed = 0;
};

struct Random {
  wide state;
  word next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (word)(state * 0x2545f4914f6cdd1dull >> 32);
  }
  word below(word n) { return (word)((wide)next() * n >> 32); }
  bool once_in(word n) { return below(n) == 0; }
};

// What the machine does later, in any order: a store that becomes visible, or a bulk copy.
struct Later {
  void* to;
  const void* from;
  bool early;     // `from` is what the source held when the copy was asked for; to be freed
  wide value;
  int bytes;
  void* barrier;  // null: a store of `value`
  int fiber;
};

constexpr size_t STACK_BYTES = 1 << 16;
constexpr int CANARY = 256;  // bytes after a block's shared memory that must stay as they are

struct Machine {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Later> later;
  Random random{1};
  Context scheduler;
  Fiber* current = nullptr;
  int threads = 0, shared_bytes = 0, live = 0;
  wide events = 0, switches = 0;  // events: changes that a poll could be waiting for
  bool stopped = false, stalled = false;
  char message[200] = "";
  void (*body)() = nullptr;

  Warp& warp() { return blocks[current->block].warps[current->thread / WARP]; }
  wide bit() const { return 1ull << current->thread % WARP; }
};

inline Machine* machine = nullptr;

}  // namespace emulated
}  // namespace kogc
