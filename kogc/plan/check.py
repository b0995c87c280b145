"""Static checks of a plan: what the kernel relies on and does not test itself. Each failure names what is at fault."""

from __future__ import annotations

import itertools

from ..errors import KogcError
from .cpu_passes import CpuPasses
from .matvec import FEWEST_GROUPS, FRAGMENT_BYTES, UNITS, WARPS, MatVec
from .order import check_order, owners, scenarios
from .passes import Passes
from .plan import Plan
from .samples import COLUMNS, MOST_SPLIT, Samples
from .shared_memory import COMBINE_BYTES, HEAD_TILE, PARTIAL_UNITS, Region, attention_scratch

COPY_ALIGN = 16  # bytes: of addresses and sizes of bulk copies and vector loads
MAX_COPY = (1 << 20) - 1  # bytes that a barrier in shared memory can count
MAX_VOCAB = 1 << 20  # the greedy choice packs a row into 20 bits
MAX_VECTORS = 32  # vectors that one poll can await: bits of its mask
VECTOR = 4  # words of a vector load
KV_TILE = 16  # positions whose keys and values cross the ring together
KEY_COLUMNS = 32  # columns of a key that one tensor-core step takes
REDUCE_BYTES = 436  # templates/common/words.h
INT_MAX = (1 << 31) - 1


def check(plan: Plan) -> None:
    """Raise KogcError (one line) for the first promise of the kernel's that `plan` does not keep."""
    _check_sizes(plan)
    for phase in plan.phases:
        _check_cover(phase)
        _check_phase(phase)
    _check_slabs(plan)
    _check_ranges(plan)
    _check_attention(plan)
    if plan.target == "cuda":
        _check_ring(plan)
    if plan.target == "hip":
        _check_loads(plan)
    if plan.target != "cpu":
        _check_shared_memory(plan)
        if plan.passes:
            _check_passes(plan.passes, plan)
        if plan.samples:
            _check_samples(plan.samples, plan)
    if plan.cpu_passes:
        _check_cpu_passes(plan.cpu_passes, plan)
    _check_exchanges(plan)
    for where, actions in scenarios(plan):
        check_order(plan.blocks, actions, where)


def _require(kept: bool, message: str) -> None:
    if not kept:
        raise KogcError(f"plan: {message}")


def _check_sizes(plan: Plan) -> None:
    s = plan.spec
    for name, size in (("hidden", s.hidden), ("ffn", s.ffn), ("query rows", s.q_rows)):
        _require(size % VECTOR == 0, f"{name} {size} is not a multiple of {VECTOR}")
    _require(s.vocab <= MAX_VOCAB, f"vocab {s.vocab} is more than {MAX_VOCAB}")
    _require(s.head_dim % KEY_COLUMNS == 0, f"head_dim {s.head_dim} is not a multiple of {KEY_COLUMNS}")


def _check_cover(phase: MatVec) -> None:
    """Every row lies in exactly one block."""
    runs = sorted((phase.rows_of(b) for b in range(phase.blocks)), key=lambda run: (run.start, run.stop))
    at = 0
    for run in runs:
        if len(run):
            _require(run.start == at, f"{phase.name}: row {min(run.start, at)} lies in no block or in two")
            at = run.stop
    _require(at == phase.rows, f"{phase.name}: row {at} lies in no block")


def _check_phase(phase: MatVec) -> None:
    _require(phase.unit in UNITS, f"{phase.name}: units of {phase.unit} rows")
    _require(
        phase.columns <= phase.columns_padded and phase.unit_bytes % FRAGMENT_BYTES == 0,
        f"{phase.name}: {phase.columns} columns do not fit whole fragments of a unit",
    )
    _require(
        phase.fragments % phase.group == 0 and phase.fragments // phase.group >= FEWEST_GROUPS,
        f"{phase.name}: {phase.fragments} fragments in groups of {phase.group} are fewer than {FEWEST_GROUPS}",
    )


def _check_slabs(plan: Plan) -> None:
    """The parts of a slab follow one another from its start to its end, each where a bulk copy can begin."""
    _require(plan.slab_bytes % COPY_ALIGN == 0, f"slabs of {plan.slab_bytes} bytes are not aligned to {COPY_ALIGN}")
    layers = plan.spec.layers
    for block in range(plan.blocks):
        for layer in sorted({0, 1, layers - 1, layers} & {*range(layers + 1)}):
            at = layer * plan.layer_bytes(block)
            for phase in plan.layer_phases if layer < layers else (plan.head,):
                offset = plan.slab_offset(layer, phase, block)
                place = f"{phase.name}: layer {layer} of block {block} at byte {offset} of its slab"
                _require(offset == at, f"{place}, not at {at} where the stream finds it")
                _require(offset % COPY_ALIGN == 0, f"{place} is not aligned to {COPY_ALIGN}")
                at += phase.bytes_of(block)
        _require(at <= plan.slab_bytes, f"slab of block {block}: {at} bytes in {plan.slab_bytes}")


def _check_ranges(plan: Plan) -> None:
    """What the kernel computes in 32 bits: rows, words of an exchange, bytes of a phase in one block, positions."""
    for phase in plan.phases:
        _require(phase.units * phase.unit <= INT_MAX, f"{phase.name}: {phase.rows} rows do not fit 32 bits")
        size = phase.max_units * phase.unit_bytes
        _require(size <= INT_MAX, f"{phase.name}: {size} bytes in one block, 2 GiB or more; use more blocks")
    _require(plan.exchanges.bytes <= INT_MAX, f"exchanges of {plan.exchanges.bytes} bytes do not fit 32 bits")
    _require(plan.max_context + 128 <= INT_MAX, f"max_context {plan.max_context} does not fit 32 bits")


def _check_attention(plan: Plan) -> None:
    units = plan.spec.kv_heads * plan.head_tiles
    heads = plan.heads_per_block
    _require(heads <= HEAD_TILE, f"{heads} query heads in an attention tile of {HEAD_TILE}")
    _require(
        plan.splits == 1 or plan.splits * units <= plan.blocks,
        f"{units} attention units in {plan.splits} splits need more than {plan.blocks} blocks",
    )
    batch = 2 if plan.spec.q_rows // VECTOR > 256 else 1
    awaited = 2 * batch * min(plan.knobs.gather_splits, plan.splits)
    _require(plan.knobs.gather_splits >= 1, f"gather_splits {plan.knobs.gather_splits} is less than 1")
    _require(
        awaited <= MAX_VECTORS,
        f"gather_splits {plan.knobs.gather_splits}: {awaited} vectors at once, a poll has {MAX_VECTORS} bits",
    )


def _check_ring(plan: Plan) -> None:
    knobs, stages = plan.knobs, plan.memory.stages
    step = FRAGMENT_BYTES * plan.group * WARPS
    _require(
        knobs.stage_bytes > 0 and knobs.stage_bytes % step == 0,
        f"stage_bytes {knobs.stage_bytes} is not a multiple of {step}, a round of the warps",
    )
    _require(knobs.stage_bytes <= MAX_COPY, f"stage_bytes {knobs.stage_bytes}: a barrier counts at most {MAX_COPY}")
    tile = KV_TILE * plan.position_bytes
    _require(plan.slot_bytes >= tile, f"stage_bytes {knobs.stage_bytes}: {KV_TILE} keys and values are {tile} bytes")
    fit = f"{max(stages, 0)} of {knobs.stage_bytes} bytes fit shared memory"
    room = plan.profile.smem_per_block
    beside = f"beside the vectors of {plan.spec.name} (ffn {plan.spec.ffn}, hidden {plan.spec.hidden}) in {room} bytes"
    advice = f"{beside} a block of {plan.profile.name}: take a GPU with more shared memory, or smaller stages"
    _require(stages >= 2, f"the ring needs at least 2 stages: {fit} {advice}")
    for name, value in (
        ("in_flight", knobs.in_flight),
        ("in_flight_head", knobs.in_flight_head),
        ("in_flight_exchange", knobs.in_flight_exchange),
    ):
        _require(value >= 1, f"{name} {value} is less than 1")
        _require(value < stages, f"{name} {value} needs {value + 1} stages: {fit}")


def _check_loads(plan: Plan) -> None:
    """Weights go through registers: whole loads of a wave, of which some are under way."""
    for phase in plan.phases:
        _require(
            phase.fragments % phase.together == 0,
            f"{phase.name}: {phase.fragments} fragments of a unit do not fill loads of {phase.together}",
        )
    _require(plan.knobs.in_flight >= 1, f"in_flight {plan.knobs.in_flight} is less than 1")


def _check_shared_memory(plan: Plan) -> None:
    memory = plan.memory
    at = 0
    for region in memory.regions:
        _require(region.offset >= at, f"shared memory: {region.name} overlaps what lies before it")
        _require(region.offset % COPY_ALIGN == 0, f"shared memory: {region.name} at {region.offset} is not aligned")
        at = region.offset + region.bytes
    _require(at <= memory.bytes, f"shared memory: {region.name} ends after the {memory.bytes} bytes asked for")
    limit = plan.profile.smem_per_block
    _require(memory.bytes <= limit, f"shared memory: {memory.bytes} bytes, a block of {plan.profile.name} has {limit}")
    scratch = attention_scratch(plan)
    needs = {
        "ring": memory.stages * plan.slot_bytes,
        "activation": max(2 * max(p.columns_padded for p in plan.phases), scratch),
        "partial": PARTIAL_UNITS * WARPS * 8 * 4,
        "reduce": REDUCE_BYTES,
        "barriers": memory.stages * 16,
    }
    for name, size in needs.items():
        _require(memory[name].bytes >= size, f"shared memory: {name} has {memory[name].bytes} of {size} bytes")


def _check_exchanges(plan: Plan) -> None:
    """Slots do not overlap, and every word has exactly one writer: a word without one would never become ready."""
    at = 0
    for slot in plan.exchanges.slots:
        _require(slot.offset >= at, f"exchange {slot.name} overlaps what lies before it")
        _require(slot.offset % COPY_ALIGN == 0, f"exchange {slot.name} at {slot.offset} is not aligned")
        at = slot.offset + 4 * slot.words
        writer = owners(plan, slot.name)
        for kind, what in ((-1, "no writer"), (-2, "two writers")):
            if (writer == kind).any():
                _require(False, f"exchange {slot.name}: word {int((writer == kind).argmax())} has {what}")
    _require(at <= plan.exchanges.bytes, f"exchange {slot.name} ends after the {plan.exchanges.bytes} bytes of all")


def _check_passes(passes: Passes, plan: Plan) -> None:
    """Every tile and fragment of a phase in one block, and stages that hold what a block takes at a time."""
    room = plan.profile.smem_per_block
    _require(passes.memory_bytes <= room, f"passes: {passes.memory_bytes} bytes of shared memory of {room}")
    for product in passes.products:
        name = f"passes: {product.phase.name}"
        used = product.groups * product.splits
        _require(0 < used <= plan.blocks, f"{name}: {used} parts for {plan.blocks} blocks")
        _require(product.splits <= product.phase.fragments, f"{name}: {product.splits} splits of fewer fragments")
        _require(product.splits == 1 or product.phase.name != "gate_up", f"{name}: gate and up meet in one block")
        needed = product.slice_bytes(passes.slice(product))
        _require(needed <= passes.stage_bytes, f"{name}: a slice of {needed} bytes in stages of {passes.stage_bytes}")
        _require(needed % COPY_ALIGN == 0, f"{name}: slices of {needed} bytes are not aligned")
    _check_regions("passes", passes.memory, passes.scratch)


def _check_cpu_passes(passes: CpuPasses, plan: Plan) -> None:
    """Vectors and exchanges of one token do not reach into the next one's."""
    widest = 2 * max(phase.columns_padded for phase in plan.phases)
    _require(
        passes.activation_bytes >= widest, f"passes: {passes.activation_bytes} of {widest} bytes for an activation"
    )
    needs = {
        "activation": passes.tokens * passes.activation_bytes,
        "scratch": COMBINE_BYTES * plan.spec.head_dim // VECTOR,
        "residual": 4 * passes.tokens * plan.spec.hidden,
        "reduce": REDUCE_BYTES,
    }
    for name, size in needs.items():
        _require(passes[name].bytes >= size, f"passes: {name} has {passes[name].bytes} of {size} bytes")
    _check_regions("passes", passes.memory)
    last = passes.memory[-1]
    _require(
        last.offset + last.bytes <= passes.memory_bytes, f"passes: {last.name} ends after {passes.memory_bytes} bytes"
    )
    for name in ("qkv", "partial", "attention", "o", "hidden", "down"):
        slot = plan.exchanges[name]
        end = slot.offset + 4 * slot.words
        _require(
            end <= passes.exchange_bytes, f"passes: exchange {name} ends at {end}, a token's at {passes.exchange_bytes}"
        )


def _check_samples(samples: Samples, plan: Plan) -> None:
    """Slices that a stage holds and that make up a phase, and words enough for all blocks and samples."""
    room = plan.profile.smem_per_block
    _require(samples.memory_bytes <= room, f"samples: {samples.memory_bytes} bytes of shared memory of {room}")
    _require(samples.stages >= 2, f"samples: a ring of {samples.stages} stages")
    for product in samples.products:
        name, phase = f"samples: {product.phase.name}", product.phase
        needed = product.slice_bytes
        _require(needed <= samples.stage_bytes, f"{name}: a slice of {needed} bytes in stages of {samples.stage_bytes}")
        _require(needed <= MAX_COPY, f"{name}: a barrier counts at most {MAX_COPY} of {needed} bytes")
        _require(
            0 < product.slice <= phase.fragments, f"{name}: slices of {product.slice} fragments of {phase.fragments}"
        )
        _require(not product.split or product.most_tiles <= MOST_SPLIT, f"{name}: {product.most_tiles} tiles to a warp")
    _require(
        samples.choosers == 1 or samples.choosers * COLUMNS <= plan.blocks,
        f"samples: {COLUMNS} groups of {samples.choosers} blocks need more than {plan.blocks}",
    )
    _check_regions("samples", samples.memory, samples.scratch)


def _check_regions(what: str, *maps: tuple[Region, ...]) -> None:
    for regions in maps:
        for before, after in itertools.pairwise(regions):
            kept = before.offset + before.bytes <= after.offset and after.offset % COPY_ALIGN == 0
            _require(kept, f"{what}: {after.name} at {after.offset} overlaps {before.name} or is not aligned")
