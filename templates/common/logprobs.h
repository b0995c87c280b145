// Log-probabilities of the model's own distribution, before anything is done to the logits: of the token chosen and of
// the most likely ones. Each block puts its sum and its best rows; the first block makes a record of them for the host.
#pragma once

namespace kogc {

constexpr int MAX_LOGPROBS = 20;

// What a block puts: the sum of exp(logit - its largest), its best keys in order, and the logit of its candidate.
enum Candidate { SUM, TOP, RAW = TOP + MAX_LOGPROBS, CANDIDATE_WORDS };

template <class P> KOGC_DEVICE u64* candidates(const KernelArgs& args, int block) {
  return (u64*)(args.exchange + P::X_CANDIDATES) + block * CANDIDATE_WORDS;
}

// The sum over the block's threads, on every thread, in the same order always.
template <class P> KOGC_DEVICE float block_sum(float v) {
  float(&of_warps)[16] = words<P>().warp_sums;
  for (int m = LANES / 2; m; m /= 2) v += shuffle_xor(v, m);
  sync();  // the last reader of the area is done
  if (lane() == 0) of_warps[warp()] = v;
  sync();
  float sum = 0;
  for (int w = 0; w < WARPS; w++) sum += of_warps[w];
  return sum;
}

// best: the largest key among this thread's rows.
template <class P>
KOGC_DEVICE void put_candidates(const KernelArgs& args, const float* logits, int first, int count, u64 best, u32 tag) {
  u64* to = candidates<P>(args, P::rank());
  best = block_maximum<P>(best);
  const float largest = value_of(best);
  float sum = 0;
  const auto load = [&](int i) { return logits[i]; };
  each_row(count, load, [&](int, float v) { sum += exp2_fast(LOG2E * (v - largest)); });
  sum = block_sum<P>(sum);
  if (thread() == 0) store_key(to + SUM, (u64)as_word(sum) << 32 | tag);
#pragma unroll 1
  for (int n = 0;; n++) {
    if (thread() == 0) store_key(to + TOP + n, best | tag);
    if (n + 1 >= args.n_logprobs) break;
    u64 next = 0;
    each_row(count, load, [&](int i, float v) {
      const u64 key = key_of(v, first + i);
      if (key < best) next = larger(next, key);
    });
    best = block_maximum<P>(next);
  }
}

// The logit of the row with which this block takes part in the choice.
template <class P> KOGC_DEVICE void put_raw(const KernelArgs& args, float logit, u32 tag) {
  store_key(candidates<P>(args, P::rank()) + RAW, (u64)as_word(logit) << 32 | tag);
}

// Writes the record of token `made`, chosen by `key`: its log-probability, then n_logprobs tokens, then theirs.
template <class P> KOGC_COLD void put_record(const KernelArgs& args, int step, int made, u64 key, u32 tag) {
  const Where where{args, step, P::LAYERS};
  const auto word = [&](bool wanted, int b, int i) { return take_key(wanted, candidates<P>(args, b) + i, tag, where, WAIT_CANDIDATES); };
  u64 best = 0;
  each_block<P>([&](int b, bool is) { best = larger(best, without_tag(word(is, b, TOP))); });
  best = block_maximum<P>(best);
  const float largest = value_of(best);
  float sum = 0;
  each_block<P>([&](int b, bool is) {
    const u64 own = without_tag(word(is, b, TOP)), of_block = word(own != 0, b, SUM);
    if (own) sum += as_float((u32)(of_block >> 32)) * exp2_fast(LOG2E * (value_of(own) - largest));
  });
  const float log_sum = largest + natural_log(block_sum<P>(sum));
  const int n = args.n_logprobs;
  u32* record = args.records + (u64)made * (1 + 2 * n);
  each_block<P>([&](int b, bool is) {  // the winner's block knows its logit
    const u64 own = take_key(is, (u64*)(args.exchange + P::X_KEYS) + b, tag, where, WAIT_KEYS);
    const bool won = is && without_tag(own) == key;
    const u64 logit = word(won, b, RAW);
    if (won) store_host(record, (i32)as_word(as_float((u32)(logit >> 32)) - log_sum));
  });
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    if (thread() == 0) {
      store_host(record + 1 + i, best ? row_of(best) : -1);
      store_host(record + 1 + n + i, (i32)as_word(value_of(best) - log_sum));
    }
    u64 next = 0;
    each_block<P>([&](int b, bool is) {
      for (int k = 0; k < n; k++) {
        const u64 other = without_tag(word(is, b, TOP + k));
        if (other >= best) continue;
        next = larger(next, other);
        is = false;  // a block's keys are in order: the first that is smaller is its best
      }
    });
    best = block_maximum<P>(next);
  }
  fence_host();
  sync();
}

}  // namespace kogc
