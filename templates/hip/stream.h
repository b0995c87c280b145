// The weight stream. The registers of a compute unit are several times as large as its LDS, and a load may be on its way for
// as long as its register is not used: so the registers are the ring. Each wave loads the weights that it will multiply
// itself, 16 bytes a lane, into P::IN_FLIGHT slots, and a slot is loaded again as soon as it is multiplied: across phases,
// layers and tokens, whatever is awaited meanwhile. No copies, no producer, no barrier between load and product: the
// hardware counts a wave's loads, which come back in order, and the compiler waits for just the oldest.
//
// It can do so only if the slot of every load is known when it is compiled, and if no load is left out: a count that it does not
// know it must take for the smallest. So a part of the slab begins in that slot from which it ends in the last one, and
// slots before it are loaded for nothing, with what is loaded anyway.
#pragma once

namespace kogc {

constexpr int PIECE = LANES * 16;        // bytes that one load of a wave brings
constexpr int FRAGMENTS = PIECE / 512;   // of it
constexpr int ROUND = WARPS * PIECE;     // from a wave's piece to its next

template <class P> struct Generation;  // common/decoder.h
template <class P> KOGC_DEVICE int phase_at(int i);

template <class P> class Stream {
 public:
  // After init_words() and a barrier.
  KOGC_DEVICE Stream(const KernelArgs& args) : args_(args), slab_(args.slabs + (u64)block() * P::SLAB_BYTES), at_(slab_) {
    part_ = next();
    const u32 own = (u32)lane() * 16;
    KOGC_UNROLL for (int slot = 0; slot < SLOTS; slot++) {
      queue_[slot] = load(part_.from, part_.index(slot), own);
      keep_order();  // in the order in which they are waited for, here too: the loop is compiled for both
    }
  }

  // use(weights) for each of this wave's pieces of the next part, while those of the part after it are loaded.
  template <class Use> KOGC_DEVICE void walk(Use use) {
    const Part part = part_;
    part_ = next();
    const u32 own = (u32)lane() * 16;
    int skipped = part.skipped, piece = SLOTS - skipped;  // piece: of slot 0, in the round after the one at hand
#pragma unroll 1
    for (int left = part.rounds; left > 0; left--) {
      const u8* from = left > 1 ? part.from : part_.from;
      KOGC_UNROLL for (int slot = 0; slot < SLOTS; slot++) {
        if (slot >= skipped) use(queue_[slot]);
        queue_[slot] = load(from, left > 1 ? piece + slot : part_.index(slot), own);
        keep_order();
      }
      skipped = 0;
      piece += SLOTS;
    }
  }

 private:
  static constexpr int SLOTS = P::IN_FLIGHT;

  // Units whose sums are added up together, as this wave sees them.
  struct Part {
    const u8* from;  // its first piece
    int rounds;      // of all slots; at least one
    int skipped;     // slots of the first round

    KOGC_DEVICE int index(int slot) const { return slot > skipped ? slot - skipped : 0; }  // of the piece in the first round
  };

  static KOGC_DEVICE Words load(const u8* from, int piece, u32 own) { return load_once(from + (u64)(u32)piece * ROUND, own); }

  // The part after the last one asked for; an empty one after the end of the generation.
  KOGC_DEVICE Part next() {
    while (step_ < Generation<P>::steps(args_)) {
      if (index_ < Generation<P>::phases(args_, step_)) {
        const Work& work = words<P>().work[phase_at<P>(index_)];
        const int left = scalar(work.units) - unit_;
        if (left > 0) return take(left, scalar(work.unit * work.columns) * 2);
        index_++;
      } else {
        step_++;
        index_ = 0;
        at_ = slab_;
      }
      unit_ = 0;
    }
    return {slab_, 1, SLOTS};
  }

  KOGC_DEVICE Part take(int units_left, int unit_bytes) {
    const int units = units_left < P::PARTIAL_UNITS ? units_left : P::PARTIAL_UNITS;
    const int bytes = units * unit_bytes, mine = (bytes / PIECE - warp() + WARPS - 1) / WARPS;
    const int rounds = mine > 0 ? (mine + SLOTS - 1) / SLOTS : 1;
    const Part part = {mine > 0 ? at_ + warp() * PIECE : slab_, rounds, mine > 0 ? rounds * SLOTS - mine : SLOTS};
    at_ += bytes;
    unit_ += units;
    return part;
  }

  const KernelArgs& args_;
  const u8* const slab_;
  const u8* at_;  // the next part
  int step_ = 0, index_ = 0, unit_ = 0;  // and where it is: step, phase of the step, unit of the phase
  Part part_;     // the part whose first round is in the slots
  Words queue_[SLOTS];
};

// Nothing is copied for others: neither exchanges nor the cache need to tell the stream anything.
template <class P> KOGC_DEVICE void exchange_begins() {}
template <class P> KOGC_DEVICE void exchange_ends() {}
template <class P> KOGC_DEVICE void cache_written(const Where&) {}

}  // namespace kogc
