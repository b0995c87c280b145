// What the common code asks of the hardware, on NVIDIA GPUs from sm_80: threads, barriers, relaxed memory, tensor cores.
// Every inline instruction of the kernel is in this file, and in bulk_copies.cuh or async_copies.cuh, which the profile's
// architecture chooses; emulate/ has a plain C++ body for each.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/args.h"

#define KOGC_DEVICE __device__ __forceinline__
#define KOGC_COLD static __device__ __noinline__
#define KOGC_KERNEL extern "C" __global__
#define KOGC_UNROLL _Pragma("unroll")
#define KOGC_BOUNDS(threads) __launch_bounds__(threads, 1)
#define KOGC_PARAMETER const __grid_constant__

namespace kogc {

constexpr int LANES = 32, WARPS = 8, THREADS = LANES * WARPS;
constexpr int PRODUCER = WARPS;  // the warp that issues the copies

// Hides that a value is the same in every layer, so that what follows from it is computed where it is used: hoisted out of
// the layer loop, the addresses of all phases together would not fit the registers.
template <class T> KOGC_DEVICE T opaque(T v) {
  asm volatile("" : "+r"(v));
  return v;
}
KOGC_DEVICE int thread() {
  const int v = (int)opaque(threadIdx.x);
  __builtin_assume(v >= 0 && v < 1024);
  return v;
}
KOGC_DEVICE int lane() { return thread() % LANES; }
KOGC_DEVICE int warp() { return thread() / LANES; }
KOGC_DEVICE int block() { return (int)opaque(blockIdx.x); }
// A pointer into memory: where arguments come by reference the compiler does not see it, and a store that might go to shared
// memory costs all that it knows of what lies there, up to which branches a warp takes as one.
template <class T> KOGC_DEVICE T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}
KOGC_DEVICE int block_count() { return gridDim.x; }
KOGC_DEVICE int block_threads() { return blockDim.x; }
KOGC_DEVICE char* shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// --- barriers and shuffles -------------------------------------------------------------------------------------------
KOGC_DEVICE void sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }  // the consumer warps
KOGC_DEVICE void sync_block() { __syncthreads(); }
KOGC_DEVICE void sync_warp() { __syncwarp(); }
template <class T> KOGC_DEVICE T shuffle_xor(T v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
// What one lane has, on all. Before Hopper by a reduction: of a shuffle in a loop the compiler may not believe there that all
// lanes get the same, and then it believes no loop of the kernel.
template <class T> KOGC_DEVICE T shuffle_from(T v, int source) {
  static_assert(T(1) / 2 == 0, "whole numbers: their bits are what the reduction takes");
  if constexpr (__CUDA_ARCH__ >= 900) return __shfl_sync(~0u, v, source);
  else if constexpr (sizeof v == 8) return (u64)shuffle_from((u32)(v >> 32), source) << 32 | shuffle_from((u32)v, source);
  else return __reduce_or_sync(~0u, lane() == source ? (u32)v : 0);
}
// What all lanes of a warp have alike: said so, the compiler needs no care for lanes that part and meet again.
KOGC_DEVICE int scalar(int v) { return shuffle_from(v, 0); }
KOGC_DEVICE bool all_lanes(bool v) { return __all_sync(~0u, v); }

// Two additions of 32 bits and the carry between them: one of 64 bits would be a loop of compare and swap.
KOGC_DEVICE void add_shared(u64* p, u64 v) {
  const u32 low = (u32)v, high = (u32)(v >> 32) + (atomicAdd((u32*)p, low) > ~low);
  if (high) atomicAdd((u32*)p + 1, high);
}

KOGC_DEVICE u32 take_place(u32* count) { return atomicAdd(count, 1u); }  // in shared memory: how many came before

// --- words that carry their own readiness: relaxed, device scope -----------------------------------------------------
struct alignas(16) Words { u32 x, y, z, w; };

KOGC_DEVICE void store_word(void* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
KOGC_DEVICE void store_words(void* p, Words v) {  // each word by itself is relaxed
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
KOGC_DEVICE void store_key(void* p, u64 v) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
KOGC_DEVICE u32 load_word(const void* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
KOGC_DEVICE Words load_words(const void* p) {
  Words v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
// The same where `wanted`; else v stays. Without a branch: what a warp polls, it polls as one.
KOGC_DEVICE void load_word_if(bool wanted, u32& v, const void* p) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.relaxed.gpu.global.u32 %0, [%1]; }" : "+r"(v) : "l"(p), "r"((u32)wanted) : "memory");
}
KOGC_DEVICE void load_words_if(bool wanted, Words& v, const void* p) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"((u32)wanted) : "memory");
}
KOGC_DEVICE u64 load_key(const void* p) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
// A count of blocks. What they wrote before they add to it with `release`, whoever has seen it grow may read; that takes 0.8 us.
KOGC_DEVICE void add_word(u32* p, u32 v) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
KOGC_DEVICE void add_released(u32* p, u32 v) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
KOGC_DEVICE u32 load_acquired(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
KOGC_DEVICE void store_host(void* p, i32 v) { asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
KOGC_DEVICE i32 load_host(const void* p) {
  i32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

KOGC_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// --- a word in shared memory that says what was written before it ----------------------------------------------------
KOGC_DEVICE void publish(u32* p, u32 v) { asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory"); }
KOGC_DEVICE u32 published(u32* p) {
  u32 v;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
  return v;
}

// --- numbers -----------------------------------------------------------------------------------------------------------
KOGC_DEVICE float as_float(u32 v) { return __uint_as_float(v); }
KOGC_DEVICE u32 as_word(float v) { return __float_as_uint(v); }
KOGC_DEVICE float bf16_to_float(u16 v) { return __uint_as_float((u32)v << 16); }
KOGC_DEVICE float half_to_float(u16 v) { return __half2float(__ushort_as_half(v)); }
KOGC_DEVICE u32 floats_to_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
KOGC_DEVICE u16 float_to_bf16(float v) { return (u16)floats_to_bf16(v, 0); }  // a conversion of one alone takes longer
KOGC_DEVICE u16 float_to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }
KOGC_DEVICE float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
KOGC_DEVICE float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
KOGC_DEVICE float reciprocal_sqrt(float v) { return rsqrtf(v); }

// --- tensor cores: c[16][8] += a[16][16] * b[16][8] ------------------------------------------------------------------------
template <bool FP16> KOGC_DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (FP16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The transpose of an 8 x 8 matrix of 16-bit elements; lane l holds row l / 4, columns l % 4 * 2 and + 1.
KOGC_DEVICE u32 transpose8x8(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// --- barriers in shared memory that count arrivals; what they wait for besides, and how: *_copies.cuh ------------------------
using Barrier = u64;
KOGC_DEVICE void barrier_init(Barrier* b, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)); }
KOGC_DEVICE void barrier_arrive(Barrier* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"); }
KOGC_DEVICE bool barrier_test(Barrier* b, u32 parity) {
  u32 ok;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0,1,0,p; }"
               : "=r"(ok) : "r"(shared_address(b)), "r"(parity) : "memory");
  return ok;
}
// Weights are read once a token: they leave the L2 cache first, so that exchanges, norms and the KV cache may stay.
using CachePolicy = u64;
KOGC_DEVICE CachePolicy read_once() {
  CachePolicy p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}

KOGC_DEVICE CachePolicy read_again() {  // activations: all blocks read them
  CachePolicy p;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
  return p;
}

// --- time, and the end of patience -----------------------------------------------------------------------------------------
KOGC_DEVICE long long clock_cycles() { return clock64(); }
KOGC_DEVICE u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
KOGC_DEVICE void fence_host() { __threadfence_system(); }
[[noreturn]] KOGC_DEVICE void stop_kernel() {
  asm volatile("trap;");
  __builtin_unreachable();
}
KOGC_DEVICE void relax() {}  // between two polls

}  // namespace kogc
