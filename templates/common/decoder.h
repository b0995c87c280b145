// One step of decoding, as every target runs it: mat-vec phases one after the other, each with its own input and output.
// The target brings matvec() (products of this block's rows) and AttentionCore (products with keys and values).
//
// The phases share one loop, and with it one instance of the code of a mat-vec, a norm and a gather: half the code, and
// registers that one phase's addresses cannot take from another.
//
// Where P::TOKENS is more than one, a step takes so many tokens of a prompt (a pass): what is read of the weights serves
// all of them. Each token goes the way that it would go alone, through exchanges of its own, so its bits are the same.
#pragma once

namespace kogc {

// What of a generation is known from the arguments alone; producer and consumers must agree on it.
template <class P> struct Generation {
  static KOGC_DEVICE int steps(const KernelArgs& a) { return a.n_prompt + (a.max_new > 0 ? a.max_new - 1 : 0); }
  static KOGC_DEVICE bool needs_head(const KernelArgs& a, int step) { return a.logits || (step >= a.n_prompt - 1 && a.max_new > 0); }
  static KOGC_DEVICE int phases(const KernelArgs& a, int step) { return P::LAYERS * LAYER_PHASES + needs_head(a, step); }
};

// The i-th phase of a step.
template <class P> KOGC_DEVICE int phase_at(int i) { return i < P::LAYERS * LAYER_PHASES ? i % LAYER_PHASES : HEAD; }

// The arguments as token i of a pass sees them.
template <class P, bool MANY = (P::TOKENS > 1)> class TokenArgs {
 public:
  KOGC_DEVICE TokenArgs(const KernelArgs& args) : args_(args) {}
  KOGC_DEVICE const KernelArgs& operator[](int) const { return args_; }

 private:
  const KernelArgs& args_;
};

template <class P> class TokenArgs<P, true> {
 public:
  KOGC_DEVICE TokenArgs(const KernelArgs& args) {
    for (int i = 0; i < P::TOKENS; i++) {
      of_[i] = args;
      of_[i].exchange += i * P::EXCHANGE_BYTES;
    }
  }
  KOGC_DEVICE const KernelArgs& operator[](int i) const { return of_[i]; }

 private:
  KernelArgs of_[P::TOKENS];
};

template <class P> class Decoder {
 public:
  KOGC_DEVICE Decoder(const KernelArgs& args, Stream<P>& stream) : args_(args), of_(args), stream_(stream), where_{args, 0, 0} {}

  // A token goes in, the next one comes out; or a pass of the prompt, from token `step` on. False: the generation has ended.
  KOGC_DEVICE bool step(int step) {
    where_.step = step;
    mark(BEGIN);
    each_token([&](int i) {
      const i32 token = step + i < args_.n_prompt ? args_.prompt[step + i] : words<P>().chosen;
      Residual<P>::load_embedding(args_.embedding + (u64)token * P::HIDDEN, i);
    });
    where_.layer = 0;
    phase_ = QKV;
#pragma unroll 1
    for (;;) {
      exchange_begins<P>();
      if (phase_ == O) {
        each_token([&](int i) { attend<P>(stream_, of_[i], position(i), parity_, where_); });
        phase_ = opaque((int)O);  // not kept in a register through attention
      }
      begin();  // not before: keys and values lie ahead of O's weights
      input();
      exchange_ends<P>();
      if (phase_ == QKV) parity_ ^= 1;
      project();
      if (++phase_ < HEAD) continue;
      if (phase_ == HEAD && ++where_.layer < P::LAYERS) phase_ = QKV;
      else if (phase_ > HEAD || !Generation<P>::needs_head(args_, step)) break;
    }
    if constexpr (TOKENS == 1) {
      if (chooses()) {
        put_choice();
        return choose();
      }
    }
    return true;
  }

 private:
  static constexpr int TOKENS = P::TOKENS;
  static constexpr bool PAIRS = !P::FP16 && P::FFN % 8 == 0;  // the widest vector crosses as two BF16 values a word
  static constexpr int HIDDEN_WORDS = PAIRS ? P::FFN / 2 : P::FFN;

  // use(i) for each token of the pass.
  template <class Use> KOGC_DEVICE void each_token(Use use) const {
    if constexpr (TOKENS == 1) return use(0);
    const int count = tokens_of<P>(args_, where_.step);
    for (int i = 0; i < count; i++) use(i);
  }

  // Brings the phase's activation into shared memory, from what the blocks have put.
  KOGC_DEVICE void input() {
    if (phase_ == O) {
      each_token([&](int i) { gather_attention(i); });
      mark(ATTENTION_GATHER);
    } else if (phase_ == DOWN) {
      each_token([&](int i) {
        gather<P, HIDDEN_WORDS, PAIRS>(slot(P::X_HIDDEN, i), activation<P>(i), P::Down::COLUMNS_PADDED, parity_, where_, WAIT_HIDDEN);
      });
      mark(HIDDEN_GATHER);
    } else {
      const bool first = phase_ == QKV && where_.layer == 0, after_attention = phase_ == GATE_UP;
      Quad gamma[Residual<P>::OWN];  // arrives while the blocks are awaited
      Residual<P>::load_gamma(gamma, args_.norms + (u64)(2 * where_.layer + after_attention) * P::HIDDEN);
      each_token([&](int i) {
        const float* added = first ? nullptr : slot(after_attention ? P::X_O : P::X_DOWN, i);
        Residual<P>::advance(added, gamma, i, activation<P>(i), P::HIDDEN_PADDED, parity_, where_, after_attention ? WAIT_O : WAIT_DOWN);
      });
      mark(first ? EMBED : after_attention ? O_GATHER : DOWN_GATHER);
    }
  }

  KOGC_DEVICE void gather_attention(int i) {
    const Span<P> span(opaque(position(i)), P::window(where_.layer));  // opaque: not kept from attend() on
    if (span.active() <= P::GATHER_SPLITS) {
      gather_partials<P>(of_[i], span, activation<P>(i), parity_, where_);
      clear_activation(activation<P>(i), P::Q_ROWS, P::O::COLUMNS_PADDED);
      sync();
    } else {
      combined_parity_[i] ^= 1;
      combine<P>(of_[i], span, parity_, combined_parity_[i], where_);
      gather<P, P::Q_ROWS>(slot(P::X_ATTENTION, i), activation<P>(i), P::O::COLUMNS_PADDED, combined_parity_[i], where_, WAIT_ATTENTION);
    }
  }

  // What the phase needs beside its activation. What the blocks put takes as long to arrive: polls before that would be in
  // vain, and in the way.
  KOGC_DEVICE void begin() {
    work_ = words<P>().work[phase_];
    early_ = {};  // in every phase: what is only written in one would be kept through all others
    stop_ = 0;
    best_ = 0;
    if (P::QKV_BIAS && phase_ == QKV) {
      const int row = work_.first + ROWS_TOGETHER * thread();
      if (row < work_.rows) early_ = *(const Quad*)(bias() + row);
    }
    if (phase_ == HEAD && block() == 0 && thread() == 0) stop_ = load_host(args_.stop_word);  // arrives while the rows stream
    products_.begin(stream_, work_, where_);
  }
  KOGC_DEVICE const u16* bias() const { return args_.qkv_bias + (u64)where_.layer * P::Qkv::ROWS; }

  // Multiplies this block's rows of the phase and puts the results where the next phase finds them.
  KOGC_DEVICE void project() {
    const bool normalised = phase_ != O && phase_ != DOWN;
    const float unscale = PAIRS && phase_ == DOWN ? PAIR_UNSCALE : 1.0f;
    float* const slot_of_first = slot(work_.exchange, 0);  // a token alone has it found before its rows come
    const auto put_rows = [&](int i, int first, const float (&sums)[ROWS_TOGETHER]) {
      const int row = work_.first + first;
      float* to = TOKENS == 1 ? slot_of_first : slot(work_.exchange, i);
      const float of_norm = Residual<P>::scale(i), scale = normalised ? of_norm : unscale;  // without a branch
      float y[ROWS_TOGETHER];
      KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++) y[e] = sums[e] * scale;
      if (phase_ == GATE_UP) {  // rows alternate: gate 0, up 0, gate 1, up 1, ...
        const float a = silu(y[0]) * y[1], b = silu(y[2]) * y[3];
        if constexpr (PAIRS) {
          put_pair((u32*)to + row / 4, a, b, parity_);
        } else {
          put(to + row / 2, a, parity_);
          if (row + 2 < work_.rows) put(to + row / 2 + 1, b, parity_);
        }
      } else if (phase_ == HEAD) {
        KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++)
          if (row + e < work_.rows) best_ = larger(best_, consider(i, first + e, row + e, y[e]));
      } else {
        if (P::QKV_BIAS && phase_ == QKV) {
          Quad q = early_;
          if (first != ROWS_TOGETHER * thread()) q = *(const Quad*)(bias() + row);
          q = {opaque(q.low), opaque(q.high)};
          KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++) y[e] += element<P::FP16>(q, e);
        }
        put_vector(to + row, y, parity_);
      }
    };
    const auto multiplied = [&] { mark(products_mark()); };
    products_.run(stream_, where_, multiplied, [&](int first, const float (&sums)[TOKENS][ROWS_TOGETHER]) {
      if (work_.first + first < work_.rows) each_token([&](int i) { put_rows(i, first, sums[i]); });
    });
    if (phase_ != HEAD) mark(output_mark());
  }

  // --- the choice of a token -------------------------------------------------------------------------------------------
  // Whether this step's logits choose a token.
  KOGC_DEVICE bool chooses() const { return where_.step >= args_.n_prompt - 1 && args_.max_new > 0; }
  KOGC_DEVICE u64* keys() const { return (u64*)(args_.exchange + P::X_KEYS); }

  // The block's row number `at`, which is row `row` of all, for token i.
  KOGC_DEVICE u64 consider(int i, int at, int row, float logit) {
    if (args_.logits && where_.step < args_.n_prompt) args_.logits[(u64)(where_.step + i) * P::VOCAB + row] = logit;
    if constexpr (TOKENS == 1) if (args_.choice && chooses()) Rows<P>::logit(args_, at, row) = logit;
    return key_of(logit, row);
  }

  KOGC_DEVICE void put_choice() {
    const u32 tag = choice_tag(args_, where_.step);
    if (thread() == 0) words<P>().stop = stop_;
    const u64 best = args_.choice ? sample<P>(args_, where_.step, best_) : block_maximum<P>(best_);
    if (thread() != 0) return;
    store_key(keys() + block(), best | (u64)(stop_ != 0) << STOP_BIT | tag);
    if (args_.choice & LOGPROBS) put_raw<P>(args_, best ? raw(row_of(best)) : 0, tag);
  }

  KOGC_DEVICE float raw(int row) const { return Rows<P>::logit(args_, row - words<P>().work[HEAD].first, row); }

  // All blocks agree on the next token. False: it ends the generation.
  KOGC_DEVICE bool choose() {
    const int made = where_.step - (args_.n_prompt - 1);
    const u32 tag = choice_tag(args_, where_.step);
    const u64 agreed = words<P>().agreed;
    const u64 best = agreed ? agreed : largest_of_blocks<P>(keys(), tag, where_, WAIT_KEYS);
    const i32 token = row_of(best);
    if (thread() == 0) words<P>().chosen = token;
    if ((args_.choice & LOGPROBS) && block() == 0) put_record<P>(args_, where_.step, made, best, tag);
    if (block() == 0 && thread() == 0) store_host(args_.tokens + made, token);
    if (args_.choice & PENALISE) count_token<P>(args_, token);
    bool stopped = words<P>().stop;
    for (int i = 0; i < args_.n_stop; i++) stopped = stopped || token == args_.stop[i];
    sync();
    mark(HEAD_CHOICE);
    return !stopped;
  }

  KOGC_DEVICE float* slot(int offset, int i) const { return (float*)(of_[i].exchange + offset); }
  KOGC_DEVICE int position(int i) const { return args_.start + where_.step + i; }
  KOGC_DEVICE void mark(Mark what) const { Trace<P>::mark(args_, what); }
  KOGC_DEVICE Mark products_mark() const {
    return phase_ == QKV ? QKV_PRODUCTS : phase_ == O ? O_PRODUCTS : phase_ == GATE_UP ? GATE_UP_PRODUCTS : phase_ == DOWN ? DOWN_PRODUCTS : HEAD_PRODUCTS;
  }
  KOGC_DEVICE Mark output_mark() const { return phase_ == QKV ? QKV_PUT : phase_ == O ? O_PUT : phase_ == GATE_UP ? GATE_UP_PUT : DOWN_PUT; }

  const KernelArgs& args_;
  const TokenArgs<P> of_;
  Stream<P>& stream_;
  Where where_;
  MatVec<P> products_;
  Work work_ = {};  // of the phase
  Quad early_ = {};  // bias of this thread's first rows, on its way before it is needed
  int phase_ = QKV;
  i32 stop_ = 0;  // of the vocabulary projection: whether the host asks to stop, and this thread's best row
  u64 best_ = 0;
  u32 parity_ = 0, combined_parity_[TOKENS] = {};
};

}  // namespace kogc
