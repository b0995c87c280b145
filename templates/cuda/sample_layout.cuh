// Samples: up to 16 continuations of one prompt at a time, a column of the activations each. They stand at the same
// position, share each reading of the weights and the pages of the prompt, and have pages of their own from there on
// (kogc/plan/samples.py). A block multiplies the rows of its own slab with all columns, and all blocks meet between phases:
// what lies in memory between two meetings has one writer.
//
// What a block puts for others carries the parity of its use, as for a single stream: those who read it find out by
// themselves whether it has come. So a meeting need not wait until what was written before it has arrived everywhere, which
// takes as long as the rest of it. It only keeps a block from overwriting what others still read.
//
// No number of a column depends on another column, nor on how many there are: a sample is what it is alone, to the bit.
#pragma once

namespace kogc {

constexpr int COLUMNS = 16;       // of a tensor-core tile: samples
constexpr int COLUMN_ROWS = 8;    // rows of weights that a product takes as one tile
constexpr int MOST_OF_WARP = 4;   // tiles that a warp multiplies at a time
constexpr int NARROW = 8;         // samples that take half of the tile, and of what is read of the activations

// A plan whose pass is one of samples, for what passes of any width share.
template <class P> struct Sampled : P { using Pass = typename P::Samples; };

// Activations lie as A operands, as those of a pass do. Of 8 samples at most only half of the tile's rows are kept: a lane's
// 16 bytes are then all that it needs of 32 columns of weights.
KOGC_DEVICE bool narrow(const SampleArgs& args) { return args.n_samples <= NARROW; }
KOGC_DEVICE int step_bytes(bool narrow) { return STEP_COLUMNS * (narrow ? NARROW : COLUMNS) * 2; }

// The word of columns `column` and `column` + 1; that of the next two is `next_pair` words further.
KOGC_DEVICE u32* sample_activation(const SampleArgs& args, int x, int column, int sample) {
  const int step = column / STEP_COLUMNS, half = column % 8 / 4, pair = column % 4 / 2;
  const int lane = sample % 8 * 4 + column % STEP_COLUMNS / 8;
  u32* from = (u32*)(args.scratch + x);
  return narrow(args) ? from + (step * LANES + lane) * 4 + half * 2 + pair : from + ((step * 2 + half) * LANES + lane) * 4 + sample / 8 + 2 * pair;
}
KOGC_DEVICE int next_pair(const SampleArgs& args) { return narrow(args) ? 1 : 2; }

// What of a phase is this block's, and how a stage holds it.
struct SamplePhase {
  i32 first_unit, units, unit;       // of its own slab
  i32 first_row, end_row;
  i32 tiles, fragments, slice;       // of rows; of a unit; of a unit in a stage
  bool split;                        // few tiles: every warp takes all of them, and a part of the columns
  i32 x;                             // activation, in bytes of the scratch memory
};

template <class P, class M, class S> KOGC_DEVICE SamplePhase sample_phase(int x) {
  const Work work = share<P, M>(0);
  const int rows = work.units * M::UNIT, left = M::ROWS - work.first;
  return {work.first / M::UNIT, work.units, M::UNIT, work.first, work.first + (rows < left ? rows : left > 0 ? left : 0),
          (rows + COLUMN_ROWS - 1) / COLUMN_ROWS, Tiled<M>::FRAGMENTS, S::SLICE, S::SPLIT, x};
}
template <class P> KOGC_DEVICE SamplePhase sample_phase(int phase) {
  using Q = typename P::Samples;
  switch (phase) {
    case QKV: return sample_phase<P, typename P::Qkv, typename Q::Qkv>(Q::NORMED);
    case O: return sample_phase<P, typename P::O, typename Q::O>(Q::ATTENDED);
    case GATE_UP: return sample_phase<P, typename P::GateUp, typename Q::GateUp>(Q::NORMED);
    case DOWN: return sample_phase<P, typename P::Down, typename Q::Down>(Q::HIDDEN);
    default: return sample_phase<P, typename P::Head, typename Q::Head>(Q::NORMED);
  }
}

// The words that a block's threads share.
struct SampleWords {
  SamplePhase phases[HEAD + 1];
  float scales[COLUMNS];             // what multiplies the results of a product over normed columns
  float sums[COLUMNS][COLUMNS];      // of squares, and of what else a block adds up in parts
  u64 keys[WARPS][COLUMNS];
  i32 tokens[COLUMNS];               // chosen last
  u32 ended[COLUMNS];
  KernelArgs choice;                 // of the sample whose token this block helps to choose
  i32 met;                           // how often all blocks have met
  u32 passed;                        // the same, once it is so: what the producers wait for
  volatile i32 finished;
};
template <class P> KOGC_DEVICE SampleWords& sample_words() {
  static_assert(sizeof(SampleWords) <= P::Samples::WORDS_BYTES);
  return *(SampleWords*)(shared() + P::Samples::WORDS_OFFSET);
}

// Which activations a product takes: `parity`, that of their use; `columns`, those that were put.
struct Expected { u32 parity, columns; };

// How often blocks meet: after the embedding, four times a layer (not after QKV), and around the choice of the tokens.
template <class P> struct SampleOrder {
  static constexpr int LAYER_MEETINGS = 4;
  static KOGC_DEVICE u32 of_step(const KernelArgs& args) { return 1 + LAYER_MEETINGS * P::LAYERS + (args.choice ? 2 : 1); }
  // Those before the activations of a phase are there.
  static KOGC_DEVICE u32 before(const KernelArgs& args, int step, int layer, int phase) {
    const int of_layer = phase == QKV || phase == HEAD ? 0 : phase;
    return step * of_step(args) + 1 + layer * LAYER_MEETINGS + of_layer;
  }
};

}  // namespace kogc
