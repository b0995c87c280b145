// What the common code asks of the hardware, on AMD GPUs: CDNA3 and CDNA4 with waves of 64 lanes, RDNA4 with waves of 32.
// Only the compiler's own builtins are used: they take the place of HIP's headers, so that no ROCm is needed to compile.
// emulate/hip_machine.h has a plain C++ body for each.
#pragma once
#define KOGC_GLOBAL __attribute__((address_space(1)))
#include "common/args.h"

#define KOGC_DEVICE __attribute__((device, always_inline)) inline
#define KOGC_COLD static KOGC_DEVICE  // a call would keep registers in memory
#define KOGC_NORETURN  // a way out of the kernel from within a loop would take scalar registers in all loops around it
#define KOGC_KERNEL extern "C" __attribute__((global))
#define KOGC_UNROLL _Pragma("unroll")
#define KOGC_BOUNDS(threads) __attribute__((amdgpu_flat_work_group_size(threads, threads)))

namespace kogc {

#if defined(__GFX9__)
constexpr int LANES = 64, XCDS = 8;
#else
constexpr int LANES = 32, XCDS = 1;
#endif
constexpr int WARPS = 8, THREADS = LANES * WARPS;  // all load weights, all multiply: there is no producer

// --- who this is -----------------------------------------------------------------------------------------------------
// A value that is the same on every lane, in a scalar register: what branches on it does not touch the lanes' mask.
KOGC_DEVICE int scalar(int v) { return __builtin_amdgcn_readfirstlane(v); }
template <class T> KOGC_DEVICE T opaque(T v) { return v; }  // there are registers enough
// Hidden is only that it is the same in every layer: the addresses of all phases would be computed before the layer loop.
KOGC_DEVICE int thread() {
  int v = (int)__builtin_amdgcn_workitem_id_x();
  asm volatile("" : "+v"(v));
  __builtin_assume(v >= 0 && v < THREADS);
  return v;
}
KOGC_DEVICE int lane() { return thread() % LANES; }
KOGC_DEVICE int warp() { return scalar(thread() / LANES); }

struct Launch { u32 blocks_x, blocks_y, blocks_z; u16 threads_x; };  // as code object version 5 lays it out
KOGC_DEVICE const Launch& launch() { return *(const Launch*)__builtin_amdgcn_implicitarg_ptr(); }
KOGC_DEVICE int block_count() { return (int)launch().blocks_x; }
KOGC_DEVICE int block_threads() { return launch().threads_x; }

// Workgroups are dealt to the XCDs, each with an L2 cache of its own, in turns. Numbered XCD by XCD, neighbours share one:
// a head's queries are mostly computed where they are read, and the splits of an attention unit lie together.
KOGC_DEVICE int block() {
  int id = (int)__builtin_amdgcn_workgroup_id_x();
  asm volatile("" : "+s"(id));
  const int count = block_count();
  return count % XCDS ? id : id % XCDS * (count / XCDS) + id / XCDS;
}

template <class T> KOGC_DEVICE T* global(T* p) { return p; }
KOGC_DEVICE char* shared() {
  extern __attribute__((shared, aligned(128))) char memory[];
  return memory;
}

// The arguments where the launch has put them: taken from a parameter they would be copied to memory of the lane.
KOGC_DEVICE const KernelArgs& arguments(const KernelArgs& args) { return *(const KernelArgs*)__builtin_amdgcn_kernarg_segment_ptr(); }

// --- barriers and shuffles -------------------------------------------------------------------------------------------
// A block's waves are on one compute unit, whose caches see their accesses in order: weights on their way are not awaited.
KOGC_DEVICE void sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

template <class T> struct WordsOf { u32 w[(sizeof(T) + 3) / 4]; };
template <class T> KOGC_DEVICE T shuffle_xor(T v, int mask) {
  WordsOf<T> words = __builtin_bit_cast(WordsOf<T>, v);
  for (u32& w : words.w) w = (u32)__builtin_amdgcn_ds_bpermute((lane() ^ mask) * 4, (int)w);
  return __builtin_bit_cast(T, words);
}

KOGC_DEVICE bool all_lanes(bool v) { return __builtin_amdgcn_ballot_w64(!v) == 0; }  // of those that take part

// The value of the lane whose number differs in one bit, 1, 2 or 8, as part of an instruction: without a way through LDS.
template <int BIT> KOGC_DEVICE float neighbour(float v) {
  constexpr int CONTROL = BIT == 1 ? 0xb1 : BIT == 2 ? 0x4e : 0x128;  // quads 1 0 3 2; quads 2 3 0 1; rotate sixteen by eight
  static_assert(BIT == 1 || BIT == 2 || BIT == 8);
  return __builtin_bit_cast(float, __builtin_amdgcn_mov_dpp(__builtin_bit_cast(int, v), CONTROL, 0xf, 0xf, true));
}

KOGC_DEVICE void add_shared(u64* p, u64 v) { __hip_atomic_fetch_add(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP); }
KOGC_DEVICE u32 take_place(u32* count) {  // how many came before
  return __hip_atomic_fetch_add(count, 1u, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}

// --- words that carry their own readiness: relaxed, agent scope ------------------------------------------------------
// The scope is in each instruction (sc1, SCOPE_DEV): it passes by the caches that other XCDs do not see, and only for this
// word. A fence of that scope would write back and invalidate a whole L2 cache. 64 bits are the widest atomic access.
struct alignas(16) Words { u32 x, y, z, w; };

template <class T> KOGC_DEVICE void store_agent(void* p, T v) { __hip_atomic_store((T*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT); }
template <class T> KOGC_DEVICE T load_agent(const void* p) { return __hip_atomic_load((const T*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT); }

KOGC_DEVICE void store_word(void* p, u32 v) { store_agent(p, v); }
KOGC_DEVICE void store_key(void* p, u64 v) { store_agent(p, v); }
KOGC_DEVICE void store_words(void* p, Words v) {
  store_agent((u64*)p, (u64)v.y << 32 | v.x);
  store_agent((u64*)p + 1, (u64)v.w << 32 | v.z);
}
KOGC_DEVICE u32 load_word(const void* p) { return load_agent<u32>(p); }
KOGC_DEVICE u64 load_key(const void* p) { return load_agent<u64>(p); }
KOGC_DEVICE Words load_words(const void* p) {
  const u64 low = load_agent<u64>(p), high = load_agent<u64>((const u64*)p + 1);
  return {(u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32)};
}
KOGC_DEVICE void load_word_if(bool wanted, u32& v, const void* p) { if (wanted) v = load_word(p); }
KOGC_DEVICE void load_words_if(bool wanted, Words& v, const void* p) { if (wanted) v = load_words(p); }
KOGC_DEVICE void store_host(void* p, i32 v) { __hip_atomic_store((i32*)p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM); }
KOGC_DEVICE i32 load_host(const void* p) { return __hip_atomic_load((const i32*)p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM); }
KOGC_DEVICE void fence_host() { __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, ""); }

// --- weights ---------------------------------------------------------------------------------------------------------
typedef u32 FourWords __attribute__((ext_vector_type(4)));

// 16 bytes that are read once a token: they leave the caches first, so that exchanges, norms and the KV cache may stay.
KOGC_DEVICE Words load_once(const u8* from, u32 offset) {
  const auto* p = (const __attribute__((address_space(1))) FourWords*)(from + offset);
  return __builtin_bit_cast(Words, __builtin_nontemporal_load(p));
}
// Nothing is moved across: loads stay where they are issued.
KOGC_DEVICE void keep_order() { __builtin_amdgcn_sched_barrier(0); }

// --- numbers ---------------------------------------------------------------------------------------------------------
KOGC_DEVICE float as_float(u32 v) { return __builtin_bit_cast(float, v); }
KOGC_DEVICE u32 as_word(float v) { return __builtin_bit_cast(u32, v); }
KOGC_DEVICE float bf16_to_float(u16 v) { return as_float((u32)v << 16); }
KOGC_DEVICE float half_to_float(u16 v) { return (float)__builtin_bit_cast(_Float16, v); }
KOGC_DEVICE u16 float_to_bf16(float v) { return __builtin_bit_cast(u16, (__bf16)v); }
KOGC_DEVICE u32 floats_to_bf16(float low, float high) { return (u32)float_to_bf16(low) | (u32)float_to_bf16(high) << 16; }
KOGC_DEVICE u16 float_to_half(float v) { return __builtin_bit_cast(u16, (_Float16)v); }
KOGC_DEVICE float exp2_fast(float v) { return __builtin_amdgcn_exp2f(v); }
KOGC_DEVICE float reciprocal(float v) { return __builtin_amdgcn_rcpf(v); }
KOGC_DEVICE float reciprocal_sqrt(float v) { return __builtin_amdgcn_rsqf(v); }
KOGC_DEVICE float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }

// --- time, and the end of patience -----------------------------------------------------------------------------------
KOGC_DEVICE long long clock_cycles() { return (long long)__builtin_readcyclecounter(); }
KOGC_DEVICE u64 nanoseconds() { return __builtin_readsteadycounter() * 10; }  // a counter of 100 MHz
// Ends this wave. A barrier no longer counts it, so the others come to a wait of their own that ends in the same way; a trap
// would take the host's process with it.
KOGC_DEVICE void stop_kernel() { asm volatile("s_endpgm"); }
KOGC_DEVICE void relax() { __builtin_amdgcn_s_sleep(1); }  // between two polls: 64 clocks

}  // namespace kogc
