"""The fuzz program passes a sound kernel and notices a broken one."""

from __future__ import annotations

import functools

import fuzz
import pytest
from emulator import Emulated, planted
from fuzz_cases import CPUS, MACHINES, drawn

SEED = 8  # two layers, on a GPU that has passes and samples


def test_a_sound_kernel_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert drawn(SEED).machine in MACHINES
    assert drawn(SEED).machine not in CPUS
    with pytest.raises(SystemExit) as end:
        fuzz.main(SEED)
    out = capsys.readouterr().out
    assert out.startswith(f"{SEED}: Case(")
    assert out.endswith("1 cases, wrong: none\n")
    assert end.value.code == 0


def test_a_broken_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bug = planted("common/decoder.h", "silu(y[0]) * y[1]", "silu(y[1]) * y[0]")
    monkeypatch.setattr(fuzz, "Emulated", functools.partial(Emulated, patch=bug))
    with pytest.raises(SystemExit) as end:
        fuzz.main(SEED)
    assert capsys.readouterr().out.endswith(f"1 cases, wrong: [{SEED}]\n")
    assert end.value.code == 1
