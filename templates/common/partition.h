// Which tokens a step takes, and which rows of a mat-vec phase this block holds: the arithmetic of kogc/plan/matvec.py.
// M: ROWS, COLUMNS, COLUMNS_PADDED, UNIT, BASE, REMAINDER, ROTATION.
#pragma once

namespace kogc {

// The mat-vec phases in the order of the slab: a layer's four, and the vocabulary projection.
enum Phase { QKV, O, GATE_UP, DOWN, HEAD };
constexpr int LAYER_PHASES = HEAD;
constexpr int ROWS_TOGETHER = 4;  // rows that a mat-vec hands on at once; units hold a multiple of it

// A block's share of a phase: `units` units of `unit` rows, from row `first` on, of `rows` true rows.
// `exchange` is where its results go, in bytes from the start of the exchange buffer.
struct alignas(16) Work { int units, unit, first, rows, columns, exchange; };

// A step takes one token, or as many of a prompt as a pass may have.
template <class P> KOGC_DEVICE int tokens_of(const KernelArgs& args, int step) {
  if constexpr (P::TOKENS == 1) return 1;
  const int left = args.n_prompt - step;
  return left < P::TOKENS ? left : P::TOKENS;
}

template <class P, class M> KOGC_DEVICE Work share(int exchange) {
  int rank = P::rank() - M::ROTATION;
  if (rank < 0) rank += P::BLOCKS;
  const bool extra = rank < M::REMAINDER;
  return {M::BASE + extra, M::UNIT, (rank * M::BASE + (extra ? rank : M::REMAINDER)) * M::UNIT, M::ROWS, M::COLUMNS_PADDED, exchange};
}

template <class P> KOGC_DEVICE Work work_of(int phase) {
  switch (phase) {
    case QKV: return share<P, typename P::Qkv>(P::X_QKV);
    case O: return share<P, typename P::O>(P::X_O);
    case GATE_UP: return share<P, typename P::GateUp>(P::X_HIDDEN);
    case DOWN: return share<P, typename P::Down>(P::X_DOWN);
    default: return share<P, typename P::Head>(P::X_KEYS);
  }
}

}  // namespace kogc
