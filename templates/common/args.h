// The kernel's arguments: all that is not known when the kernel is compiled.
#pragma once
// Memory of the device, where a target has a name for it: a token comes from there or from shared memory, and the compiler
// would make of both loads one that finds out.
#ifndef KOGC_GLOBAL
#define KOGC_GLOBAL
#endif

namespace kogc {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

constexpr int MAX_STOP_TOKENS = 16;
constexpr int REPORT_WORDS = 16;

// What choosing a token takes, beside the largest logit.
enum Choice : u32 { DRAW = 1, FILTER = 2, PENALISE = 4, BIAS = 8, LOGPROBS = 16 };

struct Bias {
  i32 token;
  float value;
};

struct KernelArgs {
  const u8* slabs;        // weights: one contiguous slab a block, in the order of use
  const u16* embedding;   // [vocab][hidden]
  const u16* norms;       // [2 * layers + 1][hidden]
  const u16* qk_norms;    // [layers][2][head_dim]
  const u16* qkv_bias;    // [layers][qkv rows]
  const float* rope;      // [max_context][head_dim / 2][cos, sin]
  u16* kv;                // [layer][kv head][chunk][K, V]
  u8* exchange;           // zero at launch
  const KOGC_GLOBAL i32* prompt;  // [n_prompt]; before it lie n_history tokens that penalties know
  i32* tokens;            // host-visible ring: token i of the continuation, -1 until it is known
  float* logits;          // null, or [n_prompt][vocab]
  const i32* stop_word;   // host-visible: the host stores 1 to end the generation
  u32* report;            // host-visible: who waited for what, if the kernel ever stalls
  i32 start, n_prompt, max_new, n_stop;
  i32 stop[MAX_STOP_TOKENS];
  u64* trace;             // null, or the event buffer of a tracing build
  const Bias* bias;       // [n_bias], tokens all different
  u32* records;           // host-visible, with LOGPROBS: see logprobs.h
  u8* scratch;            // what passes over a prompt work in; zero where they have never written
  u64 seed;
  u32 choice;             // of Choice; 0: the largest logit
  u32 top_p;              // in 2^-32; 0: off
  i32 top_k;              // 0: off
  i32 n_history, n_bias, n_logprobs;
  float inverse_temperature;
  float reach;            // rows further below the largest, in units of the temperature, are out: min-p
  float repetition, inverse_repetition, presence, frequency;
};

// Several continuations of one prompt: sample i draws with `seed` + i, and `prompt` is the prompt's last token.
struct SampleArgs : KernelArgs {
  u8* pages;               // own keys and values: [layer][kv head][sample][page][K, V]; the first page holds position `start`
  const i32* stop_words;   // host-visible: one a sample
  u8* choices;             // with a choice other than the largest logit: Samples::CHOICE_BYTES for each sample, zero at launch
  float* logits_log;       // null, or [max_new][n_samples][vocab]
  i32 n_samples, n_pages;  // tokens: [n_samples][max_new]
};

// Places where the kernel waits, as they appear in a stall report.
enum Site {
  STAGE_FULL, STAGE_EMPTY, WAIT_QKV, WAIT_PARTIAL, WAIT_ATTENTION, WAIT_O, WAIT_HIDDEN, WAIT_DOWN, WAIT_KEYS, CACHE_WRITTEN,
  WAIT_MAXIMA, WAIT_HISTOGRAM, WAIT_TOTALS, WAIT_CANDIDATES, WAIT_SHORTLIST, WAIT_PASS
};

}  // namespace kogc
