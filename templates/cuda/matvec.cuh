// Tensor-core mat-vec over the ring. All warps share every stage; a warp takes every eighth group of fragments, so its
// partial sums of a unit meet the other warps' in shared memory once a unit.
//
// mma.m16n8k16 with weights as A and the activation as columns of B. One 16-byte load per lane brings row lane / 4, columns
// (lane % 4) * 8 .. + 7 of a fragment, and its four registers are a lane's A operand as they are: columns 0, 1, 4, 5 of the
// eight in A's row lane / 4, columns 2, 3, 6, 7 in A's row lane / 4 + 8. B's column 0 holds the activation for the first
// kind, column 1 for the second, so a row's product is C[row][0] + C[row + 8][1]. In units of 4 rows a fragment's upper
// four rows are the same rows for the next 32 columns, and B's columns 2 and 3 hold the activation for those. The other
// columns of B are of no use to one token.
//
// One instance serves all phases; what differs between them is in a few registers.
#pragma once

namespace kogc {

template <class P> KOGC_DEVICE float* partial_sums() { return (float*)(shared() + P::PARTIAL_OFFSET); }
template <class P> KOGC_DEVICE u16* activation(int = 0) {
  static_assert(P::TOKENS == 1);
  return (u16*)(shared() + P::ACTIVATION_OFFSET);
}

// Four columns of the activation, from column 4 * `vector` on. Of eight columns, 0, 1, 4, 5 lie before 2, 3, 6, 7.
KOGC_DEVICE void store_activation(u16* x, int vector, Quad q) {
  u32* to = (u32*)x + vector / 2 * 4 + vector % 2;
  to[0] = q.low;
  to[2] = q.high;
}

template <class P> class MatVec {
 public:
  // Before the activation is there: all that does not depend on it, up to this warp's first weights.
  KOGC_DEVICE void begin(Stream<P>& stream, const Work& work, const Where& where) {
    units_ = scalar(work.units);
    unit_ = scalar(work.unit);
    groups_ = scalar(work.columns) * unit() / (256 * GROUP);
    // Columns of B that hold nothing get what lies there: they do not mix with the others.
    const int column = lane() >> 2;
    x_ = P::ACTIVATION_OFFSET + (unit() == 8 ? 0 : column / 2 % 2 * 64) + (lane() & 3) * 16 + column % 2 * 8;
    weights_ = (warp_ * GROUP * 32 + lane()) * 16;
    free_ = stream.slot;
    taken_ = freed_ = 0;
    full_ = false;
    first_ = {};  // else what it held would be kept through the phase before
    if (warp_ < units_ * groups_) load_weights(first_, stream, where);
  }

  // y = W x for this block's rows. `multiplied()` runs on every thread, between the last products and their results;
  // `result(i, y)` gets the block's rows i .. i + 3.
  template <class Multiplied, class Result>
  KOGC_DEVICE void run(Stream<P>& stream, const Where& where, Multiplied multiplied, Result result) {
#pragma unroll 1
    for (int first = 0; first < units_; first += P::PARTIAL_UNITS) {
      const int count = units_ - first < P::PARTIAL_UNITS ? units_ - first : P::PARTIAL_UNITS;
      if (first) {
        sync();
        if (warp_ < count * groups_) load_weights(first_, stream, where);
      }
      multiply(count, stream, where);
      sync();
      if (first + P::PARTIAL_UNITS >= units_) multiplied();
      static_assert(P::PARTIAL_UNITS * 8 <= ROWS_TOGETHER * THREADS);
      if (const int row = ROWS_TOGETHER * thread(); row < count * unit()) {
        float y[1][ROWS_TOGETHER];
        add_up(row, y[0]);
        result(first * unit() + row, y);
      }
    }
    if constexpr (!WHOLE_STAGES) if (units_ > 0) finish(stream, where);  // after the results: nobody waits for this
  }

 private:
  static constexpr bool ALL_EIGHT = P::Qkv::UNIT == 8 && P::O::UNIT == 8 && P::GateUp::UNIT == 8 && P::Down::UNIT == 8 && P::Head::UNIT == 8;
  static constexpr int GROUP = P::GROUP_FRAGMENTS;
  static constexpr int STAGE_GROUPS = P::STAGE_BYTES / (512 * GROUP * WARPS);  // groups of one warp in a stage
  static constexpr int CHAINS = 2;                                            // of dependent products
  // Whether a unit may have fewer groups than there are warps: then not all of them add to each unit.
  template <class M> static constexpr bool FEW = M::COLUMNS_PADDED * M::UNIT / (256 * GROUP) < WARPS;
  static constexpr bool FEW_GROUPS =
      FEW<typename P::Qkv> || FEW<typename P::O> || FEW<typename P::GateUp> || FEW<typename P::Down> || FEW<typename P::Head>;
  // Whether the groups of each unit fill stages: then all warps take as many of each stage.
  template <class M> static constexpr bool WHOLE = M::COLUMNS_PADDED * M::UNIT / (256 * GROUP) % (STAGE_GROUPS * WARPS) == 0;
  static constexpr bool WHOLE_STAGES =
      WHOLE<typename P::Qkv> && WHOLE<typename P::O> && WHOLE<typename P::GateUp> && WHOLE<typename P::Down> && WHOLE<typename P::Head>;
  struct Weights { Words of[GROUP]; };
  struct Activation {
    Quad of[GROUP];
    int ends;  // units that this warp is done with after this group: none, one, or more where it takes no part in some
  };
  struct Products {  // of a group
    float of[CHAINS][4];
    int ends;
  };
  static constexpr int SUM_BYTES = 32, UNIT_BYTES = SUM_BYTES * WARPS;  // of a warp's sums of a unit, and of all warps'

  KOGC_DEVICE int unit() const { return ALL_EIGHT ? 8 : unit_; }  // rows of a unit

  // Products of this warp's groups of `units` more units, whose first weights are loaded; their sums go to shared memory.
  // What a group needs is on its way from shared memory while the group before is multiplied, and a group's products are
  // added up while the next group's are made: a warp waits for neither.
  KOGC_DEVICE void multiply(int units, Stream<P>& stream, const Where& where) {
    int left = (units * groups_ - warp_ + WARPS - 1) / WARPS;
    if (left <= 0) return;
    float sum = 0;  // of this warp's groups of a unit, for one row a lane
    int to = P::PARTIAL_OFFSET + warp_ * SUM_BYTES;
    next_ = warp_;
    if constexpr (FEW_GROUPS) to += wrap() * UNIT_BYTES;
    Weights &even = first_, odd;
    Activation x, next;
    Products one, other = {};
    load_x(x);
#pragma unroll 1
    while (left > 2) {
      load_weights(odd, stream, where);
      load_x(next);
      multiply(one, even, x);
      add(sum, other, to);
      load_weights(even, stream, where);
      load_x(x);
      multiply(other, odd, next);
      add(sum, one, to);
      left -= 2;
    }
    if (left == 2) {  // each way in one piece, so that nothing of it waits for a product before the next is begun
      load_weights(odd, stream, where);
      load_x(next);
      multiply(one, even, x);
      add(sum, other, to);
      multiply(other, odd, next);
      add(sum, one, to);
      add(sum, other, to);
    } else {
      multiply(one, even, x);
      add(sum, other, to);
      add(sum, one, to);
    }
  }

  // The last stage of a phase may hold fewer groups than warps times groups: give it back all the same.
  KOGC_DEVICE void finish(Stream<P>& stream, const Where& where) {
    constexpr int PER_STAGE = STAGE_GROUPS * WARPS;
    const int groups = units_ * groups_, stages = (groups + PER_STAGE - 1) / PER_STAGE;
    const int touched = ((groups - warp_ + WARPS - 1) / WARPS + STAGE_GROUPS - 1) / STAGE_GROUPS;
    if (freed_ != 0) {
      if (taken_ != 0) stream.advance();
      release(1);
    } else if (touched < stages) {
      wait_full<P>(stream, where);
      stream.advance();
      release(1);
    }
  }

  // The sums of rows `row` .. + 3 of the units multiplied last.
  KOGC_DEVICE void add_up(int row, float (&y)[ROWS_TOGETHER]) const {
    const int of_unit = unit() == 8 ? row / 8 : row / 4;
    const char* from = (const char*)(partial_sums<P>() + of_unit * (8 * WARPS) + (row & unit() - 1));
    KOGC_UNROLL for (int e = 0; e < ROWS_TOGETHER; e++) y[e] = 0;
    KOGC_UNROLL for (int w = 0; w < WARPS; w++) add(y, from + w * SUM_BYTES, took_part(w, of_unit));
    if (unit() == 4) KOGC_UNROLL for (int w = 0; w < WARPS; w++) add(y, from + w * SUM_BYTES + 16, took_part(w, of_unit));
  }
  KOGC_DEVICE bool took_part(int warp, int unit) const { return !FEW_GROUPS || ((warp - unit * groups_) & (WARPS - 1)) < groups_; }

  static KOGC_DEVICE void add(float (&y)[ROWS_TOGETHER], const char* four, bool holds) {
    const Words w = *(const Words*)four;
    y[0] += holds ? as_float(w.x) : 0;
    y[1] += holds ? as_float(w.y) : 0;
    y[2] += holds ? as_float(w.z) : 0;
    y[3] += holds ? as_float(w.w) : 0;
  }

  KOGC_DEVICE void load_weights(Weights& w, Stream<P>& stream, const Where& where) {
    if (!all_lanes(taken_ != 0 || full_)) wait_full<P>(stream, where);
    const char* from = Ring<P>::stage(stream.slot) + taken_ * (WARPS * GROUP * 512) + weights_;
    KOGC_UNROLL for (int i = 0; i < GROUP; i++) w.of[i] = *(const Words*)(from + i * 512);
    if (++taken_ == STAGE_GROUPS) {
      stream.advance();
      taken_ = 0;
      full_ = barrier_test(Ring<P>::full(stream.slot), stream.parity);  // the answer comes while this group is multiplied
    }
  }

  KOGC_DEVICE void load_x(Activation& x) {
    const int fragment = unit() == 8 ? 64 : 128;  // bytes of the activation that a fragment meets
    const char* from = shared() + x_ + next_ * GROUP * fragment;
    KOGC_UNROLL for (int i = 0; i < GROUP; i++) x.of[i] = *(const Quad*)(from + i * fragment);
    next_ += WARPS;
    x.ends = wrap();
  }

  // How many units next_ lies behind the one it was in; from here on it counts in its own.
  KOGC_DEVICE int wrap() {
    int units = next_ >= groups_;
    if (units) next_ -= groups_;
    while (FEW_GROUPS && next_ >= groups_) {
      next_ -= groups_;
      units++;
    }
    return units;
  }

  // Multiplies a group, and gives its stage back when it was this warp's last there.
  KOGC_DEVICE void multiply(Products& c, const Weights& weights, const Activation& x) {
    c = {};
    KOGC_UNROLL for (int i = 0; i < GROUP; i++) {
      const Words& w = weights.of[i];
      mma<P::FP16>(c.of[i % CHAINS], w.x, w.y, w.z, w.w, x.of[i].low, x.of[i].high);
    }
    c.ends = x.ends;
    release(STAGE_GROUPS);
  }

  // Adds a group's products up, and stores the sum at a unit's end: without a branch, which costs more than all of this. In
  // units of 4 rows the lower four rows of C need its columns 2 and 3.
  KOGC_DEVICE void add(float& sum, const Products& c, int& to) const {
    sum += (c.of[0][0] + c.of[0][3]) + (c.of[1][0] + c.of[1][3]);
    if (c.ends && (lane() & 3) == (unit() == 8 ? 0 : lane() >> 4)) ((float*)(shared() + to))[lane() >> 2] = sum;
    sum = c.ends ? 0 : sum;
    to += c.ends * UNIT_BYTES;
  }

  // One more group of the oldest stage is read; when it was the last of `groups`, this warp gives the stage back.
  KOGC_DEVICE void release(int groups) {
    if (++freed_ < groups) return;
    give_back<P>(free_);
    if (++free_ == P::STAGES) free_ = 0;
    freed_ = 0;
  }

  const int warp_ = scalar(warp());
  int units_ = 0, unit_ = 8, groups_ = 0;  // the block's units; rows, and groups of fragments, of each
  int free_ = 0;                // slot of the oldest stage not given back
  int taken_ = 0, freed_ = 0;   // this warp's groups of the stage at hand that are loaded, and multiplied
  bool full_ = false;           // whether the next stage is known to have landed
  int next_ = 0;                // group within the unit, of the next part of the activation to load
  int weights_ = 0;             // this lane's place in a stage, in bytes
  int x_ = 0;                   // this lane's place in the activation, in bytes of shared memory
  Weights first_ = {};          // of the next group, loaded before its activation is there
};

}  // namespace kogc
