// Which rows top-k and top-p admit, over all blocks. Rows are told apart by their distance below the largest logit, in
// fixed point: 32 nats in 27 bits, so rows with equal distances tie, and rows further off (less than 1.3e-14 as likely
// as the best) all tie. A limit is found by a radix search, 9 bits a round: each block counts its rows and their
// probability in 512 bins, the owners of a bin add up the blocks, and all read the sums. Masses are integers, so no
// sum depends on its order. The search ends as soon as a bin holds one row: one round or two are usual, three the most.
#pragma once

namespace kogc {

constexpr int LEVELS = 3, LEVEL_BITS = 9, BINS = 1 << LEVEL_BITS;
constexpr u32 FARTHEST = (1u << LEVELS * LEVEL_BITS) - 1, EVERYTHING = FARTHEST + 1;
constexpr float RANGE = 32.0f;       // nats
constexpr float ONE = 4294967296.0f;  // mass of the largest logit's row
enum Measure { COUNT, MASS, MEASURES };

KOGC_DEVICE u32 fixed_distance(float d) { return d < RANGE ? (u32)(d * (EVERYTHING / RANGE)) : FARTHEST; }
KOGC_DEVICE u64 fixed_mass(float d) { return d < RANGE ? (u64)(exp2_fast(-LOG2E * d) * ONE + 0.5f) : 0; }
KOGC_DEVICE u64 share_of(u64 mass, u32 fraction) {  // fraction / 2^32 of a mass below 2^53, never 0 of something
  const u64 high = (mass >> 26) * fraction >> 6, low = (mass & 0x3ffffffu) * fraction >> 32;
  return high + low > 0 ? high + low : 1;
}

// The smallest power of two from n on that deals the bins to so many blocks.
KOGC_DEVICE constexpr int bins_owned(int n, int blocks) { return n * blocks >= BINS ? n : bins_owned(2 * n, blocks); }

// A search over `rows` distances of this block; distance(i) is a float >= 0, or NaN.
template <class P, class Distance> class Threshold {
 public:
  KOGC_DEVICE Threshold(const KernelArgs& args, int step, int rows, Distance distance)
      : where_{args, step, P::LAYERS}, rows_(rows), distance_(distance) {
    for (int i = thread(); i < LEVELS; i += THREADS) area().prefix[i] = ~0u;
  }

  // What is closer than the result is admitted. One loop for both limits: code that runs once a token is never in the
  // instruction cache, so there should be little of it.
  KOGC_DEVICE u32 find(u32 top_k, u32 top_p) {
    if (!top_k && !top_p) return EVERYTHING;
    u32 end = EVERYTHING;
    u64 mass = 0;
#pragma unroll 1
    for (int m = COUNT; m <= (top_p ? MASS : COUNT); m++) {
      const u64 wanted = m == MASS ? share_of(mass, top_p) : top_k ? top_k : ~0ull;  // without top-k: the mass of all
      const u32 found = admit((Measure)m, wanted, mass);
      end = found < end ? found : end;
    }
    return end;
  }

 private:
  struct Area {                 // of the scratch memory
    u64 bins[BINS][MEASURES];   // also the partial sums of an owner, and then the totals
    u64 of_warps[16][MEASURES];
    u64 before[MEASURES], inside[MEASURES];  // of the bin that was found
    u32 bin;
    u32 prefix[LEVELS];         // whose totals each level holds
  };
  static constexpr int OWNED = bins_owned(1, P::BLOCKS);  // bins that a block adds up
  static constexpr int ITEMS = OWNED * MEASURES, WAYS = ITEMS < THREADS ? THREADS / ITEMS : 1;
  static_assert(sizeof(Area) <= P::SAMPLING_BYTES && ITEMS * WAYS <= BINS * MEASURES && BINS % THREADS == 0);

  static KOGC_DEVICE Area& area() { return *(Area*)scratch<P>(); }
  KOGC_DEVICE u64* histogram(int block) const { return (u64*)(where_.args.exchange + P::X_HISTOGRAM) + block * (BINS * MEASURES); }
  KOGC_DEVICE u64* totals(int level) const { return (u64*)(where_.args.exchange + P::X_TOTALS) + level * (BINS * MEASURES); }

  // The end of the smallest set of close rows that reaches `wanted` (else of all), and the mass of that set.
  KOGC_DEVICE u32 admit(Measure measure, u64 wanted, u64& mass) {
    u32 prefix = 0;
    u64 before[MEASURES] = {};
#pragma unroll 1
    for (int level = 0;; level++) {
      if (area_prefix(level) != prefix) count(level, prefix);
      cross(level, measure, wanted - (measure == COUNT ? before[COUNT] : before[MASS]));
      const Area& a = area();
      prefix = prefix << LEVEL_BITS | a.bin;
      before[COUNT] += a.before[COUNT];
      before[MASS] += a.before[MASS];
      const bool whole = measure == COUNT && before[COUNT] + a.inside[COUNT] <= wanted;
      if (whole || a.inside[COUNT] <= 1 || level == LEVELS - 1) {
        mass = before[MASS] + a.inside[MASS];
        return (prefix + 1) << LEVEL_BITS * (LEVELS - 1 - level);
      }
    }
  }

  static KOGC_DEVICE u32 area_prefix(int level) {
    sync();
    return area().prefix[level];
  }

  // Totals over all blocks of a level's bins, for rows whose distance begins with `prefix`.
  KOGC_DEVICE void count(int level, u32 prefix) {
    const u32 tag = words<P>().searches + 1 & TAG_MASK, level_tag = words<P>().level_searches[level] + 1 & TAG_MASK;
    fill_bins(LEVEL_BITS * (LEVELS - 1 - level), prefix);
    sync();
    for (int i = thread(); i < BINS * MEASURES; i += THREADS)
      store_key(histogram(P::rank()) + i, area().bins[i / MEASURES][i % MEASURES] << TAG_BITS | tag);
    if (thread() == 0) {
      words<P>().searches++;
      words<P>().level_searches[level]++;
      area().prefix[level] = prefix;
    }
    sync();
    if (P::rank() * OWNED < BINS) add_up(level, tag, level_tag);
    sync();
  }

  KOGC_DEVICE void fill_bins(int shift, u32 prefix) {
    u64* all = &area().bins[0][0];
    for (int i = thread(); i < BINS * MEASURES; i += THREADS) all[i] = 0;
    sync();
    each_row(rows_, distance_, [&](int, float d) {
      const u32 at = fixed_distance(d) >> shift;
      if (at >> LEVEL_BITS != prefix) return;
      add_shared(&all[at % BINS * MEASURES + COUNT], 1);
      add_shared(&all[at % BINS * MEASURES + MASS], fixed_mass(d));
    });
  }

  // The blocks' sums of the bins that this block owns.
  KOGC_DEVICE void add_up(int level, u32 tag, u32 level_tag) {
    constexpr int EACH = (P::BLOCKS + WAYS - 1) / WAYS, BATCH = EACH < 8 ? EACH : 8;
    u64* partial = &area().bins[0][0];
    const int first = P::rank() * ITEMS;
#pragma unroll 1
    for (int i0 = 0; i0 < ITEMS * WAYS; i0 += THREADS) {
      const int i = i0 + thread();
      u64 sum = 0;
#pragma unroll 1
      for (int way = 0; way < P::BLOCKS; way += BATCH * WAYS) {
        u64 v[BATCH];
        const int b0 = way + i / ITEMS, left = i < ITEMS * WAYS ? (P::BLOCKS - b0 + WAYS - 1) / WAYS : 0;
        take_keys<BATCH>(v, first_bits(left < BATCH ? left < 0 ? 0 : left : BATCH), tag, where_, WAIT_HISTOGRAM,
                         [&](int k) { return histogram(b0 + k * WAYS) + first + i % ITEMS; });
        KOGC_UNROLL for (int k = 0; k < BATCH; k++) sum += v[k] >> TAG_BITS;
      }
      if (i < ITEMS * WAYS) partial[i] = sum;
    }
    sync();
    for (int i = thread(); i < ITEMS; i += THREADS) {
      u64 sum = 0;
      for (int way = 0; way < WAYS; way++) sum += partial[way * ITEMS + i];
      store_key(totals(level) + first + i, sum << TAG_BITS | level_tag);
    }
  }

  // The bin of a level in which the sum over the bins reaches `wanted`; the last where it never does.
  KOGC_DEVICE void cross(int level, Measure measure, u64 wanted) {
    constexpr int OWN = BINS / THREADS, AT_ONCE = OWN < 2 ? OWN : 2;  // bins
    Area& a = area();
    const u32 level_tag = words<P>().level_searches[level] & TAG_MASK;
    const int first = thread() * OWN;
    u64 all[MEASURES] = {}, before[MEASURES] = {};
    for (int bin = first; bin < first + OWN; bin += AT_ONCE) {
      constexpr int KEYS = AT_ONCE * MEASURES;
      u64 v[KEYS];
      take_keys<KEYS>(v, first_bits(KEYS), level_tag, where_, WAIT_TOTALS, [&](int k) { return totals(level) + bin * MEASURES + k; });
      KOGC_UNROLL for (int k = 0; k < KEYS; k++) all[k % MEASURES] += a.bins[bin + k / MEASURES][k % MEASURES] = v[k] >> TAG_BITS;
    }
    for (int m = 1; m < LANES; m *= 2)
      KOGC_UNROLL for (int k = 0; k < MEASURES; k++) {
        const u64 other = shuffle_xor(all[k], m);
        if (lane() & m) before[k] += other;
        all[k] += other;
      }
    if (lane() == 0) KOGC_UNROLL for (int k = 0; k < MEASURES; k++) a.of_warps[warp()][k] = all[k];
    sync();
    for (int w = 0; w < warp(); w++) KOGC_UNROLL for (int k = 0; k < MEASURES; k++) before[k] += a.of_warps[w][k];
    for (int bin = first; bin < first + OWN; bin++) {
      const u64 *in = a.bins[bin], reached = (measure == COUNT ? before[COUNT] + in[COUNT] : before[MASS] + in[MASS]);
      const bool crosses = (measure == COUNT ? before[COUNT] : before[MASS]) < wanted && reached >= wanted;
      if (crosses || (bin == BINS - 1 && reached < wanted)) {
        a.bin = bin;
        KOGC_UNROLL for (int k = 0; k < MEASURES; k++) {
          a.before[k] = before[k];
          a.inside[k] = in[k];
        }
      }
      KOGC_UNROLL for (int k = 0; k < MEASURES; k++) before[k] += in[k];
    }
    sync();
  }

  const Where where_;
  const int rows_;
  const Distance distance_;
};

}  // namespace kogc
