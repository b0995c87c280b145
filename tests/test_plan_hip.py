"""Plans for AMD GPUs: loads under way by bandwidth, units that fill a wave's loads, LDS for what a block needs."""

from __future__ import annotations

import dataclasses

import pytest
from builds import kogc_cli, one_line

from kogc import tune
from kogc.errors import KogcError
from kogc.plan.check import check
from kogc.plan.matvec import cut
from kogc.plan.plan import Knobs, Options, Plan, make_plan
from kogc.plan.shared_memory import COMBINE_BYTES
from kogc.profile import load_profile
from kogc.spec import list_specs, load_spec

GPUS = ("mi300x", "mi325x", "mi355x", "rx-9070-xt")


def plan_of(gpu: str, model: str = "llama-3.2-1b", knobs: Knobs | None = None) -> Plan:
    profile = dataclasses.replace(load_profile(gpu), memory_bytes=1 << 40)
    return make_plan(load_spec(model), profile, Options(knobs=knobs))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", list_specs())
def test_every_model_has_a_sound_plan(model: str, gpu: str) -> None:
    plan = plan_of(gpu, model)
    if plan.blocks <= plan.spec.hidden // 8:  # else a build takes fewer blocks
        check(plan)
    for phase in plan.phases:
        assert phase.fragments % (plan.profile.lanes // 32) == 0
    assert plan.memory.bytes <= plan.profile.smem_per_block
    assert plan.memory["activation"].bytes >= plan.profile.threads * COMBINE_BYTES
    assert plan.memory["ring"].bytes == 0


def test_more_bandwidth_has_more_loads_under_way() -> None:
    loads = [plan_of(gpu).knobs.in_flight for gpu in ("rx-9070-xt", "mi300x", "mi355x")]
    assert loads == sorted(loads)
    assert all(8 <= n <= 16 and n % 4 == 0 for n in loads)
    assert [plan_of(gpu).knobs.stage_bytes for gpu in ("rx-9070-xt", "mi300x")] == [4096, 8192]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(KogcError, match="in_flight 0 is less than 1"):
        check(plan_of("mi300x", knobs=Knobs(in_flight=0)))
    plan = plan_of("mi300x", "qwen3-8b")
    small = dataclasses.replace(plan, profile=dataclasses.replace(plan.profile, smem_per_block=32768))
    with pytest.raises(KogcError, match="a block of mi300x has 32768"):
        check(small)


def test_units_are_padded_to_whole_loads_of_a_wave() -> None:
    one = cut("o", 64, 17 * 32, 4, 0)
    assert (one.columns_padded, cut("o", 64, 17 * 32, 4, 0, together=2).columns_padded) == (17 * 32, 18 * 32)


def test_the_command_line_knows_the_profiles() -> None:
    shown = kogc_cli("plan", "llama-3.1-8b", "--gpu", "mi300x")
    assert shown.exit_code == 0
    assert "llama-3.1-8b on mi300x (hip, gfx942): 256 blocks" in shown.stdout
    assert "shared memory: " in shown.stdout
    assert "ring of" not in shown.stdout
    listed = kogc_cli("gpus").stdout
    assert all(f"\n{gpu} " in listed for gpu in GPUS)
    built = kogc_cli("build", "llama-3.2-1b", "--gpu", "mi355x", "--dry-run")
    assert built.exit_code == 0, built.output
    many = kogc_cli("plan", "llama-3.2-1b", "--gpu", "rx-9070-xt", "--blocks", 65)
    assert "--blocks 65: rx-9070-xt has 64 compute units" in one_line(many.stderr)
    large = kogc_cli("plan", "qwen3-8b", "--gpu", "rx-9070-xt")
    assert large.exit_code == 1
    assert "qwen3-8b on rx-9070-xt: 15.1 GB of weights in 17.2 GB of memory leave no room" in one_line(large.stderr)


def test_a_tuner_searches_what_means_something_there() -> None:
    profile = load_profile("mi300x")
    start = tune.Setting(profile.blocks, plan_of("mi300x").knobs)
    assert tune.candidates_for(profile, start).keys() == {"in_flight", "gather_splits", "turn", "blocks"}
