// Choosing the samples' tokens otherwise than by the largest logit: a group of blocks for each sample, and in the group the
// choice of common/sampling.h as it is for a single stream on so many blocks.
#pragma once

namespace kogc {

// The plan of a group's choice: the vocabulary dealt to its blocks, and its own words to exchange.
template <class P> struct Choosers : P::Samples::Choice {
  using Q = typename P::Samples;
  static constexpr int VOCAB = P::VOCAB, LAYERS = P::LAYERS, BLOCKS = Q::CHOOSERS;
  static constexpr int HIDDEN = 0, RESIDUAL_OFFSET = 0;  // no place in shared memory for logits
  static constexpr int REDUCE_OFFSET = Q::REDUCE_OFFSET, ACTIVATION_OFFSET = Q::WORK_OFFSET, SAMPLING_BYTES = P::SAMPLING_BYTES;
  static KOGC_DEVICE int rank() { return block() % BLOCKS; }
  struct Head {
    static constexpr int ROWS = VOCAB, COLUMNS_PADDED = 0, UNIT = 8, UNITS = (VOCAB + UNIT - 1) / UNIT;
    static constexpr int BASE = UNITS / BLOCKS, REMAINDER = UNITS % BLOCKS, ROTATION = 0;
  };
  using Qkv = Head;  // a table of shares has a line for each phase
  using O = Head;
  using GateUp = Head;
  using Down = Head;
};

template <class P> KOGC_DEVICE u8* choice_words(const SampleArgs& args, int sample) { return args.choices + (u64)sample * P::Samples::CHOICE_BYTES; }
template <class P> KOGC_DEVICE float* sample_logits(const SampleArgs& args, int sample) {
  return (float*)(choice_words<P>(args, sample) + Choosers<P>::X_LOGITS);
}

// The token of `sample`, on every thread of its group.
template <class P> KOGC_COLD i32 choose_token(const SampleArgs& args, int sample, int step) {
  using C = Choosers<P>;
  KernelArgs& own = sample_words<P>().choice;
  sync();
  if (thread() == 0) {
    own = args;
    own.exchange = choice_words<P>(args, sample);
    own.seed = args.seed + sample;
    own.records = args.records + (u64)sample * args.max_new * (1 + 2 * args.n_logprobs);
  }
  sync();
  const Where where{own, step, P::LAYERS};
  const Rows<C> rows(own);
  const u32 tag = choice_tag(own, step);
  u64* keys = (u64*)(own.exchange + C::X_KEYS);
  u64 best = 0;
  each_row(rows.count, [&](int i) { return rows.logits[i]; }, [&](int i, float v) { best = larger(best, key_of(v, rows.first + i)); });
  best = kogc::sample<C>(own, step, best);
  if (thread() == 0) {
    store_key(keys + C::rank(), best | tag);
    if (own.choice & LOGPROBS) put_raw<C>(own, best ? rows.logits[row_of(best) - rows.first] : 0, tag);
  }
  const u64 agreed = words<C>().agreed, chosen = scalar(agreed != 0) ? agreed : largest_of_blocks<C>(keys, tag, where, WAIT_KEYS);
  if ((own.choice & LOGPROBS) && C::rank() == 0) put_record<C>(own, step, step, chosen, tag);
  if (own.choice & PENALISE) count_token<C>(own, row_of(chosen));
  return row_of(chosen);
}

}  // namespace kogc
