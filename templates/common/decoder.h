// The phases of one step of decoding, as every target runs them. The generated source calls them in order; the target
// brings matvec() (products of this block's rows) and AttentionCore (products with keys and values).
#pragma once

namespace kogc {

// What of a generation is known from the arguments alone; producer and consumers must agree on it.
template <class P> struct Generation {
  static KOGC_DEVICE int steps(const KernelArgs& a) { return a.n_prompt + (a.max_new > 0 ? a.max_new - 1 : 0); }
  static KOGC_DEVICE bool needs_head(const KernelArgs& a, int step) { return a.logits || (step >= a.n_prompt - 1 && a.max_new > 0); }
};

template <class P, class Stream> class Decoder {
 public:
  KOGC_DEVICE Decoder(const KernelArgs& args, Stream& stream) : args_(args), stream_(stream), where_{args, 0, 0} {}

  KOGC_DEVICE void begin(int step) {
    where_.step = step;
    const i32 token = step < args_.n_prompt ? args_.prompt[step] : token_;
    mark(BEGIN);
    Residual<P>::load_embedding(args_.embedding + (u64)token * P::HIDDEN);
    normalise<typename P::Qkv>(0);
    mark(EMBED);
  }

  KOGC_DEVICE void layer(int l) {
    where_.layer = l;
    parity_ ^= 1;
  }

  KOGC_DEVICE void qkv() {
    using M = typename P::Qkv;
    const Share<P, M> share;
    float* to = slot(P::X_QKV) + share.first_row;
    const u16* bias = args_.qkv_bias + (u64)where_.layer * M::ROWS + share.first_row;
    const int mine = thread() < share.units * M::UNIT ? thread() : 0;
    const float early = P::QKV_BIAS ? to_float<P::FP16>(bias[mine]) : 0.0f;  // on its way before it is needed
    float scale;
    const auto prepare = [&] {
      mark(QKV_PRODUCTS);
      scale = Residual<P>::scale();
    };
    matvec<P, M, 1>(stream_, share.units, where_, prepare, [&](int i, float v) {
      v *= scale;
      if constexpr (P::QKV_BIAS) v += i == thread() ? early : to_float<P::FP16>(bias[i]);
      if (share.first_row + i < M::ROWS) put(to + i, v, parity_);
    });
    mark(QKV_PUT);
  }

  KOGC_DEVICE void attention() {
    const Span<P> span(position(), P::window(where_.layer));
    attend<P>(args_, position(), parity_, where_);
    if (span.active() <= P::GATHER_SPLITS) {
      gather_partials<P>(args_, span, activation<P>(), parity_, where_);
      for (int i = P::Q_ROWS + thread(); i < P::O::COLUMNS_PADDED; i += THREADS) activation<P>()[i] = 0;
      sync();
    } else {
      combined_parity_ ^= 1;
      combine<P>(args_, span, parity_, combined_parity_, where_);
      gather<P, P::Q_ROWS>(slot(P::X_ATTENTION), activation<P>(), P::O::COLUMNS_PADDED, combined_parity_, where_, WAIT_ATTENTION);
    }
    mark(ATTENTION_GATHER);
  }

  KOGC_DEVICE void o() { project<typename P::O>(P::X_O, O_PRODUCTS, O_PUT); }

  KOGC_DEVICE void gate_up() {
    using M = typename P::GateUp;  // rows alternate: gate 0, up 0, gate 1, up 1, ...
    add_and_normalise<M>(P::X_O, WAIT_O, 2 * where_.layer + 1);
    mark(O_GATHER);
    const Share<P, M> share;
    float* to = slot(P::X_HIDDEN) + share.first_row / 2;
    float scale;
    const auto prepare = [&] {
      mark(GATE_UP_PRODUCTS);
      scale = Residual<P>::scale();
    };
    matvec<P, M, 2>(stream_, share.units, where_, prepare, [&](int i, float gate, float up) {
      gate *= scale;
      const float silu = gate / (1.0f + exp2_fast(-LOG2E * gate));
      if (share.first_row + i < M::ROWS) put(to + i / 2, silu * (up * scale), parity_);
    });
    mark(GATE_UP_PUT);
  }

  KOGC_DEVICE void down() {
    gather<P, P::FFN>(slot(P::X_HIDDEN), activation<P>(), P::Down::COLUMNS_PADDED, parity_, where_, WAIT_HIDDEN);
    mark(HIDDEN_GATHER);
    project<typename P::Down>(P::X_DOWN, DOWN_PRODUCTS, DOWN_PUT);
    const int next = where_.layer + 1;
    if (next < P::LAYERS) add_and_normalise<typename P::Qkv>(P::X_DOWN, WAIT_DOWN, 2 * next);
    else add_and_normalise<typename P::Head>(P::X_DOWN, WAIT_DOWN, 2 * P::LAYERS);
    mark(DOWN_GATHER);
  }

  // Vocabulary projection and greedy choice. True: the generation goes on.
  KOGC_DEVICE bool head() {
    using M = typename P::Head;
    const Share<P, M> share;
    const i32 stop = block() == 0 && thread() == 0 ? load_host(args_.stop_word) : 0;  // arrives while the rows stream
    float* logits = args_.logits && where_.step < args_.n_prompt ? args_.logits + (u64)where_.step * P::VOCAB : nullptr;
    u64 best = 0;
    float scale;
    const auto prepare = [&] {
      mark(HEAD_PRODUCTS);
      scale = Residual<P>::scale();
    };
    matvec<P, M, 1>(stream_, share.units, where_, prepare, [&](int i, float v) {
      const int row = share.first_row + i;
      if (row >= P::VOCAB) return;
      v *= scale;
      if (logits) logits[row] = v;
      const u64 key = choice(v, row);
      best = key > best ? key : best;
    });
    if (where_.step < args_.n_prompt - 1 || args_.max_new == 0) return true;
    return choose(best, stop);
  }

 private:
  KOGC_DEVICE int position() const { return args_.start + where_.step; }

  // A choice: the logit in order, then the lowest row, then a stop flag and the count of choices as a tag.
  static constexpr u32 TAG_BITS = 11, STOP_BIT = TAG_BITS, ROW_SHIFT = STOP_BIT + 1;
  static constexpr u32 TAG_MASK = (1u << TAG_BITS) - 1, ROW_MASK = (1u << (32 - ROW_SHIFT)) - 1;

  static KOGC_DEVICE u64 choice(float v, int row) { return (u64)ordered(v) << 32 | (u64)(ROW_MASK - (u32)row) << ROW_SHIFT; }

  KOGC_DEVICE bool choose(u64 best, i32 stop) {
    u64* keys = (u64*)(args_.exchange + P::X_KEYS);
    const u32 tag = (u32)(++choices_) & TAG_MASK;
    best = block_maximum(best);
    if (thread() == 0) store_key(keys + block(), best | (u64)(stop != 0) << STOP_BIT | tag);
    best = 0;
    for (int b = thread(); b < P::BLOCKS; b += THREADS) {
      Spin spin;
      u64 key;
      while (((u32)(key = load_key(keys + b)) & TAG_MASK) != tag) spin.step(where_, WAIT_KEYS, tag);
      if (b == 0) *stop_flag() = (int)(key >> STOP_BIT & 1);
      key &= ~(u64)(TAG_MASK | 1u << STOP_BIT);
      best = key > best ? key : best;
    }
    best = block_maximum(best);
    token_ = (i32)(ROW_MASK - ((u32)best >> ROW_SHIFT));
    const int index = where_.step - (args_.n_prompt - 1);
    if (block() == 0 && thread() == 0) store_host(args_.tokens + index, token_);
    bool stopped = *stop_flag();
    for (int i = 0; i < args_.n_stop; i++) stopped = stopped || token_ == args_.stop[i];
    mark(HEAD_CHOICE);
    return !stopped;
  }

  static KOGC_DEVICE int* stop_flag() { return (int*)(shared_scratch() + 192); }
  static KOGC_DEVICE char* shared_scratch() { return (char*)warp_sums<P>(); }

  // The largest key of the block, on every thread.
  KOGC_DEVICE u64 block_maximum(u64 key) {
    u64* of_warps = (u64*)(shared_scratch() + 64);
    for (int m = LANES / 2; m; m /= 2) {
      const u64 other = shuffle_xor(key, m);
      key = other > key ? other : key;
    }
    sync();  // the last reader of the area is done
    if (lane() == 0) of_warps[warp()] = key;
    sync();
    for (int w = 0; w < WARPS; w++) key = of_warps[w] > key ? of_warps[w] : key;
    return key;
  }

  KOGC_DEVICE float* slot(int offset) const { return (float*)(args_.exchange + offset); }

  template <class M> KOGC_DEVICE void normalise(int norm) {
    Quad16 gamma[Residual<P>::OWN];
    Residual<P>::load_gamma(gamma, args_.norms + (u64)norm * P::HIDDEN);
    Residual<P>::normalise(gamma, activation<P>(), M::COLUMNS_PADDED);
  }

  template <class M> KOGC_DEVICE void add_and_normalise(int from, Site site, int norm) {
    Quad16 gamma[Residual<P>::OWN];
    Residual<P>::load_gamma(gamma, args_.norms + (u64)norm * P::HIDDEN);  // on its way while the sums are awaited
    Residual<P>::add(slot(from), parity_, where_, site);
    Residual<P>::normalise(gamma, activation<P>(), M::COLUMNS_PADDED);
  }

  // A projection back to the residual stream.
  template <class M> KOGC_DEVICE void project(int to_slot, Mark products, Mark done) {
    const Share<P, M> share;
    float* to = slot(to_slot) + share.first_row;
    matvec<P, M, 1>(stream_, share.units, where_, [&] { mark(products); }, [&](int i, float v) {
      if (share.first_row + i < M::ROWS) put(to + i, v, parity_);
    });
    mark(done);
  }

  KOGC_DEVICE void mark(Mark what) const { Trace<P>::mark(args_, what); }

  const KernelArgs& args_;
  Stream& stream_;
  Where where_;
  int choices_ = 0;
  i32 token_ = 0;
  u32 parity_ = 0, combined_parity_ = 0;
};

}  // namespace kogc
