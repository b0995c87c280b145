// What the common code asks of the hardware, on x86-64 from AVX2: a thread stands in place of a block, so a block has one
// warp of one lane, its barriers are empty and its shared memory is memory of the thread.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <time.h>

#include "common/args.h"

#define KOGC_COLD static __attribute__((noinline, cold))
#define KOGC_DEVICE inline __attribute__((always_inline))
#define KOGC_UNROLL  // loops over a block's threads are long here, and few of them are worth unrolling
#if defined(__clang__)
#define KOGC_UNROLL_ALL _Pragma("clang loop unroll(full)")
#else
#define KOGC_UNROLL_ALL _Pragma("GCC unroll 16")
#endif

namespace kogc {

constexpr int LANES = 1, WARPS = 1, THREADS = 1;

// What a thread knows of itself and of the launch that it belongs to.
struct Self {
  int block, blocks;
  char* memory;        // stands for shared memory
  int* ended;          // of the launch: nonzero once a thread has left before the end
  jmp_buf* way_out;
  u32 polls;           // in vain, since the last sync
  const char *next, *enough;  // weights to fetch while waiting, up to what the second level holds beside its other data
};
static __thread Self self;

template <class T> KOGC_DEVICE T opaque(T v) { return v; }
KOGC_DEVICE int thread() { return 0; }
KOGC_DEVICE int lane() { return 0; }
KOGC_DEVICE int warp() { return 0; }
KOGC_DEVICE int block() { return self.block; }
KOGC_DEVICE int block_count() { return self.blocks; }
KOGC_DEVICE char* shared() { return self.memory; }

template <class T> KOGC_DEVICE T* opaque(T* p) { return p; }  // there are registers enough

KOGC_DEVICE void sync() { self.polls = 0; }  // who comes here is not waiting
template <class T> KOGC_DEVICE T shuffle_xor(T v, int) { return v; }
KOGC_DEVICE int scalar(int v) { return v; }
KOGC_DEVICE bool all_lanes(bool v) { return v; }
template <class T> KOGC_DEVICE T* global(T* p) { return p; }
KOGC_DEVICE void add_shared(u64* p, u64 v) { *p += v; }
KOGC_DEVICE u32 take_place(u32* count) { return (*count)++; }  // how many came before

// --- words that carry their own readiness: relaxed -------------------------------------------------------------------
struct alignas(16) Words { u32 x, y, z, w; };

KOGC_DEVICE void store_word(void* p, u32 v) { __atomic_store_n((u32*)p, v, __ATOMIC_RELAXED); }
KOGC_DEVICE void store_words(void* p, Words v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; i++) store_word((u32*)p + i, words[i]);
}
KOGC_DEVICE void store_key(void* p, u64 v) { __atomic_store_n((u64*)p, v, __ATOMIC_RELAXED); }
KOGC_DEVICE u32 load_word(const void* p) { return __atomic_load_n((const u32*)p, __ATOMIC_RELAXED); }
KOGC_DEVICE u64 load_key(const void* p) { return __atomic_load_n((const u64*)p, __ATOMIC_RELAXED); }
KOGC_DEVICE Words load_words(const void* p) {  // no word of it is torn; each has a parity of its own
  const u32* w = (const u32*)p;
  return {load_word(w), load_word(w + 1), load_word(w + 2), load_word(w + 3)};
}
KOGC_DEVICE void load_word_if(bool wanted, u32& v, const void* p) { if (wanted) v = load_word(p); }
KOGC_DEVICE void load_words_if(bool wanted, Words& v, const void* p) { if (wanted) v = load_words(p); }
KOGC_DEVICE void store_host(void* p, i32 v) { __atomic_store_n((i32*)p, v, __ATOMIC_RELEASE); }
KOGC_DEVICE i32 load_host(const void* p) { return __atomic_load_n((const i32*)p, __ATOMIC_ACQUIRE); }
KOGC_DEVICE void fence_host() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// --- numbers ---------------------------------------------------------------------------------------------------------
KOGC_DEVICE float as_float(u32 v) {
  float f;
  __builtin_memcpy(&f, &v, 4);
  return f;
}
KOGC_DEVICE u32 as_word(float v) {
  u32 w;
  __builtin_memcpy(&w, &v, 4);
  return w;
}
KOGC_DEVICE float bf16_to_float(u16 v) { return as_float((u32)v << 16); }
KOGC_DEVICE u16 float_to_bf16(float v) {  // to nearest, ties to even; a NaN stays one
  const u32 w = as_word(v), rounded = w + 0x7fff + (w >> 16 & 1);
  return (u16)((w & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded >> 16);
}
KOGC_DEVICE u32 floats_to_bf16(float low, float high) { return (u32)float_to_bf16(low) | (u32)float_to_bf16(high) << 16; }
KOGC_DEVICE float half_to_float(u16 v) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v))); }
KOGC_DEVICE u16 float_to_half(float v) { return (u16)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(v), 0)); }

// 2^v to 1e-7, 0 below the normal numbers, 2^127 from there on: a polynomial of the fraction, an exponent of the rest.
KOGC_DEVICE float exp2_fast(float v) {
  const float bounded = v > 127.0f ? 127.0f : v < -126.0f ? -126.0f : v;
  const float shifted = bounded + 12582912.0f;  // 1.5 * 2^23: the integer nearest to v in the low bits
  const float f = bounded - (shifted - 12582912.0f);
  float p = 0.00015461445f;
  p = p * f + 0.0013400428f;
  p = p * f + 0.009618057f;
  p = p * f + 0.05550327f;
  p = p * f + 0.2402265f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  const float r = p * as_float((as_word(shifted) + 127) << 23);
  return v < -126.0f ? 0.0f : r;
}
KOGC_DEVICE float reciprocal(float v) { return 1.0f / v; }
KOGC_DEVICE float reciprocal_sqrt(float v) { return 1.0f / __builtin_sqrtf(v); }

// --- vectors ---------------------------------------------------------------------------------------------------------
// Vector: FP32 lanes. Pair: twice as many columns of 16-bit data as FP32, BF16 as even and odd columns, FP16 as halves:
// the order within a pair is free as long as all operands use the same.
#if defined(__AVX512F__)
using Vector = __m512;
KOGC_DEVICE Vector zero() { return _mm512_setzero_ps(); }
KOGC_DEVICE Vector broadcast(float v) { return _mm512_set1_ps(v); }
KOGC_DEVICE Vector load(const float* p) { return _mm512_loadu_ps(p); }
KOGC_DEVICE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
KOGC_DEVICE Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
KOGC_DEVICE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
KOGC_DEVICE Vector bits_or(Vector a, Vector b) { return _mm512_or_ps(a, b); }
KOGC_DEVICE __m256 fold(Vector v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
struct Pair { Vector a, b; };
KOGC_DEVICE Pair bf16_pair(const u16* p) {
  const __m512i w = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)))};
}
// E4M3: as halves with another bias of the exponent, 2^-8 of their worth, which fp8_pair_scale() makes up for.
KOGC_DEVICE Pair fp8_pair(const u8* p) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)p), sign = _mm256_set1_epi16((short)0x8000), rest = _mm256_set1_epi16(0x3f80);
  const __m256i even = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(w, 8), sign), _mm256_and_si256(_mm256_slli_epi16(w, 7), rest));
  const __m256i odd = _mm256_or_si256(_mm256_and_si256(w, sign), _mm256_and_si256(_mm256_srli_epi16(w, 1), rest));
  return {_mm512_cvtph_ps(even), _mm512_cvtph_ps(odd)};
}
KOGC_DEVICE Pair half_pair(const u16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1))};
}
#else
using Vector = __m256;
KOGC_DEVICE Vector zero() { return _mm256_setzero_ps(); }
KOGC_DEVICE Vector broadcast(float v) { return _mm256_set1_ps(v); }
KOGC_DEVICE Vector load(const float* p) { return _mm256_loadu_ps(p); }
KOGC_DEVICE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
KOGC_DEVICE Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
KOGC_DEVICE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
KOGC_DEVICE Vector bits_or(Vector a, Vector b) { return _mm256_or_ps(a, b); }
KOGC_DEVICE __m256 fold(Vector v) { return v; }
struct Pair { Vector a, b; };
KOGC_DEVICE Pair bf16_pair(const u16* p) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)))};
}
KOGC_DEVICE Pair fp8_pair(const u8* p) {
  const __m128i w = _mm_loadu_si128((const __m128i*)p), sign = _mm_set1_epi16((short)0x8000), rest = _mm_set1_epi16(0x3f80);
  const __m128i even = _mm_or_si128(_mm_and_si128(_mm_slli_epi16(w, 8), sign), _mm_and_si128(_mm_slli_epi16(w, 7), rest));
  const __m128i odd = _mm_or_si128(_mm_and_si128(w, sign), _mm_and_si128(_mm_srli_epi16(w, 1), rest));
  return {_mm256_cvtph_ps(even), _mm256_cvtph_ps(odd)};
}
KOGC_DEVICE Pair half_pair(const u16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
#endif
KOGC_DEVICE float fp8_pair_scale(u32 exponent) { return as_float((exponent + 8) << 23); }
constexpr int VECTOR = sizeof(Vector) / 4;  // FP32 lanes; a Pair holds twice as many columns

template <bool FP16> KOGC_DEVICE Pair load_pair(const u16* p) {
  if constexpr (FP16) return half_pair(p);
  else return bf16_pair(p);
}

// The sums of eight vectors.
KOGC_DEVICE __m256 sums_of(const Vector (&v)[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(fold(v[0]), fold(v[1])), _mm256_hadd_ps(fold(v[2]), fold(v[3])));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(fold(v[4]), fold(v[5])), _mm256_hadd_ps(fold(v[6]), fold(v[7])));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Fetching every line by name, into the second level, beats the processor's own prefetching, most of all with all cores.
KOGC_DEVICE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
constexpr int AHEAD = 4096;  // bytes from what is read to what is fetched

// --- time, and the end of patience -----------------------------------------------------------------------------------
KOGC_DEVICE long long clock_cycles() { return (long long)__builtin_ia32_rdtsc(); }
// The waiting thread's own time: a stopped process or a busy machine is not a stall.
KOGC_DEVICE u64 nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (u64)t.tv_sec * 1000000000ull + (u64)t.tv_nsec;
}

enum Ending { FINISHED, STOPPED, STALLED, NO_THREADS };

// Ends the launch: this thread leaves at once, the others when they next wait.
[[noreturn]] inline __attribute__((noinline)) void leave(Ending why) {
  int running = FINISHED;
  __atomic_compare_exchange_n(self.ended, &running, (int)why, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  longjmp(*self.way_out, 1);
}
[[noreturn]] KOGC_DEVICE void stop_kernel() { leave(STALLED); }

// A wait of microseconds polls; a longer one lends its core to others; one of milliseconds (a page comes from disk) sleeps.
constexpr u32 YIELD_POLLS = 64, SLEEP_POLLS = 1u << 17;

inline __attribute__((noinline)) void relax_long() {
  if (__atomic_load_n(self.ended, __ATOMIC_RELAXED)) leave(STALLED);
  if (self.polls < SLEEP_POLLS) {
    sched_yield();
  } else {
    const timespec moment = {0, 1000};
    nanosleep(&moment, nullptr);
  }
}

// The weights behind `at` are the next to be read, whatever is awaited before.
constexpr int FETCH_WAITING = 256 << 10;
KOGC_DEVICE void read_next(const u8* at) {
  self.next = (const char*)at + AHEAD;
  self.enough = (const char*)at + FETCH_WAITING;
}

KOGC_DEVICE void relax() {  // between two polls
  if (self.next < self.enough) {
    KOGC_UNROLL_ALL for (int line = 0; line < 8; line++) prefetch(self.next + 64 * line);
    self.next += 8 * 64;
  } else {
    _mm_pause();
  }
  if (++self.polls % YIELD_POLLS == 0) relax_long();
}

}  // namespace kogc
