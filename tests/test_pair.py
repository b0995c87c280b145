"""tests/pair.py, the comparison of kernels in turns, on this machine's CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import random_checkpoint
from click.testing import CliRunner, Result
from pair import main

from kogc.resources import data_dir
from kogc.targets.detect import detect_cpu_profile

TREE = data_dir("templates")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint.make(tmp_path_factory.mktemp("pair"), "llama")


def pair(checkpoint: Path, *variants: object) -> Result:
    gpu = detect_cpu_profile()
    return CliRunner().invoke(
        main, [str(checkpoint), *map(str, variants), "--gpu", gpu, "--depth", "5", "--repeat", "1"]
    )


def test_what_computes_something_else_gets_no_time(checkpoint: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(TREE, wrong)
    attention = wrong / "common" / "attention.h"
    text = attention.read_text()
    assert "LOG2E * P::INVERSE_SQRT_HEAD_DIM" in text
    attention.write_text(text.replace("LOG2E * P::INVERSE_SQRT_HEAD_DIM", "3 * LOG2E * P::INVERSE_SQRT_HEAD_DIM"))
    result = pair(checkpoint, TREE, f"{TREE},gather_splits=1", wrong)
    assert result.exit_code == 1, result.output
    same, other, refused = [line.split("|")[1:-1] for line in result.output.splitlines()[3:]]
    assert [same[0].strip(), other[0].strip(), refused[0].strip()] == [str(TREE), f"{TREE},gather_splits=1", str(wrong)]
    for name, time, gain, share, comparison in (same, other):
        assert float(time) > 0, name
        assert "%" in gain
        assert "% of" in share
        assert "error" in comparison
    assert same[2].strip() == "+0.00 %"
    assert "logits differ from the plain setting's" in refused[1]
    assert set(map(str.strip, refused[2:])) == {""}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere", "nowhere: no monokernel.jinja there"),
        (f"{TREE},speed=9", "speed=9: not NAME=N with a name of"),
        (f"{TREE},pace=fast", "pace=fast: not NAME=N"),
    ],
)
def test_variants_that_are_none(checkpoint: Path, text: str, words: str) -> None:
    result = pair(checkpoint, text)
    assert result.exit_code == 2
    assert words in result.output
