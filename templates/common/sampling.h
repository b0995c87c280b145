// A block's part in choosing a token otherwise than by the largest logit: bias, penalties, temperature, the rows that
// top-k, top-p and min-p admit, and a draw among them. The order is that of Transformers' generate.
#pragma once

namespace kogc {

// This block's rows of the vocabulary, and what is kept of them; no other block reads it. Logits and scores lie in shared
// memory where both fit the residual stream's place, which nobody needs between the last norm and the next token.
template <class P> struct Rows {
  static constexpr int MOST = (P::Head::BASE + (P::Head::REMAINDER > 0)) * P::Head::UNIT;
  static constexpr bool NEAR = 2 * MOST <= P::HIDDEN;
  int first, count;
  float *logits, *scores;  // as computed; after bias and penalties
  u32* seen;               // how often a row's token was generated; the highest bit: it was in the prompt

  KOGC_DEVICE Rows(const KernelArgs& args) {
    const Work work = work_of<P>(HEAD);
    const int rows = work.units * work.unit, left = work.rows - work.first;
    first = work.first;
    count = rows < left ? rows : left > 0 ? left : 0;
    if constexpr (NEAR) {
      logits = (float*)(shared() + P::RESIDUAL_OFFSET);
      scores = logits + MOST;
    } else {
      logits = (float*)global(args.exchange + P::X_LOGITS) + first;
      scores = (float*)global(args.exchange + P::X_SCORES) + first;
    }
    seen = (u32*)global(args.exchange + P::X_SEEN) + first;
  }
  // Where the logit of the block's i-th row goes, which is row `row` of all.
  static KOGC_DEVICE float& logit(const KernelArgs& args, int i, int row) {
    return NEAR ? ((float*)(shared() + P::RESIDUAL_OFFSET))[i] : ((float*)(args.exchange + P::X_LOGITS))[row];
  }
  KOGC_DEVICE bool holds(int row) const { return row >= first && row < first + count; }
};

constexpr u32 IN_PROMPT = 1u << 31;

// Notes the tokens of the prompt, and of what came before it.
template <class P> KOGC_DEVICE void count_prompt(const KernelArgs& args, const Rows<P>& rows) {
#pragma unroll 1
  for (int i = thread() - args.n_history; i < args.n_prompt; i += THREADS) {
    const i32 token = args.prompt[i];
    if (rows.holds(token)) rows.seen[token - rows.first] = IN_PROMPT;  // nothing is generated yet
  }
  sync();
}

template <class P> KOGC_DEVICE void count_token(const KernelArgs& args, i32 token) {
  const Rows<P> rows(args);
  if (thread() == 0 && rows.holds(token)) rows.seen[token - rows.first]++;
}

KOGC_DEVICE float penalised(const KernelArgs& args, float logit, u32 seen) {
  const u32 generated = seen & ~IN_PROMPT;
  if (seen) logit = logit > 0 ? logit * args.inverse_repetition : logit * args.repetition;
  return logit - args.frequency * (float)generated - (generated ? args.presence : 0.0f);
}

// Scores from logits: bias first, then penalties. The largest key among this thread's rows.
template <class P> KOGC_DEVICE u64 process(const KernelArgs& args, const Rows<P>& rows) {
  const float* from = rows.logits;
  if (args.n_bias) {
    each_row(rows.count, [&](int i) { return rows.logits[i]; }, [&](int i, float v) { rows.scores[i] = v; });
    sync();
    for (int i = thread(); i < args.n_bias; i += THREADS) {
      const Bias b = args.bias[i];
      if (rows.holds(b.token)) rows.scores[b.token - rows.first] += b.value;
    }
    sync();
    from = rows.scores;
  }
  struct Row { float logit; u32 seen; };
  u64 best = 0;
  const auto load = [&](int i) { return Row{from[i], args.choice & PENALISE ? rows.seen[i] : 0}; };
  each_row(rows.count, load, [&](int i, const Row& row) {
    const float v = penalised(args, row.logit, row.seen);
    rows.scores[i] = v;
    best = larger(best, key_of(v, rows.first + i));
  });
  sync();
  return best;
}

// The best of this thread's rows closer than `end` to `largest`, each with its noise.
template <class P> KOGC_DEVICE u64 draw(const KernelArgs& args, const Rows<P>& rows, const float* scores, int step, float largest, u32 end) {
  u64 best = 0;
#pragma unroll 1
  for (int i = ROWS_TOGETHER * thread(); i < rows.count; i += ROWS_TOGETHER * THREADS) {
    float distance[ROWS_TOGETHER];
    u32 admitted = 0;
    KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++) {
      distance[e] = i + e < rows.count ? (largest - scores[i + e]) * args.inverse_temperature : 0.0f;
      const bool near = !(args.choice & FILTER) || (!(distance[e] > args.reach) && fixed_distance(distance[e]) < end);
      admitted |= (u32)(near && i + e < rows.count) << e;
    }
    if (!admitted) continue;
    const int row = rows.first + i;  // a multiple of four: the four rows share the bits of one counter
    const Bits bits = philox(args.seed, (u32)row / ROWS_TOGETHER, (u32)(args.start + step));
    KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++)
      if (admitted >> e & 1) best = larger(best, key_of(gumbel(bits.w[e]) - distance[e], row + e));
  }
  return best;
}

// The key with which this block takes part in the choice. greedy: the largest logit of this thread's rows. Out of line: a token
// needs it once, and the registers of a mat-vec must not be shared with it.
template <class P> KOGC_COLD u64 sample(const KernelArgs& args, int step, u64 greedy) {
  const Where where{args, step, P::LAYERS};
  const Rows<P> rows(args);
  const u32 tag = choice_tag(args, step);
  sync();  // the rows' logits are in memory
  exchange_begins<P>();
  if (args.choice & LOGPROBS) put_candidates<P>(args, rows.logits, rows.first, rows.count, greedy, tag);
  const bool lists = (args.choice & DRAW) && args.top_k && args.top_k <= MOST_LISTED;
  const bool changes = lists || (args.choice & (PENALISE | BIAS));  // lists need each_row's share of rows in `best`
  if ((args.choice & PENALISE) && step == args.n_prompt - 1) count_prompt(args, rows);
  u64 best = changes ? process(args, rows) : greedy, agreed = 0;
  if (args.choice & DRAW) {
    const float* scores = changes ? rows.scores : rows.logits;
    float largest = 0;
    if (lists) {
      Shortlist<P> shortlist(args, step);
      shortlist.put(scores, rows.first, rows.count, best);
      agreed = shortlist.choose();
      largest = shortlist.largest();
    } else if (args.choice & FILTER) {
      u64* maxima = (u64*)(args.exchange + P::X_MAXIMA);
      best = block_maximum<P>(best);
      if (thread() == 0) store_key(maxima + P::rank(), best | tag);
      largest = value_of(largest_of_blocks<P>(maxima, tag, where, WAIT_MAXIMA));
    }
    if (scalar(agreed != 0)) {
      best = rows.holds(row_of(agreed)) ? agreed : 0;
    } else {
      u32 end = EVERYTHING;
      if (args.choice & FILTER) {
        const auto distance = [&](int i) { return (largest - scores[i]) * args.inverse_temperature; };
        Threshold<P, decltype(distance)> threshold(args, step, rows.count, distance);
        end = threshold.find((u32)args.top_k, args.top_p);
      }
      best = draw(args, rows, scores, step, largest, end);
    }
  }
  if (thread() == 0) words<P>().agreed = agreed;
  exchange_ends<P>();
  if (!scalar(agreed != 0)) return block_maximum<P>(best);
  sync();
  return best;
}

}  // namespace kogc
