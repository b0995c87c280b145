"""The plan: everything that the kernel knows at compile time, derived from (spec, profile, options)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import KogcError, UsageError
from ..profile import GpuProfile
from ..spec import ModelSpec
from .cpu_passes import CpuPasses, cpu_passes
from .exchange import ExchangeMap, exchange_map
from .matvec import FRAGMENT_BYTES, WARPS, MatVec, cut, round_up
from .passes import Passes, passes
from .samples import Samples, samples
from .shared_memory import HEAD_TILE, SharedMemory, shared_memory

SMALL_LAYER = 1 << 20  # bytes a block, of a layer that does best with the fewest stages in flight
LEAST_IN_FLIGHT, MOST_IN_FLIGHT = 3, 5
FEWEST_STAGES = 6  # of a ring that is cut into large stages
L2_SHARE = 3  # what is fetched ahead of full rings takes at most one part in so many of the L2 cache
FEW_GROUPS_COST = 1.045  # qwen2.5-1.5b on an H200 is 1.4 % faster by units of 8, with 3.4 % more bytes a layer
AWAITED = 4e-6  # seconds: an exchange and the latency of memory, on a GPU whose registers are the ring
LEAST_LOADS, MOST_LOADS = 8, 16  # of a lane: more would take registers that the phases need
CHUNK = 128  # positions of the KV cache that a block takes at a time
KV_DTYPES = ("bf16", "fp8")
SCALE_BYTES = 2  # of a position in FP8: the exponents of its key's scale and of its value's


@dataclass(frozen=True)
class Knobs:
    """What a tuner may choose without changing the result's meaning.

    stage_bytes: one slot of the ring. in_flight: stages being copied at once while layers run; in_flight_head: the same
    while the vocabulary projection streams; in_flight_exchange: the same while a block waits for others, whose words
    queue behind the copies. gather_splits: most attention splits that are combined while gathering, before a separate
    combine step pays. turn: chunks of the KV cache that a split takes at a time. prefetch: stages fetched into L2 ahead
    of a full ring; pace: clocks between two such fetches. On `hip` a stage is what one load of all lanes brings, and
    in_flight counts such loads.
    """

    stage_bytes: int = 16384
    in_flight: int = 3
    in_flight_head: int = 4
    in_flight_exchange: int = 2
    gather_splits: int = 1
    turn: int = 1
    prefetch: int = 8
    pace: int = 900


@dataclass(frozen=True)
class Options:
    """A build's choices: context limit in tokens (None: the model's own), number of blocks (None: the profile's).

    knobs: None for those that suit the size of a layer (`default_knobs`). kv_dtype: of the KV cache, in KV_DTYPES.
    """

    max_context: int | None = None
    blocks: int | None = None
    knobs: Knobs | None = None
    kv_dtype: str = "bf16"


@dataclass(frozen=True)
class Plan:
    spec: ModelSpec
    profile: GpuProfile
    knobs: Knobs
    blocks: int
    max_context: int
    notes: tuple[str, ...] = ()
    trace_events: int = 0  # events that a block of a tracing build keeps; 0: tracing is compiled out
    kv_dtype: str = "bf16"

    @property
    def target(self) -> str:
        return self.profile.target

    @cached_property
    def layer_phases(self) -> tuple[MatVec, ...]:
        """The four mat-vec phases of a layer, in slab order; each starts its remainder where the last ended.

        A unit of fewer groups than there are warps makes the mat-vec of every phase slower, which on CUDA all share:
        then units of 8 rows, if the busiest block has less than FEW_GROUPS_COST times the bytes for it.
        """
        phases = self._cut_layer()
        few = [p.name for p in phases if p.fragments // p.group < WARPS]
        if not few or self.target != "cuda" or not self.profile.bulk_copies:
            return phases
        wider = self._cut_layer(*few)
        of_wider, of_phases = (sum(p.max_units * p.unit_bytes for p in cut) for cut in (wider, phases))
        return wider if of_wider < FEW_GROUPS_COST * of_phases else phases

    def _cut_layer(self, *by_eight: str) -> tuple[MatVec, ...]:
        s = self.spec
        shapes = (
            ("qkv", s.qkv_rows, s.hidden),
            ("o", s.hidden, s.q_rows),
            ("gate_up", 2 * s.ffn, s.hidden),
            ("down", s.hidden, s.ffn),
        )
        phases: list[MatVec] = []
        rotation = 0
        for name, rows, columns in shapes:
            phase = cut(name, rows, columns, self.blocks, rotation, self.profile.lanes // 32)
            phases.append(replace(phase, unit=8) if name in by_eight else phase)
            rotation = (rotation + phases[-1].remainder) % self.blocks
        return tuple(phases)

    @cached_property
    def head(self) -> MatVec:
        """The vocabulary projection."""
        last = self.layer_phases[-1]
        rotation = (last.rotation + last.remainder) % self.blocks
        return cut("head", self.spec.vocab, self.spec.hidden, self.blocks, rotation, self.profile.lanes // 32)

    @property
    def phases(self) -> tuple[MatVec, ...]:
        return (*self.layer_phases, self.head)

    @property
    def threads(self) -> int:
        """Threads of a block; on cuda there are warps that copy beside those that multiply.

        One issues bulk copies; copies of 16 bytes a lane take four to keep up with the memory.
        """
        if self.target == "cpu":
            return 1
        producers = 0 if self.target == "hip" else 1 if self.profile.bulk_copies else 4
        return self.profile.threads + producers * self.profile.lanes

    @property
    def group(self) -> int:
        """Consecutive fragments that one warp takes together, in every phase; all warps' fill a stage evenly.

        On GPUs without bulk copies addresses take more registers, and groups of four would spill.
        """
        group = min(4 if self.profile.bulk_copies else 2, *(p.group for p in self.phases))
        while group > 1 and self.knobs.stage_bytes % (FRAGMENT_BYTES * WARPS * group):
            group //= 2
        return group

    @property
    def hidden_padded(self) -> int:
        """Columns of the residual stream as activations hold it: the widest padding of the phases that read it."""
        return max(p.columns_padded for p in self.phases if p.name in ("qkv", "gate_up", "head"))

    def layer_bytes(self, block: int) -> int:
        return sum(p.bytes_of(block) for p in self.layer_phases)

    @cached_property
    def slab_bytes(self) -> int:
        """Distance between two blocks' slabs: the longest slab, aligned to 128 bytes."""
        longest = max(self.spec.layers * self.layer_bytes(b) + self.head.bytes_of(b) for b in range(self.blocks))
        return round_up(longest, 128)

    def slab_offset(self, layer: int, phase: MatVec, block: int) -> int:
        """Byte offset of `phase` of `layer` in the slab of `block` (the head: layer = number of layers)."""
        offset = layer * self.layer_bytes(block)
        for p in self.layer_phases:
            if phase.name in (p.name, "head"):
                break
            offset += p.bytes_of(block)
        return offset

    @property
    def weight_bytes(self) -> int:
        """Weight bytes read per token by all blocks together."""
        per_layer = sum(p.units * p.unit_bytes for p in self.layer_phases)
        return self.spec.layers * per_layer + self.head.units * self.head.unit_bytes

    @property
    def head_tiles(self) -> int:
        """Attention units of one KV head: its query heads in tiles of at most HEAD_TILE."""
        return -(-self.spec.group // HEAD_TILE)

    @property
    def heads_per_block(self) -> int:
        """Query heads that one attention unit handles."""
        return -(-self.spec.group // self.head_tiles)

    @property
    def splits(self) -> int:
        """Blocks that share the context of one attention unit."""
        return max(1, self.blocks // (self.spec.kv_heads * self.head_tiles))

    @property
    def chunks(self) -> int:
        return -(-self.max_context // CHUNK)

    @property
    def position_bytes(self) -> int:
        """Bytes of the cache that hold a position's key and value of one KV head."""
        return 2 * self.spec.head_dim + SCALE_BYTES if self.kv_dtype == "fp8" else 4 * self.spec.head_dim

    @property
    def chunk_bytes(self) -> int:
        return CHUNK * self.position_bytes

    @property
    def slot_bytes(self) -> int:
        """A slot of the ring: a stage, and with an FP8 cache room for the scales of a whole chunk.

        Without it eight tiles of 2 KB, head_dim 64, would just not fit the usual stage.
        """
        return self.knobs.stage_bytes + (CHUNK * SCALE_BYTES if self.kv_dtype == "fp8" else 0)

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache: [layer][kv head][chunk][keys and values of CHUNK positions]."""
        return self.spec.layers * self.spec.kv_heads * self.chunks * self.chunk_bytes

    def kv_bytes_read(self, depth: int) -> int:
        """KV bytes that one token at `depth` must read, over all layers."""
        return sum(self._kv_layer(depth, layer) for layer in range(self.spec.layers))

    def _kv_layer(self, depth: int, layer: int) -> int:
        window = self.window(layer)
        positions = min(depth, window) if window else depth
        return positions * self.spec.kv_heads * self.position_bytes

    def window(self, layer: int) -> int:
        """Sliding window of `layer` in positions, 0 for full attention."""
        return self.spec.window(layer) or 0

    @cached_property
    def exchanges(self) -> ExchangeMap:
        return exchange_map(self.spec, self.blocks, self.splits)

    @cached_property
    def memory(self) -> SharedMemory:
        return shared_memory(self)

    @cached_property
    def passes(self) -> Passes | None:
        """How a GPU takes a prompt, many tokens at a time; None where it goes token by token."""
        return passes(self)

    @cached_property
    def samples(self) -> Samples | None:
        """How several continuations of a prompt are made at once; None where they are made one after the other."""
        return samples(self)

    @cached_property
    def cpu_passes(self) -> CpuPasses | None:
        """How a CPU takes a prompt, many tokens at a time."""
        return cpu_passes(self)

    @property
    def embedding_bytes(self) -> int:
        return self.spec.vocab * self.spec.hidden * 2

    @property
    def ceiling_seconds(self) -> float:
        """Time to read the weights of one token at the profile's measured (else data-sheet) bandwidth, 0 if unknown."""
        bandwidth = self.profile.ceiling
        return self.weight_bytes / bandwidth if bandwidth else 0.0


def usable_cores() -> int:
    """Of this machine, by this process: as many blocks has a CPU's plan unless it is given others."""
    return len(os.sched_getaffinity(0))


def make_plan(spec: ModelSpec, profile: GpuProfile, options: Options = Options()) -> Plan:
    """Derive the plan. Raises UsageError naming the flag when an option cannot be met."""
    blocks = options.blocks or profile.blocks or usable_cores()
    if blocks < 1 or (profile.target != "cpu" and blocks > profile.sms):
        raise UsageError(f"--blocks {blocks}: {profile.name} has {profile.sms} {profile.unit}")
    wanted = options.max_context or spec.max_context
    if wanted < 1 or wanted > spec.max_context:
        raise UsageError(f"--max-context {wanted}: {spec.name} is defined for 1 to {spec.max_context} tokens")
    if options.kv_dtype not in KV_DTYPES:
        raise UsageError(f"--kv-dtype {options.kv_dtype}: one of {', '.join(KV_DTYPES)}")
    plan = Plan(spec, profile, options.knobs or Knobs(), blocks, wanted, kv_dtype=options.kv_dtype)
    if options.knobs is None:
        plan = replace(plan, knobs=default_knobs(plan))
    fits = _context_that_fits(plan)
    if fits >= wanted:
        return plan
    if fits <= 0:
        sizes = f"{plan.weight_bytes / 1e9:.1f} GB of weights in {profile.memory_bytes / 1e9:.1f} GB of memory"
        raise KogcError(f"{spec.name} on {profile.name}: {sizes} leave no room for a context")
    if fits < CHUNK or options.max_context:
        raise UsageError(f"--max-context {wanted}: {spec.name} on {profile.name} has memory for {fits} tokens")
    note = f"context limited to {fits} tokens by the memory of {profile.name} (the model's own limit: {wanted})"
    return replace(plan, max_context=fits, notes=(note,))


def default_knobs(plan: Plan) -> Knobs:
    """Knobs for a model that nobody has tuned: the more a block streams a layer, the more it may have in flight.

    Exchanges wait behind copies, and cost a small layer a larger share of its time. Measured on an H200, the best
    number of stages is 3 at 240 KiB a block and at 1 MiB, and grows by one where the bytes of a layer double from
    there on: 5 at 3.4 MiB; and two splits of attention are better gathered than combined while layers are small.
    """
    if plan.target == "cpu":
        return plan.knobs
    if plan.target == "hip":
        return replace(
            plan.knobs, stage_bytes=16 * plan.profile.threads, in_flight=_loads_in_flight(plan), gather_splits=2
        )
    large = plan.knobs
    bytes_of_layer = max(plan.layer_bytes(block) for block in range(plan.blocks))
    in_flight = LEAST_IN_FLIGHT + round(math.log2(max(1, bytes_of_layer / SMALL_LAYER)))
    in_flight = min(MOST_IN_FLIGHT, in_flight)
    # Where few large stages fit, smaller ones, and as many bytes in flight as the ring can hold.
    shrink = 1 if plan.memory.stages >= FEWEST_STAGES else 2
    small = replace(plan, knobs=replace(large, stage_bytes=large.stage_bytes // shrink))
    most = max(1, small.memory.stages - 1)
    prefetch = plan.profile.l2_bytes // L2_SHARE // (plan.blocks * small.knobs.stage_bytes)
    return replace(
        small.knobs,
        in_flight=min(in_flight * shrink, most),
        in_flight_head=min(large.in_flight_head * shrink, most),
        in_flight_exchange=min(min(2, in_flight) * shrink, most),
        gather_splits=2 if in_flight <= 3 else 1,
        prefetch=min(large.prefetch * shrink, prefetch),
        pace=large.pace // shrink,
    )


def _loads_in_flight(plan: Plan) -> int:
    """Loads of 16 bytes that each lane has under way (templates/hip/stream.h), a multiple of four.

    Enough for memory to be busy while a block waits for an exchange, and not much more: the exchange's polls come back
    after them. Derived from the data sheet, not measured.
    """
    busy = AWAITED * plan.profile.bandwidth_datasheet / plan.blocks / (16 * plan.profile.threads)
    return min(max(4 * round(busy / 4), LEAST_LOADS), MOST_LOADS)


def _context_that_fits(plan: Plan) -> int:
    if not plan.profile.memory_bytes:
        return plan.max_context
    reserve = plan.profile.memory_bytes // 16  # driver, context, exchanges, a neighbour's small change
    free = plan.profile.memory_bytes - reserve - plan.blocks * plan.slab_bytes - plan.embedding_bytes
    s = plan.spec
    per_token = s.layers * s.kv_heads * plan.position_bytes + s.head_dim * 4  # and a row of the rotary table
    return free // per_token // CHUNK * CHUNK


__all__ = ["CHUNK", "KV_DTYPES", "WARPS", "Knobs", "Options", "Plan", "default_knobs", "make_plan"]
