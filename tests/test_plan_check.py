"""The static checks: they pass every shipped model, and each planted violation is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kogc.errors import KogcError
from kogc.plan.check import check
from kogc.plan.exchange import MOST_LISTED, ExchangeMap, rows_listed
from kogc.plan.matvec import MatVec
from kogc.plan.order import Action, Graph, check_order, owners, scenarios
from kogc.plan.plan import Knobs, Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.spec import list_specs, load_spec

H200 = load_profile("h200-sxm")
DEFAULT = Knobs()


def plan_of(blocks: int = 12, knobs: Knobs = DEFAULT, model: str = "llama-3.2-1b", **spec: Any) -> Plan:
    return make_plan(dataclasses.replace(load_spec(model), **spec), H200, Options(blocks=blocks, knobs=knobs))


def refused(plan: Plan, words: str) -> None:
    with pytest.raises(KogcError, match=words) as error:
        check(plan)
    assert "\n" not in str(error.value)


def with_cached(plan: Plan, **values: Any) -> Plan:
    """The plan with derived properties replaced, as a bug in the planner would."""
    plan.__dict__.update(values)
    return plan


@pytest.mark.parametrize("model", list_specs())
@pytest.mark.parametrize("profile", ["h200-sxm", "h100-sxm"])
def test_shipped_models_pass(model: str, profile: str) -> None:
    check(make_plan(load_spec(model), load_profile(profile)))


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 13, 40])
def test_any_number_of_blocks_passes(blocks: int) -> None:
    for model in ("smollm2-135m", "qwen2.5-1.5b"):
        check(make_plan(load_spec(model), load_profile("cpu-avx2"), Options(blocks=blocks)))


def test_a_prompt_without_logits_is_checked() -> None:
    """Its steps end with a vector that nobody reads, which would have held a block back."""
    spec = {"hidden": 352, "ffn": 768, "heads": 3, "kv_heads": 1, "head_dim": 32, "vocab": 616, "layers": 3}
    plan = plan_of(98, model="smollm2-135m", max_context=1024, **spec)
    refused(plan, "a prompt with 1 attention splits: exchange hidden: block 0 may rewrite it before block 84")
    check(plan_of(49, model="smollm2-135m", max_context=1024, **spec))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": 2050}, "hidden 2050"),
        ({"ffn": 8190}, "ffn 8190"),
        ({"vocab": (1 << 20) + 1}, "vocab 1048577"),
        ({"head_dim": 72}, "head_dim 72"),
    ],
)
def test_sizes_that_the_kernel_cannot_hold(change: dict[str, int], words: str) -> None:
    refused(plan_of(**change), words)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (Knobs(stage_bytes=5000), "stage_bytes 5000 is not a multiple of 4096"),
        (Knobs(stage_bytes=16384 * 8), "at least 2 stages: 1 of"),
        (Knobs(in_flight=12), "in_flight 12 needs 13 stages"),
        (Knobs(in_flight_head=99), "in_flight_head 99"),
        (Knobs(in_flight=0), "in_flight 0"),
        (Knobs(gather_splits=0), "gather_splits 0"),
        (Knobs(stage_bytes=1 << 20), "a barrier counts at most"),
    ],
)
def test_knobs_that_the_ring_cannot_hold(knobs: Knobs, words: str) -> None:
    refused(plan_of(knobs=knobs), words)


def test_a_model_too_wide_for_a_block_says_what_to_do() -> None:
    wide = {"layers": 2, "hidden": 8192, "ffn": 28672, "vocab": 32000, "head_dim": 128, "heads": 64, "kv_heads": 8}
    spec = dataclasses.replace(load_spec("llama-3.1-8b"), **wide)
    check(make_plan(spec, load_profile("a100-sxm-80gb")))
    with pytest.raises(KogcError, match="ring needs at least 2 stages: .*ffn 28672.* take a GPU with more") as caught:
        check(make_plan(spec, load_profile("rtx-4090")))
    assert "\n" not in str(caught.value)


def test_more_splits_at_once_than_a_poll_has_bits() -> None:
    refused(plan_of(128, Knobs(gather_splits=9)), "gather_splits 9: 36 vectors")


def test_shared_memory_beyond_the_profile() -> None:
    plan = plan_of()
    memory = dataclasses.replace(plan.memory, bytes=H200.smem_per_block + 16)
    refused(with_cached(plan, memory=memory), "shared memory: 232464 bytes")


@pytest.mark.parametrize("name", ["ring", "activation", "partial", "reduce", "barriers"])
def test_a_region_too_small(name: str) -> None:
    plan = plan_of()
    size = 432 if name == "reduce" else plan.memory[name].bytes - 16  # the only one that has bytes to spare
    regions = tuple(dataclasses.replace(r, bytes=size) if r.name == name else r for r in plan.memory.regions)
    refused(with_cached(plan, memory=dataclasses.replace(plan.memory, regions=regions)), f"{name} has {size} of")


def test_overlapping_regions() -> None:
    plan = plan_of()
    first, *rest = plan.memory.regions
    moved = (dataclasses.replace(first, offset=16), *rest)
    refused(with_cached(plan, memory=dataclasses.replace(plan.memory, regions=moved)), "overlaps")


class Greedy(MatVec):
    """Block 1 also takes the last unit of block 0."""

    def first_unit(self, block: int) -> int:
        return super().first_unit(block) - (block == 1)


class Lazy(MatVec):
    """The last block leaves its last unit to nobody."""

    def units_of(self, block: int) -> int:
        return super().units_of(block) - (block == self.blocks - 1)


@pytest.mark.parametrize(("kind", "words"), [(Greedy, "row .* in two"), (Lazy, "row .* in no block")])
@pytest.mark.parametrize("index", range(4))
def test_rows_dealt_twice_or_never(kind: type[MatVec], words: str, index: int) -> None:
    plan = plan_of()
    phases = list(plan.layer_phases)
    phases[index] = kind(**dataclasses.asdict(phases[index]))
    refused(with_cached(plan, layer_phases=tuple(phases)), f"{phases[index].name}: {words}")


def test_a_slab_too_short() -> None:
    plan = plan_of()
    refused(with_cached(plan, slab_bytes=plan.slab_bytes - 4096), "slab of block")


def test_slabs_that_are_not_aligned() -> None:
    plan = plan_of()
    refused(with_cached(plan, slab_bytes=plan.slab_bytes + 8), "not aligned")


def test_a_part_where_the_stream_does_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Plan.slab_offset
    monkeypatch.setattr(Plan, "slab_offset", lambda *a: true(*a) + 512 * (a[2].name == "down"))
    refused(plan_of(), "down: layer 0 of block 0 .* where the stream finds it")


def test_a_part_of_two_gigabytes() -> None:
    refused(plan_of(1, ffn=1 << 19), "gate_up: .* use more blocks")


def change_slot(plan: Plan, name: str, **values: int) -> Plan:
    slots = tuple(dataclasses.replace(s, **values) if s.name == name else s for s in plan.exchanges.slots)
    return with_cached(plan, exchanges=ExchangeMap(slots, plan.exchanges.bytes))


def test_exchange_slots_that_overlap_or_are_not_aligned() -> None:
    refused(change_slot(plan_of(), "o", offset=0), "exchange o overlaps")
    plan = plan_of()
    refused(change_slot(plan, "o", offset=plan.exchanges["o"].offset + 4), "exchange o .* not aligned")
    plan = plan_of()
    bytes_short = ExchangeMap(plan.exchanges.slots, plan.exchanges.bytes - 128)
    refused(with_cached(plan, exchanges=bytes_short), "seen ends after")


def test_a_word_without_a_writer() -> None:
    plan = plan_of()
    words = plan.exchanges["keys"].words
    refused(change_slot(plan, "keys", words=words + 1), f"exchange keys: word {words} has no writer")


def test_a_word_with_two_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kogc.plan.order.units_of", lambda plan, block: range(plan.spec.kv_heads))
    refused(plan_of(24), "exchange partial: word 0 has two writers")


def test_every_word_of_a_real_plan_has_one_writer() -> None:
    plan = plan_of(13, model="qwen2.5-1.5b")
    for slot in plan.exchanges.slots:
        writer = owners(plan, slot.name)
        assert len(writer) == slot.words
        assert writer.min() >= 0


def dropped(actions: list[Action], slot: str) -> list[Action]:
    """The program without its reads of one slot: nobody waits for it any more."""
    return [a for a in actions if not (a.slot == slot and a.reads is not None)]


@pytest.mark.parametrize("blocks", [2, 12, 64])
def test_the_order_of_a_layer_needs_its_exchanges(blocks: int) -> None:
    plan = plan_of(blocks, Knobs(gather_splits=1))
    for where, actions in scenarios(plan):
        check_order(blocks, actions, where)
        with pytest.raises(KogcError, match="exchange qkv: block .* may rewrite it before block"):
            check_order(blocks, [a for a in actions if a.slot == "qkv"], where)


def test_without_the_exchanges_after_attention_queries_are_overwritten_too_soon() -> None:
    plan = plan_of(64)
    _, actions = next(iter(scenarios(plan)))
    for slot in ("o", "hidden", "down"):
        check_order(64, dropped(actions, slot), "one of three may go")  # each all-gather alone orders the whole layer
    for slot in ("o", "hidden", "down"):
        actions = dropped(actions, slot)
    with pytest.raises(
        KogcError, match="exchange (qkv|partial): block [0-9]+ may rewrite it before block [0-9]+ has read it"
    ):
        check_order(64, actions, "none of them")


def test_what_blocks_read_of_attention() -> None:
    """Two tiles of six query heads to a KV head, 16 splits: a block of each of the first three reads six queries."""
    plan = plan_of(64, Knobs(gather_splits=1), heads=24, kv_heads=2)
    graph, nobody = Graph(plan), 63
    graph.owners["qkv"] = np.repeat(np.arange(28), 64)  # as if each vector were of a block of its own
    heads = np.repeat(np.arange(24), 16 * 68).reshape(24, 16, 68)
    heads[:, 3:] = nobody
    graph.owners["partial"] = heads.reshape(-1)
    _, queries, _, combined, *_ = graph.layer(3)
    for block in range(64):
        unit, split = divmod(block, 16)
        new = [24 + unit // 2, 26 + unit // 2] if split == 2 else []  # the newest split adds the new key and value
        read = [*range(6 * unit, 6 * unit + 6), *new] if split < 3 else []
        assert np.flatnonzero(queries.reads[block]).tolist() == read
        assert np.flatnonzero(combined.reads[block]).tolist() == ([block] if block < 24 else [])
    graph.plan = dataclasses.replace(plan, knobs=Knobs(gather_splits=3))
    gathered = graph.layer(3)[3]
    assert all(np.flatnonzero(row).tolist() == [*range(24)] for row in gathered.reads)


def test_a_slot_used_again_right_after_it_was_read_is_found() -> None:
    """Having read all, a block knows that the others have written, not that they have read."""
    _, actions = next(iter(scenarios(plan_of())))
    gather = [a for a in actions if a.slot == "down"][:2]
    other = [a for a in actions if a.slot == "hidden"][:2]
    check_order(12, [*gather, *other, *gather], "another exchange between")
    with pytest.raises(KogcError, match="exchange down: block 1 may rewrite it before block 0 has read it"):
        check_order(12, [*gather, *gather], "nothing between")


def sampled(plan: Plan, rounds: int = 2, listed: bool = False) -> list[Action]:
    """A token chosen by sampling, twice, with a layer before each."""
    graph = Graph(plan)
    return [*graph.layer(1), *graph.sampled(rounds, True, listed)] * 2


@pytest.mark.parametrize("blocks", [2, 12, 64, 132])
def test_the_rounds_of_a_search_need_each_other(blocks: int) -> None:
    """A histogram is rewritten in the next round: only the sums that all await show that it has been read."""
    plan = plan_of(blocks)
    check_order(blocks, sampled(plan), "sampling")
    with pytest.raises(KogcError, match="exchange histogram: block .* may rewrite it before block"):
        check_order(blocks, dropped(sampled(plan), "totals"), "no totals")
    with pytest.raises(KogcError, match="exchange totals: block .* may rewrite it before block"):
        check_order(blocks, dropped(sampled(plan), "histogram"), "no histogram")


def test_candidates_need_the_layers_between_two_choices() -> None:
    plan = plan_of()
    actions = [a for a in sampled(plan) if a.slot in ("candidates", "keys")]
    with pytest.raises(KogcError, match="exchange candidates: block .* may rewrite it before block 0 has read it"):
        check_order(plan.blocks, actions, "one choice after the other")


@pytest.mark.parametrize("blocks", [2, 12, 132])
def test_a_choice_by_short_lists_takes_one_exchange_and_needs_the_layers(blocks: int) -> None:
    plan = plan_of(blocks)
    actions = sampled(plan, 0, listed=True)
    check_order(blocks, actions, "one exchange")
    gathered = {a.slot for a in actions if a.reads is not None and a.reads.all()}
    assert gathered - {a.slot for a in Graph(plan).layer(1)} == {"shortlist"}
    with pytest.raises(KogcError, match="exchange shortlist: block .* may rewrite it before block"):
        check_order(blocks, [a for a in actions if a.slot == "shortlist"], "one choice after the other")


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 64, 128, 132, 200])
def test_lists_hold_twice_the_longest_top_k(blocks: int) -> None:
    assert blocks * rows_listed(blocks) >= 2 * MOST_LISTED
    assert rows_listed(blocks) >= 16
