"""GPU profiles: the facts that are shipped, and what a profile file is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kogc.errors import KogcError
from kogc.profile import list_profiles, load_profile, parse_profile
from kogc.resources import data_dir

H200 = (data_dir("gpu_profiles") / "h200-sxm.yaml").read_text(encoding="utf-8")


def test_the_shipped_profiles() -> None:
    assert list_profiles() == ["cpu-avx2", "cpu-avx512", "cpu-avx512-bf16", "h100-sxm", "h200-sxm"]
    for name in list_profiles():
        assert load_profile(name).name == name


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
        ("target: cuda", "target: hip", "p.yaml:3: target: unknown target 'hip'"),
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


def test_unknown_kind_of_data() -> None:
    with pytest.raises(KogcError, match="unknown kind of data 'secrets'"):
        data_dir("secrets")
