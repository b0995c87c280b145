// A prompt, pass by pass: keys and values of its tokens come to be in the cache, and nothing else. The mathematics of a
// vector (norms, rotation, activation) is that of common/; what is different is that between phases all blocks meet, that
// a phase's results lie in memory, and that a block does of each phase what the plan of the pass gives it.
//
// What a token's keys and values are does not depend on its place in a pass: each column of a product is summed by itself,
// in an order that is the same for all. So a prompt cut in another place gives the same bits.
#pragma once

namespace kogc {

template <class P> class PromptPass {
  using Q = typename P::Pass;
  struct alignas(8) Two { float a, b; };
  template <class S> using Results = Parts<P, S::SPLITS, S::TILES * TILE_ROWS>;

 public:
  KOGC_DEVICE PromptPass(const KernelArgs& args) : args_(args), where_{args, 0, 0} {}

  // Takes the tokens from `first` on through the layers. False: the host asks to stop.
  KOGC_DEVICE bool run(int first) {
    where_.step = first;
    where_.layer = 0;
    phase_ = QKV;
#pragma unroll 1
    for (;;) {
      if (phase_ == O) {
        keys_and_values();
        if (where_.layer == P::LAYERS - 1) return true;  // nothing else of the last layer is wanted
        next();
        attention();
      } else if (phase_ != DOWN) {
        rows();
      }
      const bool begins = phase_ == QKV && where_.layer == 0;
      if (begins) stop();
      if (phase_ != DOWN) next();
      if (begins && stopped()) return false;
      product();
      next();
      if (++phase_ == LAYER_PHASES) {
        phase_ = QKV;
        where_.layer++;
      }
    }
  }

 private:
  KOGC_DEVICE void next() { meet<P>(args_, where_); }
  KOGC_DEVICE int first() const { return where_.step; }  // token of the prompt
  KOGC_DEVICE int count() const { return args_.n_prompt - first() < Q::TOKENS ? args_.n_prompt - first() : Q::TOKENS; }

  // Whether the host asks to stop: one block looks, and after the next meeting all know.
  KOGC_DEVICE void stop() {
    if (block() == 0 && thread() == 0) *grid_stop(args_) = load_host(args_.stop_word);
  }
  KOGC_DEVICE bool stopped() {
    if (thread() == 0) pass_words<P>().stop = *(volatile i32*)grid_stop(args_);
    sync();
    return pass_words<P>().stop;
  }

  // The residual stream of each token, in one block: what the phase before adds, and its normed form.
  KOGC_DEVICE void rows() {
    const bool after_attention = phase_ == GATE_UP;
    const u16* gamma = args_.norms + (u64)(2 * where_.layer + after_attention) * P::HIDDEN;
    for (int token = block(); token < count(); token += P::BLOCKS) {
      float* residual = (float*)(args_.scratch + Q::RESIDUAL) + token * P::HIDDEN;
      const u16* embedding = args_.embedding + (u64)args_.prompt[first() + token] * P::HIDDEN;
      if (after_attention) row(token, gamma, residual, [&](int i) { return residual[i] + parts<typename Q::O>(Q::O_PARTS, token).row(i); });
      else if (where_.layer) row(token, gamma, residual, [&](int i) { return residual[i] + parts<typename Q::Down>(Q::DOWN_PARTS, token).row(i); });
      else row(token, gamma, residual, [&](int i) { return to_float<P::FP16>(embedding[i]); });
    }
  }

  template <class Value> KOGC_DEVICE void row(int token, const u16* gamma, float* residual, Value value) {
    constexpr int OWN = (P::HIDDEN + THREADS - 1) / THREADS;
    float v[OWN] = {}, squares = 0;
    KOGC_UNROLL for (int k = 0; k < OWN; k++) if (owns(k)) v[k] = value(own(k));  // all on their way before the first is stored
    KOGC_UNROLL for (int k = 0; k < OWN; k++) {
      if (owns(k)) residual[own(k)] = v[k];
      squares += v[k] * v[k];
    }
    const float scale = reciprocal_sqrt(total(squares) * (1.0f / P::HIDDEN) + P::NORM_EPS);
    KOGC_UNROLL for (int k = 0; k < OWN; k++)
      if (owns(k)) store_pass<P>(args_, Q::NORMED, own(k), token, from_float<P::FP16>(v[k] * scale * to_float<P::FP16>(gamma[own(k)])));
  }
  static KOGC_DEVICE int own(int k) { return thread() + k * THREADS; }
  static KOGC_DEVICE bool owns(int k) { return P::HIDDEN % THREADS == 0 || own(k) < P::HIDDEN; }

  KOGC_DEVICE float total(float v) {
    KOGC_UNROLL for (int m = LANES / 2; m; m /= 2) v += shuffle_xor(v, m);
    sync();  // the sums of the token before are read
    if (lane() == 0) pass_words<P>().sums[warp()] = v;
    sync();
    float sum = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++) sum += pass_words<P>().sums[w];
    return sum;
  }

  KOGC_DEVICE void product() {
    const PassPhase& p = pass_words<P>().phases[phase_];
    const int rows = p.rows_padded;
    float* parts = (float*)(args_.scratch + p.y) + p.split * (Q::TOKENS * rows);
    PassProduct<P>().run(at_, phase_, where_, [&](int row, int token, const float (&y)[4]) {
      if (phase_ == GATE_UP) {  // rows alternate: gate 0, up 0, gate 1, up 1, ...
        if (row / 2 >= P::FFN) return;
        store_pass<P>(args_, Q::HIDDEN, row / 2, token, from_float<P::FP16>(silu(y[0]) * y[1]));
        store_pass<P>(args_, Q::HIDDEN, row / 2, token + 8, from_float<P::FP16>(silu(y[2]) * y[3]));
      } else {
        *(Two*)(parts + token * rows + row) = {y[0], y[1]};
        *(Two*)(parts + (token + 8) * rows + row) = {y[2], y[3]};
      }
    });
  }

  // Query, key or value `row` of the QKV results, normed and rotated as it must be.
  KOGC_DEVICE HeadVector<P> vector(int token, int row, bool value) {
    const bool key = row >= P::Q_ROWS;
    const Results<typename Q::Qkv> results = parts<typename Q::Qkv>(Q::QKV_PARTS, token);
    const u16* bias = args_.qkv_bias + (u64)where_.layer * P::Qkv::ROWS;
    HeadVector<P> v;
    if (!value) v.fetch(args_.qk_norms + (where_.layer * 2 + key) * (u64)P::HEAD_DIM, args_.rope + (u64)(args_.start + first() + token) * P::HEAD_DIM);
    v.fill([&](int d) { return results.row(row + d) + (P::QKV_BIAS ? to_float<P::FP16>(bias[row + d]) : 0.0f); });
    if (value) return v;
    if constexpr (P::QK_NORM) v.normalise();
    v.rotate();
    return v;
  }

  KOGC_DEVICE void keys_and_values() {
    constexpr int EACH = 2 * P::KV_HEADS;
    for (int i = block() * WARPS + scalar(warp()); i < count() * EACH; i += P::BLOCKS * WARPS) {
      const int token = i / EACH, head = i % EACH % P::KV_HEADS, position = args_.start + first() + token;
      const bool value = i % EACH >= P::KV_HEADS;
      u8* chunk = chunk_address<P>(args_.kv, where_.layer, head, position / CHUNK);
      const int row = position % CHUNK;
      using Place = CachePlace<P>;
      to_cache(vector(token, P::Q_ROWS + i % EACH * P::HEAD_DIM, value),
          [&](int d, u16 x) { Place::put(chunk, value ? Place::value(row, d) : Place::key(row, d), x); },
          [&](u32 exponent) { chunk[Place::scale(row, value)] = (u8)exponent; });
    }
  }

  KOGC_DEVICE void attention() {
    for (int item = block(); item < PassAttention<P>::COUNT; item += P::BLOCKS) {
      PassAttention<P> attention;
      attention.run(args_, item, where_.layer, args_.start + first(), count(),
          [&](int token, int head) { return vector(token, head * P::HEAD_DIM, false); },
          [&](int token, int column, const float (&four)[4]) {
            store_pass<P>(args_, Q::ATTENDED, column, token, pack<P::FP16>(four[0], four[1], four[2], four[3]));
          });
    }
  }

  template <class S> KOGC_DEVICE Results<S> parts(int y, int token) const { return Results<S>(args_, y, token); }

  const KernelArgs& args_;
  Where where_;
  PassCursor<P> at_;
  int phase_ = QKV;
};

template <class P> KOGC_DEVICE void prompt(const KernelArgs& args) {
  PassWords& words = pass_words<P>();
  for (int phase = thread(); phase < LAYER_PHASES; phase += block_threads()) words.phases[phase] = pass_phase<P>(phase);
  if (thread() == 0) words.finished = words.met = 0;
  PassRing<P>::init(2 * PIECE_COPIERS * PASS_PRODUCERS);  // weights and activations arrive by themselves
  if (scalar(warp()) >= PRODUCER) return PassProducer<P>(args).run();
  PromptPass<P> pass(args);
#pragma unroll 1
  for (int first = 0; first < args.n_prompt; first += P::Pass::TOKENS)
    if (!scalar(pass.run(first))) break;
  sync();
  if (thread() == 0) words.finished = 1;
}

}  // namespace kogc
