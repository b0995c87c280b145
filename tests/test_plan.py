"""The partition: every row dealt once, evenly, in units that waste little."""

from __future__ import annotations

import dataclasses

import pytest

from kogc.errors import UsageError
from kogc.plan.check import check
from kogc.plan.matvec import FEWEST_GROUPS, MatVec, cut
from kogc.plan.plan import Knobs, Options, make_plan
from kogc.profile import load_profile
from kogc.spec import list_specs, load_spec

H200 = load_profile("h200-sxm")
SHAPES = [(rows, columns, blocks, rotation) for rows in (1, 7, 8, 67, 320, 4096) for columns, blocks, rotation in
          ((96, 1, 0), (512, 5, 3), (1152, 128, 100))]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "blocks", "rotation"), SHAPES)
def test_every_row_lies_in_one_block(rows: int, columns: int, blocks: int, rotation: int) -> None:
    phase = cut("o", rows, columns, blocks, rotation)
    dealt = [row for block in range(blocks) for row in phase.rows_of(block)]
    assert sorted(dealt) == list(range(rows))


@pytest.mark.parametrize(("rows", "columns", "blocks", "rotation"), SHAPES)
def test_no_block_has_two_units_more_than_another(rows: int, columns: int, blocks: int, rotation: int) -> None:
    phase = cut("o", rows, columns, blocks, rotation)
    units = [phase.units_of(block) for block in range(blocks)]
    assert sum(units) == phase.units
    assert max(units) - min(units) <= 1
    assert max(units) == phase.max_units
    if phase.remainder:
        assert units[rotation] == phase.max_units


def test_units_of_four_rows_where_they_make_the_busiest_block_lighter() -> None:
    assert cut("o", 1024, 1024, 128, 0).unit == 8
    assert cut("o", 12 * 128, 1024, 128, 0).unit == 4


@pytest.mark.parametrize("unit", [8, 4])
@pytest.mark.parametrize("columns", [1, 96, 512, 1088, 1152, 2048])
def test_a_unit_has_enough_whole_groups(unit: int, columns: int) -> None:
    phase = MatVec("o", 64, columns, unit, 4, 0)
    assert phase.columns_padded >= columns
    assert phase.fragments * 512 == phase.unit_bytes
    assert phase.fragments % phase.group == 0
    assert phase.fragments // phase.group >= FEWEST_GROUPS


def test_remainders_follow_one_another_around_the_blocks() -> None:
    plan = make_plan(load_spec("smollm2-135m"), H200)
    at = 0
    for phase in plan.phases:
        assert phase.rotation == at
        at = (at + phase.remainder) % plan.blocks


@pytest.mark.parametrize("model", list_specs())
def test_blocks_carry_nearly_the_same_bytes(model: str) -> None:
    """The busiest block decides: it may carry little more than the mean (small models have few units to deal)."""
    plan = make_plan(load_spec(model), H200)
    layers = [plan.layer_bytes(block) for block in range(plan.blocks)]
    limit = 1.3 if model == "smollm2-135m" else 1.15
    assert max(layers) <= limit * sum(layers) / len(layers)
    total = plan.spec.layers * sum(layers) + sum(plan.head.bytes_of(b) for b in range(plan.blocks))
    assert total == plan.weight_bytes


@pytest.mark.parametrize("model", list_specs())
def test_padding_is_small(model: str) -> None:
    plan = make_plan(load_spec(model), H200)
    s = plan.spec
    true = s.layers * sum(p.rows * p.columns * 2 for p in plan.layer_phases) + s.vocab * s.hidden * 2
    assert true <= plan.weight_bytes <= 1.05 * true


def test_the_parts_of_a_slab_follow_one_another() -> None:
    plan = make_plan(load_spec("llama-3.2-1b"), H200)
    for block in (0, 77, 127):
        at = 0
        for layer in range(plan.spec.layers):
            for phase in plan.layer_phases:
                assert plan.slab_offset(layer, phase, block) == at
                at += phase.bytes_of(block)
        assert plan.slab_offset(plan.spec.layers, plan.head, block) == at
        assert at + plan.head.bytes_of(block) <= plan.slab_bytes
    assert plan.slab_bytes % 128 == 0


def test_shared_memory_is_filled_with_stages() -> None:
    plan = make_plan(load_spec("llama-3.2-1b"), H200)
    memory = plan.memory
    assert memory.bytes <= H200.smem_per_block
    assert memory.bytes + plan.knobs.stage_bytes + 16 > H200.smem_per_block
    ends = [r.offset + r.bytes for r in memory.regions]
    assert [r.offset for r in memory.regions] == [0, *ends[:-1]]


def test_context_is_limited_by_memory_and_it_is_said() -> None:
    plan = make_plan(load_spec("llama-3.1-8b"), H200)
    assert plan.max_context == 131072
    assert plan.notes == ()
    small = dataclasses.replace(H200, memory_bytes=24 << 30)
    limited = make_plan(load_spec("llama-3.1-8b"), small)
    assert limited.max_context % 128 == 0
    assert 0 < limited.max_context < 131072
    assert str(limited.max_context) in limited.notes[0]
    with pytest.raises(UsageError, match="--max-context 131072"):
        make_plan(load_spec("llama-3.1-8b"), small, Options(max_context=131072))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (Options(blocks=133), "--blocks 133"),
        (Options(max_context=1 << 20), "--max-context"),
        (Options(blocks=-1), "--blocks -1"),
        (Options(kv_dtype="fp4"), "--kv-dtype fp4: one of bf16, fp8"),
    ],
)
def test_impossible_options_name_their_flag(options: Options, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        make_plan(load_spec("llama-3.2-1b"), H200, options)


def test_kv_bytes_count_the_window() -> None:
    plan = make_plan(load_spec("qwen3-0.6b"), H200)
    s = plan.spec
    assert plan.kv_bytes_read(100) == s.layers * s.kv_heads * 100 * s.head_dim * 4
    windowed = dataclasses.replace(plan, spec=dataclasses.replace(s, sliding_window=64, sliding_layers=(0,)))
    assert windowed.kv_bytes_read(100) == plan.kv_bytes_read(100) - s.kv_heads * 36 * s.head_dim * 4


def test_an_fp8_cache_takes_half_the_bytes_and_a_scale_a_vector() -> None:
    small = dataclasses.replace(H200, memory_bytes=24 << 30)
    plan, fp8 = (make_plan(load_spec("llama-3.1-8b"), small, Options(kv_dtype=kind)) for kind in ("bf16", "fp8"))
    s = plan.spec
    assert fp8.kv_bytes_read(1000) == s.layers * s.kv_heads * 1000 * (2 * s.head_dim + 2)
    assert fp8.kv_bytes == s.layers * s.kv_heads * fp8.chunks * fp8.chunk_bytes
    assert 1.9 < fp8.max_context / plan.max_context < 2  # of the same memory
    assert fp8.slab_bytes == plan.slab_bytes
    check(fp8)


@pytest.mark.parametrize(
    ("name", "in_flight"), [("smollm2-135m", 3), ("qwen3-0.6b", 3), ("llama-3.2-3b", 4), ("llama-3.1-8b", 5)]
)
def test_larger_layers_have_more_in_flight_unless_knobs_are_given(name: str, in_flight: int) -> None:
    spec = load_spec(name)
    knobs = make_plan(spec, H200).knobs
    assert (knobs.in_flight, knobs.in_flight_exchange) == (in_flight, 2)
    assert make_plan(spec, H200, Options(knobs=Knobs(in_flight=2))).knobs == Knobs(in_flight=2)


@pytest.mark.parametrize("gpu", ["rtx-5090", "a10g"])
@pytest.mark.parametrize("name", list_specs())
def test_small_shared_memory_has_small_stages_and_as_many_bytes_in_flight(gpu: str, name: str) -> None:
    profile = load_profile(gpu)
    plan, large = make_plan(load_spec(name), profile), make_plan(load_spec(name), H200)
    assert (plan.knobs.stage_bytes, plan.group <= 2) == (8192, True)
    assert plan.memory.stages > max(plan.knobs.in_flight, plan.knobs.in_flight_head, plan.knobs.in_flight_exchange)
    assert plan.knobs.in_flight >= min(2, large.knobs.in_flight)
    fetched = plan.blocks * plan.knobs.prefetch * plan.knobs.stage_bytes
    assert 0 < 3 * fetched <= profile.l2_bytes
    check(plan)


@pytest.mark.parametrize("name", list_specs())
def test_hopper_has_the_stages_that_were_measured(name: str) -> None:
    for gpu in ("h200-sxm", "h100-sxm"):
        knobs = make_plan(load_spec(name), load_profile(gpu)).knobs
        assert (knobs.stage_bytes, knobs.in_flight_head, knobs.prefetch, knobs.pace) == (16384, 4, 8, 900)


def test_units_of_eight_rows_where_units_of_four_have_too_few_groups() -> None:
    """Unless that is too many bytes more for the busiest block."""

    def units(model: str, gpu: str) -> dict[str, int]:
        plan = make_plan(load_spec(model), load_profile(gpu), Options(max_context=2048))
        return {phase.name: phase.unit for phase in plan.layer_phases}

    assert units("qwen2.5-1.5b", "h200-sxm") == {"qkv": 8, "o": 8, "gate_up": 8, "down": 4}
    assert units("qwen3-0.6b", "b200")["gate_up"] == 4
