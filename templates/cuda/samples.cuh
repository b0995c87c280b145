// Samples, step by step: a token of each goes in, the next ones come out. The residual stream lies in memory, its rows with the
// blocks that multiply them; what crosses blocks is the stream times the norm's weights, and the sums of its squares, whose
// root multiplies what the product of it gives.
#pragma once

namespace kogc {

template <class P> class SampleSteps : SampleResidual<P> {
  using Base = SampleResidual<P>;
  using Base::add, Base::args_, Base::embed, Base::normed_, Base::put_padding, Base::put_squares, Base::scales, Base::words;
  using Q = typename P::Samples;
  using S = Sampled<P>;
  using Group = Choosers<P>;  // of the blocks that choose a sample's token

 public:
  KOGC_DEVICE SampleSteps(const SampleArgs& args) : Base(args), live_(first_bits(args.n_samples)), where_{args, 0, 0} {
    if (thread() < COLUMNS) words().tokens[thread()] = args.prompt[0];
    sync();
  }

  // False: no sample goes on.
  KOGC_DEVICE bool step(int step) {
    where_.step = step;
    where_.layer = 0;
    phase_ = QKV;
    embed();
    next<RELEASED>();
#pragma unroll 1
    for (;;) {
      if (phase_ == O) {
        attention();
        next<RELEASED>();
      } else if (phase_ != DOWN) {
        scales(where_);
      }
      if (phase_ == HEAD) break;
      if (phase_ == QKV) of_layer_ ^= 1;
      product();
      if (phase_ == O || phase_ == DOWN) put_squares();
      if (phase_ == QKV) sync();  // attention waits for the queries, keys and values that it needs, no longer
      else next<RELEASED>();
      if (++phase_ == HEAD && ++where_.layer < P::LAYERS) phase_ = QKV;
    }
    const i32 halted = block() == 0 && thread() < args_.n_samples ? load_host(args_.stop_words + thread()) : 0;  // arrives meanwhile
    best_[0] = best_[1] = 0;
    product();
    if (block() == 0 && thread() < args_.n_samples) this->template array<i32>(Q::HALTED)[thread()] = halted;
    return choose();
  }

 private:
  // A block that takes no part in a phase does not learn that the activations of its use were there, and could take those of
  // the use before it for those of the next: then all see what was written before a meeting.
  static constexpr bool RELEASED = !Base::OWN_ROWS || !P::Qkv::BASE || !P::O::BASE || !P::GateUp::BASE || !P::Down::BASE || !P::Head::BASE;
  template <bool ALL_IS_SEEN> KOGC_DEVICE void next() {
    meet_blocks<ALL_IS_SEEN>(P::BLOCKS, words().met, args_, where_, [&] { publish(&words().passed, (u32)words().met); });
  }
  KOGC_DEVICE int position() const { return args_.start + where_.step; }

  // --- products ----------------------------------------------------------------------------------------------------------
  KOGC_DEVICE void product() {
    const u16* gamma = args_.norms + (u64)(2 * where_.layer + (phase_ == O ? 1 : 2)) * P::HIDDEN;
    const SamplePhase& p = words().phases[phase_];
    const int end = p.end_row, mine = p.first_row + warp() * COLUMN_ROWS + (lane() & 3) * 2;
    const bool adds = phase_ == O || phase_ == DOWN, few = narrow(args_);
    const Expected expected = {adds ? of_layer_ : normed_, phase_ == O ? live_ : ~0u};
    if (adds) normed_ ^= 1;
    if (phase_ == GATE_UP) put_padding(Q::HIDDEN, P::FFN + P::FFN % 2, P::Down::COLUMNS_PADDED, of_layer_);
    const u32 early = adds && mine < end ? *(const u32*)(gamma + mine) : 0;  // on its way before it is needed
    SampleProduct<P>(args_, expected).run(at_, phase_, where_, [&](int row, int column, const float (&y)[4]) {
      const float first = adds ? PAIR_UNSCALE : words().scales[column], second = adds ? PAIR_UNSCALE : words().scales[column + 8];
      const float z[4] = {y[0] * first, y[1] * first, y[2] * second, y[3] * second};
      if (phase_ == GATE_UP) {  // rows alternate: gate 0, up 0, gate 1, up 1, ...
        const float a = silu(z[0]) * z[1], b = silu(z[2]) * z[3], next_a = shuffle_xor(a, 1), next_b = shuffle_xor(b, 1);
        if (row >= end || row % 4) return;
        put_pair(sample_activation(args_, Q::HIDDEN, row / 2, column), a, next_a, of_layer_);
        if (!few) put_pair(sample_activation(args_, Q::HIDDEN, row / 2, column + 8), b, next_b, of_layer_);
        return;
      }
      if (row >= end) return;
      if (adds) {
        add(row == mine ? early : *(const u32*)(gamma + row), row, column, z, false);
      } else if (phase_ == QKV) {
        float* to = this->template array<float>(Q::QKV_RESULTS) + row;
        put_two(to + column * P::Qkv::ROWS, z[0], z[1]);
        if (!few) put_two(to + (column + 8) * P::Qkv::ROWS, z[2], z[3]);
      } else {
        KOGC_UNROLL for (int h = 0; h < 2; h++) KOGC_UNROLL for (int e = 0; e < 2; e++)
          if (row + e < end) consider(row + e, column + 8 * h, z[2 * h + e], best_[h]);
      }
    });
  }

  KOGC_DEVICE void put_two(float* to, float a, float b) {
    put(to, a, of_layer_);
    put(to + 1, b, of_layer_);
  }

  // --- attention -----------------------------------------------------------------------------------------------------------
  // Query, key or value `row` of a sample's QKV results, normed and rotated as it must be.
  KOGC_DEVICE HeadVector<P> vector(int sample, int row, bool value) {
    const bool key = row >= P::Q_ROWS;
    const float* results = this->template array<float>(Q::QKV_RESULTS) + sample * P::Qkv::ROWS + row;
    const u16* bias = args_.qkv_bias + (u64)where_.layer * P::Qkv::ROWS + row;
    HeadVector<P> v;
    if (!value) v.fetch(args_.qk_norms + (where_.layer * 2 + key) * (u64)P::HEAD_DIM, args_.rope + (u64)position() * P::HEAD_DIM);
    v.take_from(results, of_layer_, where_);
    if constexpr (P::QKV_BIAS) v.add([&](int d) { return to_float<P::FP16>(bias[d]); });
    if (value) return v;
    if constexpr (P::QK_NORM) v.normalise();
    v.rotate();
    return v;
  }

  KOGC_DEVICE void attention() {
    int item = block();
#pragma unroll 1
    for (int sample = 0, before = 0; sample < args_.n_samples; sample++) {
      if (!(live_ >> sample & 1)) continue;
      for (; item < before + P::KV_HEADS; item += P::BLOCKS) {
        SampleAttention<P> attention(args_, where_.layer, position(), sample, item - before);
        attention.run([&](int row, bool value) { return vector(sample, row, value); },
                      [&](int column, const float (&o)[4]) {
                        u32* to = sample_activation(args_, Q::ATTENDED, column, sample);
                        put_pair(to, o[0], o[1], of_layer_);
                        put_pair(to + next_pair(args_), o[2], o[3], of_layer_);
                      });
      }
      before += P::KV_HEADS;
    }
    put_padding(Q::ATTENDED, P::Q_ROWS, P::O::COLUMNS_PADDED, of_layer_);
  }

  // --- the choice of the tokens --------------------------------------------------------------------------------------------
  KOGC_DEVICE void consider(int row, int column, float logit, u64& best) {
    if (column >= args_.n_samples) return;
    if (args_.logits_log) args_.logits_log[((u64)where_.step * args_.n_samples + column) * P::VOCAB + row] = logit;
    if (args_.choice) sample_logits<P>(args_, column)[row] = logit;
    best = larger(best, key_of(logit, row));
  }

  // All blocks learn the next token of each sample, and which of them go on.
  KOGC_DEVICE bool choose() {
    if (args_.choice) drawn();
    else largest();
    const int self = thread();
    if (self < args_.n_samples && (live_ >> self & 1)) {
      const i32 token = words().tokens[self];
      bool ended = this->template array<volatile i32>(Q::HALTED)[self];
      for (int i = 0; i < args_.n_stop; i++) ended = ended || token == args_.stop[i];
      words().ended[self] = ended;
      if (block() == 0) store_host(args_.tokens + (u64)self * args_.max_new + where_.step, token);
    }
    sync();
    u32 ended = 0;
    for (int i = 0; i < args_.n_samples; i++) ended |= (u32)(words().ended[i] != 0) << i;
    live_ = (u32)scalar((int)(live_ & ~ended));
    return live_;
  }

  KOGC_DEVICE void largest() {
    KOGC_UNROLL for (int h = 0; h < 2; h++) {
      best_[h] = larger(best_[h], shuffle_xor(best_[h], 1));
      best_[h] = larger(best_[h], shuffle_xor(best_[h], 2));
      if ((lane() & 3) == 0) words().keys[warp()][lane() / 4 + 8 * h] = best_[h];
    }
    sync();
    if (thread() < COLUMNS) {
      u64 best = 0;
      KOGC_UNROLL for (int w = 0; w < WARPS; w++) best = larger(best, words().keys[w][thread()]);
      this->template array<u64>(Q::KEYS)[thread() * P::BLOCKS + block()] = best;
    }
    next<true>();
    constexpr int PARTS = THREADS / COLUMNS, EACH = (P::BLOCKS + PARTS - 1) / PARTS;
    const int column = thread() / PARTS, part = thread() % PARTS;
    const u64* keys = this->template array<u64>(Q::KEYS) + column * P::BLOCKS;
    u64 v[EACH], best = 0;
    KOGC_UNROLL for (int i = 0; i < EACH; i++) v[i] = part + i * PARTS < P::BLOCKS ? keys[part + i * PARTS] : 0;
    KOGC_UNROLL for (int i = 0; i < EACH; i++) best = larger(best, v[i]);
    for (int m = 1; m < PARTS; m *= 2) best = larger(best, shuffle_xor(best, m));
    if (part == 0 && column < args_.n_samples && (live_ >> column & 1)) words().tokens[column] = row_of(best);
    sync();
  }

  KOGC_DEVICE void drawn() {
    next<true>();
    i32* tokens = this->template array<i32>(Q::TOKENS_CHOSEN);
    constexpr int GROUPS = P::BLOCKS / Group::BLOCKS;
#pragma unroll 1
    for (int sample = block() / Group::BLOCKS; sample < args_.n_samples && block() < GROUPS * Group::BLOCKS; sample += GROUPS) {
      if (!(live_ >> sample & 1)) continue;
      const i32 token = choose_token<P>(args_, sample, where_.step);
      if (Group::rank() == 0 && thread() == 0) tokens[sample] = token;
    }
    next<true>();
    if (thread() < args_.n_samples && (live_ >> thread() & 1)) words().tokens[thread()] = ((volatile i32*)tokens)[thread()];
    sync();
  }

  u32 live_;  // bit i: sample i goes on
  Where where_;
  PassCursor<S> at_;
  int phase_ = QKV;
  u32 of_layer_ = 0;  // parity of what a layer puts but for the stream: results of QKV, attention and hidden vector
  u64 best_[2] = {};  // keys of this thread's rows, of its two columns
};

template <class P> KOGC_DEVICE void samples(const SampleArgs& args) {
  SampleWords& words = sample_words<P>();
  for (int phase = thread(); phase <= HEAD; phase += block_threads()) words.phases[phase] = sample_phase<P>(phase);
  for (int i = thread(); i < COLUMNS; i += block_threads()) words.ended[i] = 0;
  if (thread() == 0) words.finished = words.met = words.passed = 0;
  if (warp() < PRODUCER) init_words<Choosers<P>>();
  if (thread() == 0) kogc::words<Choosers<P>>().stop = 0;
  SampleRing<P>::init();
  if (scalar(warp()) == PRODUCER + WEIGHT_PRODUCERS) return SampleActivations<P>(args).run();
  if (scalar(warp()) >= PRODUCER) return SampleWeights<P>(args).run();
  SampleSteps<P> steps(args);
#pragma unroll 1
  for (int step = 0; step < args.max_new; step++)
    if (!scalar(steps.step(step))) break;
  sync();
  if (thread() == 0) words.finished = 1;
}

}  // namespace kogc
