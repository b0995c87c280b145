// A pass takes P::Pass::TOKENS tokens of a prompt through the layers at once (kogc/plan/passes.py): where its activations and
// partial results lie, what of a phase is this block's, and how all blocks wait for one another between phases.
#pragma once

namespace kogc {

constexpr int TILE_ROWS = 16;      // of a tensor-core tile: the weights that a warp multiplies at once
constexpr int FRAGMENT_BYTES = 512;
constexpr int STEP_COLUMNS = 32;   // columns that a lane's 16 bytes of a tile's row take part in
constexpr int TOKEN_TILE = 16;     // tokens of a tensor-core tile
constexpr int HALVES = 2;          // warps that share a tile of rows, each with half of the tokens

// A block's part of a phase's product: `tiles` tiles of rows by `fragments` fragments of their units.
struct Part { int first_tile, tiles, first_fragment, fragments; };

template <class M> struct Tiled {
  static constexpr int UNITS_OF_TILE = TILE_ROWS / M::UNIT, FRAGMENT_COLUMNS = 256 / M::UNIT;
  static constexpr int FRAGMENTS = M::COLUMNS_PADDED / FRAGMENT_COLUMNS;
};

template <class P, class M, class S> KOGC_DEVICE Part part() {
  if (block() >= S::GROUPS * S::SPLITS) return {0, 0, 0, 0};
  const int group = block() % S::GROUPS, split = block() / S::GROUPS;
  const int tile = group * S::TILES / S::GROUPS, tile_end = (group + 1) * S::TILES / S::GROUPS;
  const int fragment = split * Tiled<M>::FRAGMENTS / S::SPLITS, fragment_end = (split + 1) * Tiled<M>::FRAGMENTS / S::SPLITS;
  return {tile, tile_end - tile, fragment, fragment_end - fragment};
}

// What the phases of a pass differ in. One instance of the code serves all: these are read, not compiled in.
struct PassPhase : Part {
  int unit, units, slice;  // rows of a unit; the phase's units; fragments of each in a stage
  int rows_padded;
  int x, y;                // activation and partial results, in bytes of the scratch memory
  int split;               // which of the partial results
};

template <class P, class M, class S> KOGC_DEVICE PassPhase pass_phase(int x, int y) {
  return {part<P, M, S>(), M::UNIT, M::BASE * P::BLOCKS + M::REMAINDER, S::SLICE, S::TILES * TILE_ROWS, x, y, block() / S::GROUPS};
}
template <class P> KOGC_DEVICE PassPhase pass_phase(int phase) {
  using Q = typename P::Pass;
  switch (phase) {
    case QKV: return pass_phase<P, typename P::Qkv, typename Q::Qkv>(Q::NORMED, Q::QKV_PARTS);
    case O: return pass_phase<P, typename P::O, typename Q::O>(Q::ATTENDED, Q::O_PARTS);
    case GATE_UP: return pass_phase<P, typename P::GateUp, typename Q::GateUp>(Q::NORMED, Q::HIDDEN);
    default: return pass_phase<P, typename P::Down, typename Q::Down>(Q::HIDDEN, Q::DOWN_PARTS);
  }
}

// The words that a block's threads share.
struct PassWords {
  PassPhase phases[LAYER_PHASES];
  float sums[WARPS];
  i32 stop, met;  // whether the host asks to stop; how often all blocks have met
  volatile i32 finished;
};
template <class P> KOGC_DEVICE PassWords& pass_words() { return *(PassWords*)(shared() + P::Pass::WORDS_OFFSET); }

// Activations lie as A operands: [32 columns][16 tokens][first or last four of eight columns][lane][16 bytes], a lane's being
// two columns of a token, the same of the token eight further on, and two columns more of both. The first of four columns:
// words 0 and 2 from there are the token's.
template <class P> KOGC_DEVICE u32* pass_activation(const KernelArgs& args, int x, int column, int token) {
  const int tile = column / STEP_COLUMNS * (P::Pass::TOKENS / TOKEN_TILE) + token / TOKEN_TILE, half = column % 8 / 4;
  const int lane = token % 8 * 4 + column % STEP_COLUMNS / 8;
  return (u32*)(args.scratch + x + ((tile * 2 + half) * LANES + lane) * 16) + token % TOKEN_TILE / 8;
}
template <class P> KOGC_DEVICE void store_pass(const KernelArgs& args, int x, int column, int token, Quad four) {
  u32* to = pass_activation<P>(args, x, column, token);
  to[0] = four.low;
  to[2] = four.high;
}
template <class P> KOGC_DEVICE void store_pass(const KernelArgs& args, int x, int column, int token, u16 one) {
  ((u16*)(pass_activation<P>(args, x, column, token) + column % 4 / 2 * 2))[column % 2] = one;
}

// The results of a phase for a token: of each row the sum over the splits, always in the same order.
template <class P, int SPLITS, int ROWS_PADDED> struct Parts {
  const float* from;
  KOGC_DEVICE Parts(const KernelArgs& args, int y, int token) : from((const float*)(args.scratch + y) + token * ROWS_PADDED) {}
  KOGC_DEVICE float row(int i) const {
    float v[SPLITS], sum = 0;
    KOGC_UNROLL for (int s = 0; s < SPLITS; s++) v[s] = from[i + s * (P::Pass::TOKENS * ROWS_PADDED)];
    KOGC_UNROLL for (int s = 0; s < SPLITS; s++) sum += v[s];
    return sum;
  }
};

// --- between two phases all blocks meet: a count that only grows --------------------------------------------------------
// The barriers of a pass: eight in each layer, but in the last one, of which only keys and values are wanted.
template <class P> struct PassOrder {
  static constexpr int LAYER_BARRIERS = 8, BARRIERS = LAYER_BARRIERS * (P::LAYERS - 1) + 2;
  // Those that come before the product of a phase.
  static KOGC_DEVICE u32 before(int pass, int layer, int phase) {
    constexpr u32 AFTER[] = {1, 4, 6, 7};
    return pass * BARRIERS + layer * LAYER_BARRIERS + (phase == QKV ? AFTER[0] : phase == O ? AFTER[1] : phase == GATE_UP ? AFTER[2] : AFTER[3]);
  }
};

KOGC_DEVICE u32* grid_count(const KernelArgs& args) { return (u32*)args.scratch; }
KOGC_DEVICE i32* grid_stop(const KernelArgs& args) { return (i32*)args.scratch + 16; }

// No block goes on before all have come. RELEASED: what the consumers of any block have written before it, those of all see
// after it. met: how often, so far. passed(): what the first thread does then, before the others go on.
template <bool RELEASED, class Passed>
KOGC_DEVICE void meet_blocks(int blocks, i32& met, const KernelArgs& args, const Where& where, Passed passed) {
  sync();
  if (scalar(warp()) == 0) {  // which waits as one
    u32* count = grid_count(args);
    const u32 needed = ((u32)met + 1) * (u32)blocks;  // of a count that may pass its end
    if (lane() == 0) {
      if constexpr (RELEASED) add_released(count, 1);
      else add_word(count, 1);
    }
    for (Spin spin; !all_lanes((i32)((RELEASED ? load_acquired(count) : load_word(count)) - needed) >= 0);) spin.step(where, WAIT_PASS, needed);
    if (lane() == 0) {
      met++;
      passed();
    }
  }
  sync();
}
template <class P> KOGC_DEVICE void meet(const KernelArgs& args, const Where& where) {
  meet_blocks<true>(P::BLOCKS, pass_words<P>().met, args, where, [] {});
}

}  // namespace kogc
