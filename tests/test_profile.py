"""GPU profiles: the facts that are shipped, and what a profile file is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest
from builds import kogc_cli, one_line

from kogc import measure
from kogc.errors import KogcError
from kogc.profile import dump_profile, list_profiles, load_profile, parse_profile
from kogc.resources import data_dir
from kogc.runtime.cuda_driver import Driver

H200 = (data_dir("gpu_profiles") / "h200-sxm.yaml").read_text(encoding="utf-8")


def test_the_shipped_profiles() -> None:
    assert " ".join(list_profiles()) == (
        "a100-sxm-80gb a10g b200 b300 cpu-avx2 cpu-avx512 cpu-avx512-bf16 dgx-spark h100-sxm h200-sxm l40s"
        " mi300x mi325x mi355x rtx-3090 rtx-4090 rtx-5090 rtx-pro-6000 rx-9070-xt"
    )
    for name in list_profiles():
        assert load_profile(name).name == name


# Opt-in shared memory of a block, by architecture (CUDA programming guide), and whether it has bulk copies.
ARCHITECTURES = {
    "sm_80": (163, False),
    "sm_86": (99, False),
    "sm_89": (99, False),
    "sm_90a": (227, True),
    "sm_100a": (227, True),
    "sm_103a": (227, True),
    "sm_120a": (99, True),
    "sm_121a": (99, True),
}


def test_gpus_have_what_their_architecture_has_and_no_number_that_nobody_measured() -> None:
    gpus = [p for p in map(load_profile, list_profiles()) if p.target == "cuda"]
    assert {p.arch for p in gpus} == set(ARCHITECTURES)
    for p in gpus:
        assert (p.smem_per_block >> 10, p.bulk_copies) == ARCHITECTURES[p.arch], p.name
        assert (p.measured.read_bandwidth is None) == (p.name != "h200-sxm")
        assert "ources: " in (data_dir("gpu_profiles") / f"{p.name}.yaml").read_text() or p.name.startswith("h")


# Lanes of a wave and LDS of a workgroup, by architecture (AMD's ISA guides).
AMD = {"gfx942": (64, 64), "gfx950": (64, 160), "gfx1201": (32, 64)}


def test_amd_gpus_have_what_their_architecture_has_and_no_number_that_nobody_measured() -> None:
    gpus = [p for p in map(load_profile, list_profiles()) if p.target == "hip"]
    assert {p.arch for p in gpus} == set(AMD)
    for p in gpus:
        assert (p.lanes, p.smem_per_block >> 10) == AMD[p.arch], p.name
        assert p.measured.read_bandwidth is None
        assert "Sources: " in (data_dir("gpu_profiles") / f"{p.name}.yaml").read_text()
        assert p.blocks <= p.sms


def test_hopper_without_bulk_copies_is_a_profile_of_ones_own() -> None:
    assert not parse_profile(H200.replace("arch: sm_90a", "arch: sm_90")).bulk_copies


def test_h200() -> None:
    profile = load_profile("h200-sxm")
    assert (profile.target, profile.arch, profile.sms, profile.blocks) == ("cuda", "sm_90a", 132, 128)
    assert (profile.smem_per_block, profile.l2_bytes) == (227 * 1024, 60 << 20)
    assert profile.memory_bytes == 143771 << 20
    assert profile.measured.read_bandwidth == 4.70e12
    assert profile.ceiling == 4.70e12


def test_a_profile_without_a_measurement_uses_the_data_sheet() -> None:
    profile = load_profile("h100-sxm")
    assert profile.measured.read_bandwidth is None
    assert profile.ceiling == profile.bandwidth_datasheet == 3.35e12


def test_cpu_profiles_ask_for_more_features_step_by_step() -> None:
    avx2, avx512, bf16 = (set(load_profile(f"cpu-{arch}").flags) for arch in ("avx2", "avx512", "avx512-bf16"))
    assert avx2 < avx512 < bf16
    assert bf16 - avx512 == {"avx512_bf16"}
    assert load_profile("cpu-avx2").sms == 0


@pytest.mark.parametrize("name", ["h300", "", "../gpu_profiles/h200-sxm", "/etc/passwd", "H200-SXM"])
def test_unknown_gpu_is_one_line_with_the_known_ones(name: str) -> None:
    with pytest.raises(KogcError, match=r"unknown GPU .*cpu-avx2, .*h200-sxm") as caught:
        load_profile(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("sms: 132", "sms: 0", "p.yaml:6: sms: 0 must be at least 1"),
        ("sms: 132", "sms: 132\nsms: 132", "p.yaml:7: duplicate key 'sms'"),
        ("sms: 132", "sms: 100", "p.yaml:15: blocks: 128 is more than sms (100)"),
        ("sms: 132", "cores: 132", "p.yaml:6: unknown key 'cores'"),
        ("arch: sm_90a", "arch: sm_75", "p.yaml:5: arch: unknown arch 'sm_75'"),
        ("target: cuda", "target: tpu", "p.yaml:3: target: unknown target 'tpu'"),
        ("target: cuda", "target: cpu", "p.yaml:5: arch: unknown arch 'sm_90a' of target cpu"),
        ("read_bandwidth: 4.70e12", "read_bandwidth: 0", "p.yaml:12: measured.read_bandwidth: 0.0 must be"),
        ("read_bandwidth: 4.70e12", "read_bandwidth: fast", "p.yaml:12: measured.read_bandwidth: expected a number"),
        ("flags: []", "flags: [[]]", "p.yaml:16: flags: expected a list of words"),
        ("flags: []\n", "", "p.yaml:2: missing key 'flags'"),
    ],
)
def test_wrong_facts_name_their_line(old: str, new: str, expected: str) -> None:
    assert old in H200
    with pytest.raises(KogcError) as caught:
        parse_profile(H200.replace(old, new, 1), "p.yaml")
    assert str(caught.value).startswith(expected)


def test_a_profile_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(H200.replace("name: h200-sxm", "name: mine"), encoding="utf-8")
    assert load_profile(str(path)).name == "mine"
    with pytest.raises(KogcError, match=r"gone\.yaml: "):
        load_profile(str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize("name", list_profiles())
def test_a_profile_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "same.yaml"
    result = kogc_cli("profile", "--gpu", name, "-o", path)
    assert result.exit_code == 0, result.output
    assert load_profile(str(path)) == load_profile(name)


def test_measuring_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(self: Driver) -> None:
        raise KogcError("no NVIDIA driver on this machine (libcuda.so.1 was not found)")

    monkeypatch.setattr(Driver, "__init__", no_driver)
    result = kogc_cli("profile", "--measure", "-o", tmp_path / "p.yaml")
    assert result.exit_code == 1
    assert "no NVIDIA driver" in one_line(result.stderr)
    assert not (tmp_path / "p.yaml").exists()


def test_a_measured_profile_holds_the_best_of_several_numbers_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {120: 4.5e12, 124: 4.69e12, 128: 4.70e12, 130: 4.6e12, 131: 4.6e12, 132: 4.71e12}
    monkeypatch.setattr(measure, "_profile", lambda gpu: load_profile("h100-sxm"))
    monkeypatch.setattr(measure, "read_ceiling", lambda gpu, blocks: rates[blocks])
    profile, found = measure.measure_profile("h100-sxm")
    assert found == rates
    assert (profile.blocks, profile.measured.blocks, profile.ceiling) == (128, 128, 4.70e12)  # 132 is within the noise
    rates[132] = 4.9e12
    assert measure.measure_profile("h100-sxm")[0].blocks == 132
    assert parse_profile(dump_profile(profile, "measured")) == profile


def test_unknown_kind_of_data() -> None:
    with pytest.raises(KogcError, match="unknown kind of data 'secrets'"):
        data_dir("secrets")
