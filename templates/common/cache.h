// The KV cache and who reads what of it: [layer][KV head][chunk], a chunk being keys and values of 128 positions in the
// order of the target's AttentionCore (kogc/kv_layout.py).
#pragma once

namespace kogc {

// What a query at `position` sees of the cache. Chunks are dealt to splits in turns of P::TURN chunks.
template <class P> struct Span {
  static constexpr int POSITIONS = CHUNK * P::TURN;  // of a turn
  int lowest, end, first, count;  // first position in the window, last chunk + 1; first turn, number of turns

  KOGC_DEVICE Span(int position, int window) {
    lowest = window && position >= window ? position - window + 1 : 0;
    end = position / CHUNK + 1;
    first = lowest / POSITIONS;
    count = position / POSITIONS - first + 1;
  }
  KOGC_DEVICE int active() const { return count < P::SPLITS ? count : P::SPLITS; }
  KOGC_DEVICE int split(int i) const { return (first + i) % P::SPLITS; }  // the i-th active split

  // The first chunk of a split, and the one after `chunk`; from `end` on there are no more.
  KOGC_DEVICE int first_chunk(int split) const {
    const int turn = first + (split - first % P::SPLITS + P::SPLITS) % P::SPLITS, chunk = turn * P::TURN;
    return turn == first && chunk < lowest / CHUNK ? lowest / CHUNK : chunk;
  }
  static KOGC_DEVICE int next_chunk(int chunk) { return chunk + 1 + ((chunk + 1) % P::TURN == 0 ? (P::SPLITS - 1) * P::TURN : 0); }
  static KOGC_DEVICE int owner(int position) { return position / POSITIONS % P::SPLITS; }
};

// The attention units that a block takes part in: first(), then every STRIDE-th of COUNT; of each the same split.
template <class P> struct Units {
  static constexpr int COUNT = P::KV_HEADS * P::HEAD_TILES, STRIDE = P::BLOCKS / P::SPLITS;
  static KOGC_DEVICE int first() { return block() / P::SPLITS; }
  static KOGC_DEVICE int split() { return block() % P::SPLITS; }
};

template <class P> KOGC_DEVICE u8* chunk_address(u16* kv, int layer, int kv_head, int chunk) {
  return (u8*)kv + (((u64)layer * P::KV_HEADS + kv_head) * P::CHUNKS + chunk) * P::CHUNK_BYTES;
}

}  // namespace kogc
