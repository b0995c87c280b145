// The stream of a pass: a stage holds a slice of columns, the weights of a block's rows there and the activations of all
// tokens. Weights are known in advance and go ahead as far as the ring allows; the activations of a stage follow when the
// phase that makes them has ended in all blocks.
//
// A stage takes up to 64 copies of a kilobyte or two, and issuing one takes a warp some 70 ns: several warps share them, each
// on its own way through the same walk. The lanes of a warp decide alike.
#pragma once

namespace kogc {

constexpr int PASS_PRODUCERS = 4;

template <class P> struct PassRing {
  using Q = typename P::Pass;
  static KOGC_DEVICE char* stage(int slot) { return shared() + slot * Q::STAGE_BYTES; }
  static KOGC_DEVICE Barrier* full(int slot) { return (Barrier*)(shared() + Q::BARRIERS_OFFSET) + slot; }
  static KOGC_DEVICE Barrier* empty(int slot) { return full(slot) + Q::STAGES; }

  static KOGC_DEVICE void init(int arrivals) {
    if (thread() == 0) {
      for (int i = 0; i < Q::STAGES; i++) {
        barrier_init(full(i), arrivals);
        barrier_init(empty(i), WARPS);
      }
      barrier_init_done();
    }
    sync_block();
  }
};

template <class P> using PassCursor = Cursor<typename P::Pass>;

// Where weights of a unit of rows lie: any block's slab.
template <class P> struct Slabs {
  template <class M> static KOGC_DEVICE int units_of(int owner) {
    const int rank = owner - M::ROTATION;
    return M::BASE + ((rank < 0 ? rank + P::BLOCKS : rank) < M::REMAINDER);
  }
  template <class M> static constexpr int UNIT_BYTES = M::UNIT * M::COLUMNS_PADDED * 2;
  template <class M> static KOGC_DEVICE u32 bytes_of(int owner) { return units_of<M>(owner) * UNIT_BYTES<M>; }

  template <class M> static KOGC_DEVICE const u8* find(const KernelArgs& args, int layer, int phase, int unit) {
    constexpr int LONG = M::REMAINDER * (M::BASE + 1), SHORT = M::BASE ? M::BASE : 1;  // units of the blocks that have one more
    const int rank = unit < LONG ? unit / (M::BASE + 1) : M::REMAINDER + (unit - LONG) / SHORT;
    const int first = rank * M::BASE + (rank < M::REMAINDER ? rank : M::REMAINDER);
    const int owner = rank + M::ROTATION < P::BLOCKS ? rank + M::ROTATION : rank + M::ROTATION - P::BLOCKS;
    const u32 qkv = bytes_of<typename P::Qkv>(owner), o = bytes_of<typename P::O>(owner), gate_up = bytes_of<typename P::GateUp>(owner);
    const u32 before = (phase > QKV ? qkv : 0) + (phase > O ? o : 0) + (phase > GATE_UP ? gate_up : 0);
    const u32 layer_bytes = qkv + o + gate_up + bytes_of<typename P::Down>(owner);
    return args.slabs + owner * P::SLAB_BYTES + (u64)layer * layer_bytes + before + (u32)(unit - first) * UNIT_BYTES<M>;
  }
  static KOGC_DEVICE const u8* unit(const KernelArgs& args, int layer, int phase, int i) {
    switch (phase) {
      case QKV: return find<typename P::Qkv>(args, layer, phase, i);
      case O: return find<typename P::O>(args, layer, phase, i);
      case GATE_UP: return find<typename P::GateUp>(args, layer, phase, i);
      default: return find<typename P::Down>(args, layer, phase, i);
    }
  }
};

// This block's part of a phase, slice by slice of columns; with more tiles than are multiplied at once, in several sweeps.
// P::Pass is a plan of passes or of samples; `words` finds what its phases differ in.
enum Moved { SAME_ROWS, OTHER_ROWS, PHASE_ENDED };
template <class P, auto& (*words)()> struct Slices {
  int phase = QKV, sweep = 0, fragment = 0;  // sweep, fragment: first tile and fragment at hand, from the part's own

  KOGC_DEVICE const auto& now() const { return words().phases[phase]; }
  KOGC_DEVICE int tiles() const { return smaller(now().tiles - sweep, P::Pass::SWEEP_TILES); }
  KOGC_DEVICE int fragments() const { return smaller(now().fragments - fragment, now().slice); }

  KOGC_DEVICE Moved advance() {
    fragment += now().slice;
    if (fragment < now().fragments) return SAME_ROWS;
    fragment = 0;
    sweep += P::Pass::SWEEP_TILES;
    return sweep < now().tiles ? OTHER_ROWS : PHASE_ENDED;
  }

 private:
  static KOGC_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
};

template <class P> using PassSlices = Slices<P, pass_words<P>>;

// The same through all phases, layers and passes, in the order in which the consumers meet them.
template <class P> class PassWalk {
 public:
  PassSlices<P> slices;
  PassCursor<P> at;
  int layer = 0;

  KOGC_DEVICE PassWalk(const KernelArgs& args) : args_(args) { skip_empty(); }
  KOGC_DEVICE bool ended() const { return first_ >= args_.n_prompt; }
  // How often all blocks have met when the activations of the slice at hand are there.
  KOGC_DEVICE u32 meetings() const { return PassOrder<P>::before(first_ / P::Pass::TOKENS, layer, slices.phase); }

  KOGC_DEVICE Moved advance() {
    at.advance();
    const Moved moved = slices.advance();
    if (moved == PHASE_ENDED) {
      next_phase();
      skip_empty();
    }
    return moved;
  }

 private:
  KOGC_DEVICE void next_phase() {
    slices.sweep = 0;
    if (layer < P::LAYERS - 1 && ++slices.phase <= DOWN) return;  // of the last layer only keys and values are wanted
    slices.phase = QKV;
    if (++layer < P::LAYERS) return;
    layer = 0;
    first_ += P::Pass::TOKENS;
  }
  KOGC_DEVICE void skip_empty() {
    while (!ended() && !slices.now().tiles) next_phase();
  }

  const KernelArgs& args_;
  int first_ = 0;  // token of the pass
};

template <class P> class PassProducer {
  using Q = typename P::Pass;
  static_assert(Q::SWEEP_TILES * TILE_ROWS / 4 <= LANES * PASS_PRODUCERS, "a unit a lane");

 public:
  KOGC_DEVICE PassProducer(const KernelArgs& args) : args_(args), weights_(args), activations_(args), where_{args, 0, 0} {}

  KOGC_DEVICE void run() {
    if (!weights_.ended()) find_units();
    Spin spin;
    while (!activations_.ended()) {
      bool moved = false;
      if (room()) {
        copy_weights();
        if (weights_.advance() != SAME_ROWS && !weights_.ended()) find_units();
        ahead_++;
        moved = true;
      }
      if (ahead_ && activated()) {
        copy_activations();
        activations_.advance();
        ahead_--;
        moved = true;
      }
      if (moved) {
        spin = {};
        continue;
      }
      if (all_lanes(pass_words<P>().finished) && !room()) break;  // asked again: all warps must end at one stage
      spin.step(where_, STAGE_EMPTY, weights_.at.parity);
    }
    drain();
  }

 private:
  // Whether there are weights to copy, and a stage for them.
  KOGC_DEVICE bool room() const {
    return !weights_.ended() && all_lanes(barrier_test(PassRing<P>::empty(weights_.at.slot), weights_.at.parity ^ 1));
  }

  // Whether the activations of the next stage are there.
  KOGC_DEVICE bool activated() {
    const u32 needed = activations_.meetings() * P::BLOCKS;
    if (seen_ >= needed) return true;
    if (lane() == 0) seen_ = load_acquired(grid_count(args_));
    seen_ = shuffle_from(seen_, 0);
    sync_warp();
    if (seen_ < needed) return false;
    fence_copies();
    return true;
  }

  static KOGC_DEVICE int producer() { return warp() - PRODUCER; }

  // This lane's unit of the sweep at hand.
  KOGC_DEVICE void find_units() {
    const PassPhase& p = weights_.slices.now();
    const int i = (p.first_tile + weights_.slices.sweep) * (TILE_ROWS / p.unit) + lane() * PASS_PRODUCERS + producer();
    from_ = i < p.units ? Slabs<P>::unit(args_, weights_.layer, weights_.slices.phase, i) + p.first_fragment * FRAGMENT_BYTES : nullptr;
  }

  KOGC_DEVICE void copy_weights() {
    const PassPhase& p = weights_.slices.now();
    const int of_tile = TILE_ROWS / p.unit, bytes = weights_.slices.fragments() * FRAGMENT_BYTES, stride = p.slice * FRAGMENT_BYTES;
    const int left = p.units - (p.first_tile + weights_.slices.sweep) * of_tile, wanted = weights_.slices.tiles() * of_tile;
    const int units = left < wanted ? left : wanted;  // the last tile may have fewer
    const int own = (units - producer() + PASS_PRODUCERS - 1) / PASS_PRODUCERS;
    Barrier* full = PassRing<P>::full(weights_.at.slot);
    expect_pieces(full, own * bytes);
    copy_pieces(own, PassRing<P>::stage(weights_.at.slot) + producer() * stride, PASS_PRODUCERS * stride,
                from_ + weights_.slices.fragment * FRAGMENT_BYTES, bytes, full, policy_);
    end_pieces(full);
  }

  KOGC_DEVICE void copy_activations() {
    const PassPhase& p = activations_.slices.now();
    const int column_bytes = 256 / p.unit * Q::TOKENS * 2;  // of the columns of a fragment
    const int all = activations_.slices.fragments() * column_bytes, bytes = all / PASS_PRODUCERS;
    const u8* from = args_.scratch + p.x + (p.first_fragment + activations_.slices.fragment) * column_bytes;
    Barrier* full = PassRing<P>::full(activations_.at.slot);
    expect_pieces(full, bytes);
    copy_pieces(1, PassRing<P>::stage(activations_.at.slot) + Q::STAGE_BYTES - all + producer() * bytes, 0, from + producer() * bytes, bytes, full, keep_);
    end_pieces(full);
  }

  // A block may not leave while copies into its shared memory are under way. Stages that nobody will read any more get no
  // activations, but the arrival that stands for them.
  KOGC_DEVICE void drain() {
    for (; ahead_ > 0; ahead_--, activations_.at.advance()) {
      expect_pieces(PassRing<P>::full(activations_.at.slot), 0);
      end_pieces(PassRing<P>::full(activations_.at.slot));
    }
    for (int slot = 0; slot < Q::STAGES; slot++) {
      const u32 parity = weights_.at.parity ^ (slot < weights_.at.slot ? 0 : 1);  // of the slot's last use
      Spin spin;
      while (!all_lanes(barrier_test(PassRing<P>::full(slot), parity))) spin.step(where_, STAGE_FULL, parity);
    }
  }

  const KernelArgs& args_;
  const CachePolicy policy_ = read_once(), keep_ = read_again();
  PassWalk<P> weights_, activations_;
  const u8* from_ = nullptr;
  int ahead_ = 0;  // stages whose weights are on their way, and whose activations are not
  u32 seen_ = 0;
  Where where_;
};

}  // namespace kogc
