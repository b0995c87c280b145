// The stream of samples: as that of a pass, over all rows of the block's own slab, the vocabulary projection's too, step
// after step. Weights go ahead as far as the ring allows, into the next step if need be; activations follow the meetings.
// They have a warp of their own: a stage costs a warp as much time as it takes to issue its copies, and most is the weights'.
#pragma once

namespace kogc {

constexpr int WEIGHT_PRODUCERS = PASS_PRODUCERS - 1;

// A stage has two barriers: `full`, when its activations have arrived, and `landed` for its weights.
template <class P> struct SampleRing : PassRing<Sampled<P>> {
  using Base = PassRing<Sampled<P>>;
  static KOGC_DEVICE Barrier* landed(int slot) { return Base::empty(slot) + P::Samples::STAGES; }
  static KOGC_DEVICE void init() {
    if (thread() == 0)
      for (int i = 0; i < P::Samples::STAGES; i++) barrier_init(landed(i), PIECE_COPIERS * WEIGHT_PRODUCERS);
    Base::init(PIECE_COPIERS);
  }
};

template <class P> KOGC_DEVICE const u8* sample_weights(const KernelArgs& args, int layer, int phase, int unit, int first_unit) {
  using S = Slabs<P>;
  if (phase != HEAD) return S::unit(args, layer, phase, unit);
  const u32 of_layer = S::template bytes_of<typename P::Qkv>(block()) + S::template bytes_of<typename P::O>(block()) +
                       S::template bytes_of<typename P::GateUp>(block()) + S::template bytes_of<typename P::Down>(block());
  return args.slabs + block() * P::SLAB_BYTES + (u64)P::LAYERS * of_layer + (u32)(unit - first_unit) * S::template UNIT_BYTES<typename P::Head>;
}

template <class P> using SampleSlices = Slices<Sampled<P>, sample_words<P>>;

template <class P> class SampleWalk {
 public:
  SampleSlices<P> slices;
  PassCursor<Sampled<P>> at;
  int step = 0, layer = 0;

  KOGC_DEVICE SampleWalk(const SampleArgs& args) : args_(args) { skip_empty(); }
  KOGC_DEVICE bool ended() const { return step >= args_.max_new; }
  KOGC_DEVICE u32 meetings() const { return SampleOrder<P>::before(args_, step, layer, slices.phase); }
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
    if (slices.phase == HEAD) {
      slices.phase = QKV;
      layer = 0;
      step++;
    } else if (++slices.phase == HEAD && ++layer < P::LAYERS) {
      slices.phase = QKV;
    }
  }
  KOGC_DEVICE void skip_empty() {
    while (!ended() && !slices.now().tiles) next_phase();
  }

  const SampleArgs& args_;
};

// A producer follows the walk until it ends, or the consumers have finished.
template <class P> class SampleProducer : protected SampleWalk<P> {
 protected:
  using Q = typename P::Samples;
  using Ring = SampleRing<P>;
  using SampleWalk<P>::slices;
  using SampleWalk<P>::at;

  KOGC_DEVICE SampleProducer(const SampleArgs& args) : SampleWalk<P>(args), args_(args), where_{args, 0, 0} {}

  KOGC_DEVICE bool empty() const { return all_lanes(barrier_test(Ring::empty(at.slot), at.parity ^ 1)); }

  // Waits until ready(); false when the consumers have finished before that.
  template <class Ready> KOGC_DEVICE bool wait(Ready ready) {
    Spin spin;
    while (!ready()) {
      if (all_lanes(sample_words<P>().finished)) return ready();  // what is asked may have come first
      spin.step(where_, STAGE_EMPTY, at.parity);
    }
    return true;
  }

  const SampleArgs& args_;
  Where where_;
};

// Weights: each lane has a unit of the sweep at hand. At most IN_FLIGHT stages are on their way at once, since what blocks
// tell each other, and the activations, would queue behind them. The warps by themselves fill the ring, also when nobody will
// read it any more: so all end at the same stage.
template <class P> class SampleWeights : SampleProducer<P> {
  using Base = SampleProducer<P>;
  using typename Base::Q;
  using typename Base::Ring;
  static_assert(Q::SWEEP_TILES * COLUMN_ROWS / 4 <= LANES * WEIGHT_PRODUCERS, "a unit a lane");

 public:
  KOGC_DEVICE SampleWeights(const SampleArgs& args) : Base(args) {}

  KOGC_DEVICE void run() {
    find_units();
    while (!this->ended() && this->wait([&] { return this->empty(); })) {
      if (in_flight_ == Q::IN_FLIGHT) land();
      copy();
      if (this->advance() != SAME_ROWS) find_units();
    }
    while (in_flight_) land();  // a block may not leave while copies into its shared memory are under way
  }

 private:
  static KOGC_DEVICE int producer() { return warp() - PRODUCER; }

  KOGC_DEVICE void find_units() {
    if (this->ended()) return;
    const SamplePhase& p = this->slices.now();
    const int of_tile = COLUMN_ROWS / p.unit, left = p.units - this->slices.sweep * of_tile, wanted = this->slices.tiles() * of_tile;
    const int i = this->slices.sweep * of_tile + producer() + lane() * WEIGHT_PRODUCERS;
    own_ = ((left < wanted ? left : wanted) - producer() + WEIGHT_PRODUCERS - 1) / WEIGHT_PRODUCERS;  // the last tile may have fewer
    from_ = i < p.units ? sample_weights<P>(this->args_, this->layer, this->slices.phase, p.first_unit + i, p.first_unit) : nullptr;
  }

  KOGC_DEVICE void copy() {
    const int bytes = this->slices.fragments() * FRAGMENT_BYTES, stride = this->slices.now().slice * FRAGMENT_BYTES;
    Barrier* landed = Ring::landed(this->at.slot);
    expect_pieces(landed, own_ * bytes);
    copy_pieces(own_, Ring::stage(this->at.slot) + producer() * stride, WEIGHT_PRODUCERS * stride, from_, bytes, landed, policy_);
    end_pieces(landed);
    from_ += bytes;
    in_flight_++;
  }

  // Waits for the oldest stage on its way.
  KOGC_DEVICE void land() {
    Spin spin;
    while (!all_lanes(barrier_passed(Ring::landed(oldest_.slot), oldest_.parity))) spin.step(this->where_, STAGE_FULL, oldest_.parity);
    oldest_.advance();
    in_flight_--;
  }

  const CachePolicy policy_ = read_once();
  const u8* from_ = nullptr;
  int own_ = 0;  // units of this warp in the sweep
  int in_flight_ = 0;
  PassCursor<Sampled<P>> oldest_;
};

// Activations: a stage's when all blocks have made them.
template <class P> class SampleActivations : SampleProducer<P> {
  using Base = SampleProducer<P>;
  using typename Base::Q;
  using typename Base::Ring;

 public:
  KOGC_DEVICE SampleActivations(const SampleArgs& args) : Base(args) {}

  KOGC_DEVICE void run() {
    while (!this->ended() && this->wait([&] { return made() && this->empty(); })) {
      copy();
      this->advance();
    }
    // Nothing is under way: the consumers have waited for all that was copied.
  }

 private:
  // Whether all blocks have met as often as the stage's activations need: the consumers tell.
  KOGC_DEVICE bool made() {
    const u32 needed = this->meetings();
    if (seen_ == needed) return true;
    if (!all_lanes((i32)(published(&sample_words<P>().passed) - needed) >= 0)) return false;
    seen_ = needed;
    fence_copies();
    return true;
  }

  KOGC_DEVICE void copy() {
    const SamplePhase& p = this->slices.now();
    const int of_fragment = (p.unit == 8 ? 1 : 2) * step_bytes(narrow(this->args_));  // bytes that its columns meet
    const int bytes = this->slices.fragments() * of_fragment;
    Barrier* full = Ring::full(this->at.slot);
    expect_pieces(full, bytes);
    copy_pieces(1, Ring::stage(this->at.slot) + Q::STAGE_BYTES - p.slice * of_fragment, 0, this->args_.scratch + p.x + this->slices.fragment * of_fragment,
                bytes, full, keep_);
    end_pieces(full);
  }

  const CachePolicy keep_ = read_again();
  u32 seen_ = 0;
};

}  // namespace kogc
