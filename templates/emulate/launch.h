// Launches of the kernels of a generated source, as a test calls them from Python.
#pragma once

extern "C" void kogc_generate(const kogc::KernelArgs args);
extern "C" __attribute__((weak)) void kogc_prompt(const kogc::KernelArgs args);  // not every plan has one
extern "C" __attribute__((weak)) void kogc_samples(const kogc::SampleArgs args);
extern "C" void kogc_read_ceiling(const void* from, kogc::u64 bytes, kogc::u32* sink);
extern "C" void kogc_fill(kogc::u16* to, kogc::u64 n, kogc::u32 seed, float amplitude, int fp16);

namespace kogc {
namespace emulated {

inline void set_up(Machine& m, int blocks, int threads, int shared_bytes, wide seed, void (*body)()) {
  m.random.state = seed * 0x9e3779b97f4a7c15ull | 1;
  for (int i = 0; i < 8; i++) m.random.next();
  m.threads = threads;
  m.shared_bytes = shared_bytes;
  m.live = blocks * threads;
  m.body = body;
  m.blocks.resize(blocks);
  for (Block& b : m.blocks) {
    b.warps.resize(threads / WARP);
    b.memory.assign(shared_bytes + 128 + CANARY, (char)0xff);  // NaN in every format
    b.shared = (char*)(((size_t)b.memory.data() + 127) / 128 * 128);
    for (Warp& w : b.warps) w.runnable = ALL_LANES;
  }
}

inline char* make_threads(Machine& m) {
  const size_t bytes = (size_t)m.live * STACK_BYTES;
  char* stacks = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return nullptr;
  m.fibers.resize(m.live);
  for (int i = 0; i < m.live; i++) {
    m.fibers[i].block = i / m.threads;
    m.fibers[i].thread = i % m.threads;
    const size_t shift = (size_t)(i % 61) * 192;  // so that the stacks do not share the same cache sets
    m.fibers[i].context.start(stacks + (size_t)i * STACK_BYTES, STACK_BYTES - shift / 64 * 64, thread_main);
  }
  return stacks;
}

inline bool canaries_stand(const Machine& m) {
  for (const Block& b : m.blocks)
    for (int i = 0; i < CANARY; i++)
      if (b.shared[m.shared_bytes + i] != (char)0xff) return false;
  return true;
}

// The status of Scheduler::run(); `message` (of 200 bytes) says what the violation was.
inline int launch(int blocks, int threads, int shared_bytes, wide seed, char* message, void (*body)()) {
  Machine m;
  machine = &m;
  set_up(m, blocks, threads, shared_bytes, seed, body);
  char* stacks = make_threads(m);
  if (!stacks) return -1;
  int status = Scheduler().run();
  if (status == 0 && !canaries_stand(m)) {
    snprintf(m.message, sizeof m.message, "a write past the end of shared memory");
    status = 3;
  }
  memcpy(message, m.message, sizeof m.message);
  munmap(stacks, (size_t)blocks * threads * STACK_BYTES);
  machine = nullptr;
  return status;
}

struct Fill { u16* to; u64 n; u32 seed; float amplitude; int fp16; };
struct Read { const void* from; u64 bytes; u32* sink; };
inline const KernelArgs* generate_args;
inline const SampleArgs* sample_args;
inline Fill fill_args;
inline Read read_args;

}  // namespace emulated
}  // namespace kogc

extern "C" int kogc_emulate(const kogc::KernelArgs* args, int blocks, int threads, int shared_bytes, kogc::u64 seed, char* message) {
  kogc::emulated::generate_args = args;
  return kogc::emulated::launch(blocks, threads, shared_bytes, seed, message, [] { kogc_generate(*kogc::emulated::generate_args); });
}

extern "C" int kogc_emulate_prompt(const kogc::KernelArgs* args, int blocks, int threads, int shared_bytes, kogc::u64 seed, char* message) {
  kogc::emulated::generate_args = args;
  return kogc::emulated::launch(blocks, threads, shared_bytes, seed, message, [] { kogc_prompt(*kogc::emulated::generate_args); });
}

extern "C" int kogc_emulate_samples(const kogc::SampleArgs* args, int blocks, int threads, int shared_bytes, kogc::u64 seed, char* message) {
  kogc::emulated::sample_args = args;
  return kogc::emulated::launch(blocks, threads, shared_bytes, seed, message, [] { kogc_samples(*kogc::emulated::sample_args); });
}

extern "C" int kogc_emulate_fill(kogc::u16* to, kogc::u64 n, kogc::u32 seed, float amplitude, int fp16, char* message) {
  kogc::emulated::fill_args = {to, n, seed, amplitude, fp16};
  return kogc::emulated::launch(3, 64, 0, 1, message, [] {
    const kogc::emulated::Fill& f = kogc::emulated::fill_args;
    kogc_fill(f.to, f.n, f.seed, f.amplitude, f.fp16);
  });
}

extern "C" int kogc_emulate_read(const void* from, kogc::u64 bytes, kogc::u32* sink, int blocks, int threads, int shared_bytes, char* message) {
  kogc::emulated::read_args = {from, bytes, sink};
  return kogc::emulated::launch(blocks, threads, shared_bytes, 1, message, [] {
    const kogc::emulated::Read& r = kogc::emulated::read_args;
    kogc_read_ceiling(r.from, r.bytes, r.sink);
  });
}
