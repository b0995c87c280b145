// The functions of a CPU library: the generation itself, and two helpers of the loader (dummy weights, read ceiling).
#pragma once

namespace kogc {

constexpr int MAX_THREADS = 1024;

// Work for `count` threads: work(task) on each, with its index.
struct Team;
struct Task { Team* team; int index; };
struct Team {
  void (*work)(const Task&);
  const void* context;
  int count;
  u64 stack;      // bytes of a thread's stack
  int ended = 0;  // an Ending

  static void* body(void* task) {
    const Task& t = *(const Task*)task;
    t.team->work(t);
    return nullptr;
  }

  // Runs all and waits for them.
  void run() {
    Task tasks[MAX_THREADS];
    pthread_t threads[MAX_THREADS];
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack);
    cpu_set_t mine;
    // A thread for every processor: each has its own. Fewer may move, as other programs want processors too.
    const bool pin = !sched_getaffinity(0, sizeof mine, &mine) && CPU_COUNT(&mine) == count;
    int started = 0;
    for (int cpu = 0; started < count && started < MAX_THREADS; started++, cpu++) {
      if (pin) {
        while (!CPU_ISSET(cpu, &mine)) cpu++;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_attr_setaffinity_np(&attributes, sizeof one, &one);
      }
      tasks[started] = {this, started};
      if (pthread_create(&threads[started], &attributes, body, &tasks[started])) break;
    }
    pthread_attr_destroy(&attributes);
    if (started < count) __atomic_store_n(&ended, (int)NO_THREADS, __ATOMIC_RELAXED);
    for (int i = 0; i < started; i++) pthread_join(threads[i], nullptr);
  }
};

// --- generation ------------------------------------------------------------------------------------------------------
// One block's part, to the end of the generation, or of the passes over a prompt. Not inlined: what calls setjmp is not optimised.
template <class P>
inline __attribute__((noinline)) void generate_block(const KernelArgs& args) {
  init_words<P>();
  Stream<P> stream;
  Decoder<P> decoder(args, stream);
  const int steps = Generation<P>::steps(args);
  for (int step = 0; step < steps; step += P::TOKENS) {
    if (block() == 0 && load_host(args.stop_word)) leave(STOPPED);  // also between the tokens or passes of a prompt
    stream.rewind(args.slabs);
    if (!decoder.step(step)) break;
  }
}

template <class P> inline void enter_block(const Task& task) {
  alignas(128) char memory[P::SHARED_BYTES] = {};
  jmp_buf way_out;
  self = {task.index, task.team->count, memory, &task.team->ended, &way_out, 0, nullptr, nullptr};
  if (setjmp(way_out) == 0) generate_block<P>(*(const KernelArgs*)task.team->context);
}

// 0: the generation has ended or the host has stopped it; else an Ending, and a stall has filled the report.
template <class P> inline int generate(const KernelArgs& args) {
  constexpr u64 STACK = P::SHARED_BYTES + sizeof(Decoder<P>) + sizeof(AttentionCore<P>) + P::HIDDEN * 16 + (1 << 20);
  Team team = {enter_block<P>, &args, P::BLOCKS, STACK};
  team.run();
  return team.ended == STOPPED ? FINISHED : team.ended;
}

// --- dummy weights ---------------------------------------------------------------------------------------------------
struct Fill {
  u16* to;
  u64 n;
  u32 seed;
  float amplitude;

  // to[i] = uniform in (-amplitude, amplitude)
  template <bool FP16> static void work(const Task& task) {
    const Fill f = *(const Fill*)task.team->context;
    const u64 end = f.n * (task.index + 1) / task.team->count;
    for (u64 i = f.n * task.index / task.team->count; i < end; i++) {
      const float v = uniform(f.seed, i) * f.amplitude;
      f.to[i] = from_float<FP16>(v);
    }
  }
};

inline int processors() {
  cpu_set_t mine;
  return sched_getaffinity(0, sizeof mine, &mine) ? 1 : CPU_COUNT(&mine);
}

inline void fill(u16* to, u64 n, u32 seed, float amplitude, int fp16) {
  const Fill f = {to, n, seed, amplitude};
  Team team = {fp16 ? Fill::work<true> : Fill::work<false>, &f, processors(), 1 << 20};
  team.run();
}

// --- read ceiling ----------------------------------------------------------------------------------------------------
struct Read {
  const u8* from;
  u64 bytes;
  u32* sink;

  static void work(const Task& task) {
    constexpr int VECTORS = 8, STEP = VECTORS * sizeof(Vector);
    const Read r = *(const Read*)task.team->context;
    const u64 share = r.bytes / task.team->count / STEP * STEP;
    const u8* at = r.from + share * task.index;
    Vector seen[VECTORS];
    for (int v = 0; v < VECTORS; v++) seen[v] = zero();
    for (const u8* const end = at + share; at < end; at += STEP) {
      for (int line = 0; line < STEP; line += 64) prefetch(at + AHEAD + line);
      KOGC_UNROLL_ALL for (int v = 0; v < VECTORS; v++) seen[v] = bits_or(seen[v], load((const float*)at + v * VECTOR));
    }
    __m256 sums = sums_of(seen);
    if (as_word(_mm256_cvtss_f32(sums)) == 0x9e3779b9u) *r.sink = 1;  // hardly ever, but the reads must be kept
  }
};

// Reads `bytes` once, each thread its share one after the other, with nothing to wait for.
inline void read_ceiling(const void* from, u64 bytes, int threads) {
  u32 sink = 0;
  const Read r = {(const u8*)from, bytes, &sink};
  Team team = {Read::work, &r, threads, 1 << 20};
  team.run();
}

}  // namespace kogc
