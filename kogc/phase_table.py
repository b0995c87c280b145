"""What a plan means in numbers: work per block, exchanges, shared memory, bytes per token, time at the ceiling."""

from __future__ import annotations

from typing import Any

from .plan.cpu_passes import CpuPasses
from .plan.matvec import MatVec
from .plan.passes import Passes
from .plan.plan import Plan
from .plan.samples import Samples

DEPTHS = (0, 512, 4096, 32768)  # positions already in the KV cache for which a token's cost is shown


def phase_table(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, ready for JSON. Sizes in bytes, times in seconds; `[least, most]` are over the blocks."""
    spec = plan.spec
    return {
        "model": spec.name,
        "gpu": plan.profile.name,
        "target": plan.target,
        "arch": plan.profile.arch,
        "blocks": plan.blocks,
        "max_context": plan.max_context,
        "layers": spec.layers,
        "phases": [_phase(plan, phase) for phase in plan.phases],
        "attention": {
            "units": spec.kv_heads * plan.head_tiles,
            "splits": plan.splits,
            "heads_per_block": plan.heads_per_block,
        },
        "exchanges": [{"name": s.name, "words": s.words, "bytes": s.words * 4} for s in plan.exchanges.slots],
        "shared_memory": _shared_memory(plan),
        "passes": _passes(plan.passes) if plan.passes else None,
        "cpu_passes": _cpu_passes(plan.cpu_passes) if plan.cpu_passes else None,
        "samples": _samples(plan.samples) if plan.samples else None,
        "slab_bytes": plan.slab_bytes,
        "kv_dtype": plan.kv_dtype,
        "kv_cache_bytes": plan.kv_bytes,
        "per_token": [_token_cost(plan, depth) for depth in DEPTHS if depth < plan.max_context],
        "ceiling": {"bandwidth": plan.profile.ceiling, "how": _ceiling_source(plan)},
        "notes": list(plan.notes),
    }


def model_weight_bytes(plan: Plan) -> int:
    """Bytes of the weights of one token as the model has them, without the padding of the slabs."""
    per_layer = sum(p.rows * p.columns for p in plan.layer_phases)
    return 2 * (plan.spec.layers * per_layer + plan.head.rows * plan.head.columns)


def _phase(plan: Plan, phase: MatVec) -> dict[str, Any]:
    rows = [len(phase.rows_of(block)) for block in range(plan.blocks)]
    sizes = [phase.bytes_of(block) for block in range(plan.blocks)]
    stage = plan.knobs.stage_bytes
    return {
        "name": phase.name,
        "times": 1 if phase is plan.head else plan.spec.layers,
        "rows": phase.rows,
        "columns": phase.columns,
        "unit": phase.unit,
        "rows_per_block": [min(rows), max(rows)],
        "bytes_per_block": [min(sizes), max(sizes)],
        "stages": -(-max(sizes) // stage) if plan.memory.stages else 0,
    }


def _shared_memory(plan: Plan) -> dict[str, Any]:
    """The map of a block's shared memory; empty on a target that has none."""
    if plan.target == "cpu":
        return {"bytes": 0, "stages": 0, "stage_bytes": 0, "regions": []}
    regions = [{"name": r.name, "offset": r.offset, "bytes": r.bytes} for r in plan.memory.regions]
    return {
        "bytes": plan.memory.bytes,
        "stages": plan.memory.stages,
        "stage_bytes": plan.knobs.stage_bytes,
        "regions": regions,
    }


def _passes(passes: Passes) -> dict[str, Any]:
    """How a prompt goes through the layers: `traffic` is what the busiest block moves a layer, in bytes."""
    return {
        "tokens": passes.tokens,
        "stages": passes.stages,
        "stage_bytes": passes.stage_bytes,
        "scratch_bytes": passes.scratch_bytes,
        "products": [
            {
                "name": p.phase.name,
                "groups": p.groups,
                "splits": p.splits,
                "tiles_per_block": p.most_tiles,
                "fragments_per_block": p.most_fragments,
                "slice": passes.slice(p),
                "traffic": p.traffic,
            }
            for p in passes.products
        ],
    }


def _cpu_passes(passes: CpuPasses) -> dict[str, Any]:
    """How a prompt goes through the layers on a CPU: memory of a thread, exchanges of all tokens of a pass."""
    return {
        "tokens": passes.tokens,
        "thread_bytes": passes.memory_bytes,
        "exchange_bytes": passes.tokens * passes.exchange_bytes,
    }


def _samples(samples: Samples) -> dict[str, Any]:
    """How continuations are made together; `slice`: fragments of each unit of a phase in a stage."""
    return {
        "columns": samples.columns,
        "stages": samples.stages,
        "stage_bytes": samples.stage_bytes,
        "in_flight": samples.in_flight,
        "scratch_bytes": samples.scratch_bytes,
        "choosers": samples.choosers,
        "products": [
            {"name": p.phase.name, "tiles_per_block": p.most_tiles, "slice": p.slice, "split": p.split}
            for p in samples.products
        ],
    }


def _token_cost(plan: Plan, depth: int) -> dict[str, Any]:
    weights, kv = plan.weight_bytes, plan.kv_bytes_read(depth)
    seconds = (weights + kv) / plan.profile.ceiling if plan.profile.ceiling else None
    return {
        "depth": depth,
        "weight_bytes": weights,
        "model_weight_bytes": model_weight_bytes(plan),
        "kv_bytes": kv,
        "seconds_at_ceiling": seconds,
        "tokens_per_second_at_ceiling": 1 / seconds if seconds else None,
    }


def _ceiling_source(plan: Plan) -> str:
    if plan.profile.measured.read_bandwidth is not None:
        return f"measured: {plan.profile.measured.how}"
    return "data sheet" if plan.profile.bandwidth_datasheet else "unknown: measured by bench"
