"""The HIP loader on a stand-in for hip-python whose launches run on the emulated machine. No AMD GPU has seen it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import random_checkpoint as rc
from builds import kogc_cli, one_line
from emulator import Emulated
from fake_hip import BAD_DEVICE, NO_DEVICE, FakeHip

import kogc
from kogc.artifact import read_manifest
from kogc.build import BuildOptions, build
from kogc.errors import KogcError
from kogc.plan.plan import Plan
from kogc.profile import load_profile
from kogc.sampling import Sampling
from kogc.targets import detect_profile
from kogc.targets.detect_hip import hip_devices, profile_of

PROMPT = [5, 17, 99, 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rc.make(tmp_path_factory.mktemp("checkpoint"), "qwen3", num_hidden_layers=2, tokenizer=True)


@pytest.fixture(scope="module", params=["mi300x", "rx-9070-xt"])
def artifact(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "artifact"
    build(str(checkpoint), request.param, out, BuildOptions(max_context=128))
    return out


def plan_of(artifact: Path) -> Plan:
    return read_manifest(artifact).plan()


def install(monkeypatch: pytest.MonkeyPatch, hip: FakeHip) -> FakeHip:
    monkeypatch.setitem(sys.modules, "hip", SimpleNamespace(hip=hip))
    return hip


def fitting(monkeypatch: pytest.MonkeyPatch, artifact: Path, kernel: Emulated | None = None) -> FakeHip:
    profile = plan_of(artifact).profile
    return install(monkeypatch, FakeHip(profile.arch, profile.sms, kernel))


def test_a_session_gives_what_the_kernel_gives(
    artifact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Emulated(plan_of(artifact), checkpoint)
    hip = fitting(monkeypatch, artifact, kernel)
    with kogc.load(artifact) as session:
        assert session.generate(PROMPT, max_new_tokens=6, stop=()).tokens == kernel.generate(PROMPT, 6)
        np.testing.assert_array_equal(session.logits(PROMPT), kernel.logits(PROMPT))
        sampling = Sampling(temperature=0.8, seed=3, logprobs=2, logit_bias=((9, 4.0),))
        drawn = session.generate(PROMPT, max_new_tokens=4, stop=(), sampling=sampling)
        assert drawn.tokens == kernel.generate(PROMPT, 4, sampling=sampling)
        assert [p.chosen for p in drawn.logprobs] == [p.chosen for p in kernel.logprobs]
        assert session.runtime.last_timing == 2.0
        assert session.runtime.read_bandwidth() > 0
    assert not hip.memory, "memory that was not freed"
    assert hip.log.count("hipStreamCreateWithFlags") == hip.log.count("hipStreamDestroy") == 1


def test_dummy_weights_are_made_on_the_device(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build(str(checkpoint), "mi300x", tmp_path / "out", BuildOptions(max_context=128, dummy_weights=True))
    kernel = Emulated(plan_of(tmp_path / "out"), checkpoint)
    hip = fitting(monkeypatch, tmp_path / "out", kernel)
    with kogc.load(tmp_path / "out") as session:
        runtime = session.runtime
        assert hip.log.count("kogc_fill") >= 2
        slabs = runtime.download("slabs", 0, 4096).view(np.uint16)
        assert len(np.unique(slabs)) > 500
        assert (runtime.download("norms", 0, 64).view(np.uint16) == 0x3F80).all()


def test_an_artifact_of_another_architecture_is_refused_by_both_names(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeHip("gfx950", 256))
    profile = plan_of(artifact).profile
    with pytest.raises(KogcError, match=rf"built for {profile.name} \({profile.arch}.*AMD Toy \(gfx950") as caught:
        kogc.load(artifact)
    assert "\n" not in str(caught.value)
    line = one_line(kogc_cli("run", artifact, "-p", "x", "-n", 1).stderr)
    assert profile.arch in line
    assert "gfx950" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks_a_unit": 0}, "0 blocks of this kernel fit AMD Toy"),
        ({"free": 1 << 20}, "needs .* GB of GPU memory; 0.0 of 206.2 GB are free"),
        ({"devices": 0}, "device 0: this machine has 0 GPUs"),
    ],
)
def test_what_does_not_fit_is_said_and_leaves_nothing(
    change: dict[str, int], message: str, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hip = fitting(monkeypatch, artifact)
    vars(hip).update(change)
    with pytest.raises(KogcError, match=message):
        kogc.load(artifact)
    assert not hip.memory


def test_too_little_lds_is_said(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting(monkeypatch, artifact).facts.sharedMemPerBlock = 16384
    with pytest.raises(KogcError, match="needs [0-9]+.*16384 bytes of LDS"):
        kogc.load(artifact)


def test_a_stalled_kernel_is_reported(artifact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(headers: dict[str, str]) -> dict[str, str]:
        name, row = "common/decoder.h", "if (phase_ == GATE_UP) {  // rows alternate"
        return {**headers, name: headers[name].replace(row, "if (phase_ == GATE_UP) return;\n" + row)}

    fitting(monkeypatch, artifact, Emulated(plan_of(artifact), checkpoint, patch))
    with kogc.load(artifact) as session, pytest.raises(KogcError, match="stalled.*'ffn hidden' in layer 0, step 0"):
        session.generate(PROMPT, max_new_tokens=2)


def test_a_machine_without_the_binding_or_the_library_says_so(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hip = fitting(monkeypatch, artifact)

    def missing(flags: int) -> None:
        raise RuntimeError("failed to dlopen 'libamdhip64.so'")

    for status in (NO_DEVICE, BAD_DEVICE):
        hip.hipInit = lambda flags, status=status: (status,)
        with pytest.raises(KogcError, match="no AMD GPU on this machine"):
            kogc.load(artifact)
    hip.hipInit = missing
    with pytest.raises(KogcError, match="no ROCm on this machine"):
        kogc.load(artifact)
    assert hip_devices() == []
    monkeypatch.setitem(sys.modules, "hip", None)
    with pytest.raises(KogcError, match="needs hip-python: pip install"):
        kogc.load(artifact)


@pytest.mark.parametrize("name", ["mi300x", "mi325x", "mi355x", "rx-9070-xt"])
def test_auto_finds_the_profile_of_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile(name)
    for units in {profile.sms, profile.sms // 2} if profile.lanes == 32 else {profile.sms}:
        hip = install(monkeypatch, FakeHip(profile.arch, units))
        hip.facts.totalGlobalMem = int(profile.memory_bytes * 0.98)
        assert [profile_of(gpu) for gpu in hip_devices()] == [name]
        assert detect_profile() == (profile, None)


def test_a_gpu_without_a_profile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeHip("gfx1100", 48))
    profile, note = detect_profile()
    assert profile.target == "cpu"
    assert note == "AMD Toy (gfx1100) matches no GPU profile; building for the CPU"
