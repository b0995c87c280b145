// How blocks agree on a row of the vocabulary: each puts the best key among its rows, all read all, the largest wins.
#pragma once

namespace kogc {

// A key: a number in order, then the lowest row, then a stop flag and the count of uses as a tag. Other words that
// cross blocks during a choice have the tag alone, and 53 bits of payload.
constexpr u32 TAG_BITS = 11, STOP_BIT = TAG_BITS, ROW_SHIFT = STOP_BIT + 1;
constexpr u32 TAG_MASK = (1u << TAG_BITS) - 1, ROW_MASK = (1u << (32 - ROW_SHIFT)) - 1;

KOGC_DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }
KOGC_DEVICE u64 key_of(float v, int row) { return (u64)ordered(v) << 32 | (u64)(ROW_MASK - (u32)row) << ROW_SHIFT; }
KOGC_DEVICE int row_of(u64 key) { return (int)(ROW_MASK - ((u32)key >> ROW_SHIFT)); }
KOGC_DEVICE float value_of(u64 key) { return unordered((u32)(key >> 32)); }
KOGC_DEVICE u64 without_tag(u64 key) { return key & ~(u64)(TAG_MASK | 1u << STOP_BIT); }

// use(i, load(i)) for this thread's rows of `count`; several are loaded before the first is used.
template <class Load, class Use> KOGC_DEVICE void each_row(int count, Load load, Use use) {
  constexpr int AT_ONCE = 4;
#pragma unroll 1
  for (int first = thread(); first < count; first += AT_ONCE * THREADS) {
    decltype(load(0)) v[AT_ONCE];
    KOGC_UNROLL for (int k = 0; k < AT_ONCE; k++) v[k] = load(first + k * THREADS < count ? first + k * THREADS : first);
    KOGC_UNROLL for (int k = 0; k < AT_ONCE; k++) if (first + k * THREADS < count) use(first + k * THREADS, v[k]);
  }
}

// How many choices there have been at this step, as the tag of the words that each choice writes once.
KOGC_DEVICE u32 choice_tag(const KernelArgs& args, int step) { return (u32)(step - args.n_prompt + 2) & TAG_MASK; }

// Fetches the tagged words that `pending` names, `address(i)` each; the others are zero. A warp polls as one; all loads are
// issued before the first is checked.
template <int N, class Address>
KOGC_DEVICE void take_keys(u64 (&v)[N], u32 pending, u32 tag, const Where& where, Site site, Address address) {
  KOGC_UNROLL for (int i = 0; i < N; i++) v[i] = 0;
  for (Spin spin;; spin.step(where, site, tag)) {
    KOGC_UNROLL for (int i = 0; i < N; i++) if (pending >> i & 1) v[i] = load_key(address(i));
    KOGC_UNROLL for (int i = 0; i < N; i++) pending &= ~((u32)(((u32)v[i] & TAG_MASK) == tag) << i);
    if (all_lanes(pending == 0)) break;
  }
}

KOGC_DEVICE u64 take_key(bool wanted, const u64* from, u32 tag, const Where& where, Site site) {
  u64 v[1];
  take_keys<1>(v, wanted, tag, where, site, [&](int) { return from; });
  return v[0];
}

// use(b, whether there is a block b): each block is some thread's, and the threads of a warp go together.
template <class P, class Use> KOGC_DEVICE void each_block(Use use) {
  for (int first = 0; first < P::BLOCKS; first += THREADS) use(first + thread(), first + thread() < P::BLOCKS);
}

// The largest key of the block, on every thread.
template <class P> KOGC_DEVICE u64 block_maximum(u64 key) {
  u64(&of_warps)[16] = words<P>().warp_keys;
  for (int m = LANES / 2; m; m /= 2) key = larger(key, shuffle_xor(key, m));
  sync();  // the last reader of the area is done
  if (lane() == 0) of_warps[warp()] = key;
  sync();
  u64 largest = of_warps[0];
  for (int w = 1; w < WARPS; w++) largest = larger(largest, of_warps[w]);
  return largest;
}

// The largest of the blocks' keys, on every thread; the first block's also tells whether the host asks to stop.
template <class P> KOGC_DEVICE u64 largest_of_blocks(const u64* keys, u32 tag, const Where& where, Site site) {
  u64 best = 0;
  each_block<P>([&](int b, bool is) {
    const u64 key = take_key(is, keys + b, tag, where, site);
    if (b == 0) words<P>().stop = (i32)(key >> STOP_BIT & 1);
    best = larger(best, without_tag(key));
  });
  return block_maximum<P>(best);
}

}  // namespace kogc
