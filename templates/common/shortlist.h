// A choice among few rows, top-k of at most MOST_LISTED, in one exchange: each block lists its best rows in order, all read
// all lists, and each finds what top-k, top-p and min-p admit of them, and draws, by itself. All find the same: they have
// the same data, and masses are integers, so no sum depends on its order. Where the last row of a list is admitted there may
// be more behind it; then all see so, and a search over all rows (threshold.h) decides, to the same rules.
#pragma once

namespace kogc {

constexpr int MOST_LISTED = 64;

template <class P> class Shortlist {
 public:
  KOGC_DEVICE Shortlist(const KernelArgs& args, int step)
      : args_(args), where_{args, step, P::LAYERS}, tag_(choice_tag(args, step)), largest_(0) {
    if (thread() == 0) area().bound = area().count = 0;
  }

  // Publishes the best of this block's rows. best: the largest key among this thread's, of those that each_row deals it.
  KOGC_DEVICE void put(const float* scores, int first, int count, u64 best) {
    Area& a = area();
    const u64 bound = find_bound(scores, first, count, best);
    each_row(count, [&](int i) { return scores[i]; }, [&](int i, float v) {
      const u64 key = key_of(v, first + i);
      if (key < bound) return;
      const u32 at = take_place(&a.count);
      if (at < CAPACITY) a.keys[at] = key;
    });
    sync();
    const int found = (int)a.count;
    const u32 stop = words<P>().stop ? 1u << STOP_BIT : 0;  // of the first block: the host asks to stop
    const auto store = [&](int i, u64 key) { store_key(list(P::rank()) + i, key | tag_ | (i == 0 ? stop : 0)); };
    if (found > CAPACITY) {  // who would admit one of these rows takes the last for admitted, and searches
      for (int i = thread(); i < LENGTH; i += THREADS) store(i, a.largest);
    } else {
      for (int i = thread(); i < found; i += THREADS) {
        int larger = 0;
        for (int j = 0; j < found; j++) larger += a.keys[j] > a.keys[i];
        if (larger < LENGTH) store(larger, a.keys[i]);
      }
      for (int i = found + thread(); i < LENGTH; i += THREADS) store(i, 0);
    }
  }

  // The key of the row drawn, the same on every thread of all blocks; 0: only a search over all rows can tell.
  KOGC_DEVICE u64 choose() {
    u64 listed[EACH];
    gather(listed);
    u64 best = 0;
    KOGC_UNROLL for (int i = 0; i < EACH; i++) best = larger(best, listed[i]);
    largest_ = value_of(block_maximum<P>(best));
    if (thread() == 0) area().count = 0;
    collect(listed, limit(listed));
    if (area().count > CAPACITY) return 0;
    const u64 mass = admit_top_k();
    return mass & DOUBTFUL ? 0 : draw(args_.top_p ? share_of(mass, args_.top_p) : ~0ull);
  }

  KOGC_DEVICE float largest() const { return largest_; }  // of all rows, after choose()

 private:
  static constexpr int LENGTH = P::ROWS_LISTED, ALL = LENGTH * P::BLOCKS, EACH = (ALL + THREADS - 1) / THREADS;
  static constexpr int GROUPS = 2 * LENGTH, CAPACITY = 256;
  static constexpr u64 DOUBTFUL = 1ull << 63;
  static constexpr u32 NO_ROW = ~0u;  // further than any

  struct Found {  // a row that top-k may admit
    float distance;  // below the largest
    u32 fixed;       // the same as limits measure it
    union {
      u64 key, closer_mass;  // as collected, until the other rows are looked at
    };
    u64 mass;
    int row;
    bool last, admitted;  // last of its block's list; by top-k
  };
  struct Area {  // of the scratch memory
    u32 count;
    u64 bound, largest;
    union {
      u64 groups[GROUPS];
      u64 keys[CAPACITY];
      Words first[(P::BLOCKS + MOST_LISTED + 3) / 4 + 1];
      Found found[CAPACITY];
    };
  };
  static_assert(sizeof(Area) <= P::SAMPLING_BYTES && ALL >= MOST_LISTED && GROUPS <= CAPACITY);

  static KOGC_DEVICE Area& area() { return *(Area*)scratch<P>(); }
  KOGC_DEVICE u64* list(int block) const { return (u64*)(args_.exchange + P::X_SHORTLIST) + block * LENGTH; }

  // A key that at least as many of the block's rows reach as it lists, and few more: with rows dealt to groups, the
  // LENGTH-th of the groups' largest. 0 where fewer groups have rows.
  KOGC_DEVICE u64 find_bound(const float* scores, int first, int count, u64 best) {
    constexpr int OWN = GROUPS > THREADS ? GROUPS / THREADS : 1;         // groups of a thread
    constexpr int SHARE = THREADS > GROUPS ? THREADS / GROUPS : 1;       // or threads of a group
    static_assert(SHARE <= LANES && GROUPS % SHARE == 0);
    Area& a = area();
    if constexpr (OWN == 1) {
      KOGC_UNROLL for (int m = 1; m < SHARE; m *= 2) best = larger(best, shuffle_xor(best, m));
      if (thread() % SHARE == 0) a.groups[thread() / SHARE] = best;
    } else {
      for (int i = thread(); i < GROUPS; i += THREADS) a.groups[i] = 0;
      each_row(count, [&](int i) { return scores[i]; }, [&](int i, float v) {
        u64& group = a.groups[i % GROUPS];
        group = larger(group, key_of(v, first + i));
      });
    }
    sync();
    for (int i = thread() / SHARE; i < GROUPS; i += THREADS / SHARE) {
      int before = 0;
      for (int j = thread() % SHARE; j < GROUPS; j += SHARE) before += a.groups[j] > a.groups[i];
      KOGC_UNROLL for (int m = 1; m < SHARE; m *= 2) before += shuffle_xor(before, m);
      if (before == 0) a.largest = a.groups[i];
      if (before == LENGTH - 1) a.bound = a.groups[i];
    }
    sync();
    return a.bound;
  }

  // This thread's share of all lists.
  KOGC_DEVICE void gather(u64 (&listed)[EACH]) {
    constexpr int BATCH = EACH < 16 ? EACH : 16;
    const u64* from = list(0);
    KOGC_UNROLL for (int i = 0; i < EACH; i += BATCH) {
      const int left = (ALL - thread() + THREADS - 1) / THREADS - i;
      u64 v[BATCH];
      take_keys<BATCH>(v, left <= 0 ? 0 : first_bits(left < BATCH ? left : BATCH), tag_, where_, WAIT_SHORTLIST,
                       [&](int k) { return from + thread() + (i + k) * THREADS; });
      if (i == 0 && thread() == 0) words<P>().stop = (i32)(v[0] >> STOP_BIT & 1);
      KOGC_UNROLL for (int k = 0; k < BATCH; k++) if (i + k < EACH) listed[i + k] = without_tag(v[k]);
    }
  }

  KOGC_DEVICE float distance(u64 key) const { return (largest_ - value_of(key)) * args_.inverse_temperature; }

  // A distance within which there are top-k rows, and few more: the top-k-th among the first few of each list.
  KOGC_DEVICE u32 limit(const u64 (&listed)[EACH]) {
    const Words* vectors = area().first;
    u32* first = (u32*)vectors;
    const int depth = (args_.top_k + P::BLOCKS - 1) / P::BLOCKS, count = depth * P::BLOCKS;
    for (int i = thread(); i < 3; i += THREADS) first[count + i] = NO_ROW;  // fills the last vector
    KOGC_UNROLL for (int k = 0; k < EACH; k++) {
      const int at = thread() + k * THREADS, block = at / LENGTH, i = at % LENGTH;
      if (at < ALL && i < depth) first[block * depth + i] = listed[k] ? fixed_distance(distance(listed[k])) : NO_ROW;
    }
    sync();
    u32 farthest = 0;
    for (int i = thread(); i < count; i += THREADS) {
      const u32 own = first[i];
      int closer = 0;
      for (int j = 0; j < count; j += 4) {
        const Words w = vectors[j / 4];
        closer += (w.x < own) + (w.y < own) + (w.z < own) + (w.w < own);
      }
      if (closer < args_.top_k && own > farthest) farthest = own;
    }
    return (u32)block_maximum<P>(farthest);
  }

  // Keeps the rows up to a distance. Top-p never admits the farthest, which all tie and weigh nothing.
  KOGC_DEVICE void collect(const u64 (&listed)[EACH], u32 limit) {
    Area& a = area();
    KOGC_UNROLL for (int k = 0; k < EACH; k++) {
      if (!listed[k]) continue;
      const u32 fixed = fixed_distance(distance(listed[k]));
      if (fixed > limit || (args_.top_p && fixed == FARTHEST)) continue;
      const u32 at = take_place(&a.count);
      if (at >= CAPACITY) continue;
      a.found[at].key = listed[k];
      a.found[at].last = (thread() + k * THREADS) % LENGTH == LENGTH - 1;
    }
    sync();
    // The rest is for few rows, and written once: code that runs once a token is slow to come.
    for (int i = thread(); i < (int)a.count && i < CAPACITY; i += THREADS) {
      Found& own = a.found[i];
      const u64 key = own.key;
      own.distance = distance(key);
      own.fixed = fixed_distance(own.distance);
      own.mass = fixed_mass(own.distance);
      own.row = row_of(key);
      own.admitted = false;
    }
    sync();
  }

  // The mass of the rows that top-k admits; DOUBTFUL where one is the last of its list. Several threads share what a row
  // has to be compared with.
  KOGC_DEVICE u64 admit_top_k() {
    constexpr int WAYS = THREADS >= 4 * LANES ? 4 : 1;
    Area& a = area();
    const int count = (int)a.count, way = thread() % WAYS;
    u64 mass = 0;
    for (int first = 0; first < count; first += THREADS / WAYS) {
      const int i = first + thread() / WAYS;
      const u32 fixed = i < count ? a.found[i].fixed : 0;
      u64 closer_mass = 0, tied_mass = 0;
      int closer = 0;
      for (int j = way; j < count; j += WAYS) {
        const Found& other = a.found[j];
        closer += other.fixed < fixed;
        closer_mass += other.fixed < fixed ? other.mass : 0;
        tied_mass += other.fixed == fixed ? other.mass : 0;
      }
      KOGC_UNROLL for (int m = 1; m < WAYS; m *= 2) {
        closer += shuffle_xor(closer, m);
        closer_mass += shuffle_xor(closer_mass, m);
        tied_mass += shuffle_xor(tied_mass, m);
      }
      if (i >= count || way != 0) continue;
      Found& own = a.found[i];
      own.admitted = closer < args_.top_k;
      own.closer_mass = closer_mass;
      if (own.admitted) mass = larger(mass, (closer_mass + tied_mass) | (own.last ? DOUBTFUL : 0));
    }
    return block_maximum<P>(mass);
  }

  // The largest of the noisy rows that come before the closest rows have the mass `wanted`.
  KOGC_DEVICE u64 draw(u64 wanted) {
    u64 best = 0;
    for (int i = thread(); i < (int)area().count; i += THREADS) {
      const Found& own = area().found[i];
      if (!own.admitted || own.closer_mass >= wanted || own.distance > args_.reach) continue;
      const Bits bits = philox(args_.seed, (u32)own.row / ROWS_TOGETHER, (u32)(args_.start + where_.step));
      const u64 low = (u64)bits.w[1] << 32 | bits.w[0], high = (u64)bits.w[3] << 32 | bits.w[2];  // indexed, they would lie in memory
      const u32 word = (u32)((own.row & 2 ? high : low) >> own.row % 2 * 32);
      best = larger(best, key_of(gumbel(word) - own.distance, own.row));
    }
    return block_maximum<P>(best);
  }

  const KernelArgs& args_;
  const Where where_;
  const u32 tag_;
  float largest_;
};

}  // namespace kogc
