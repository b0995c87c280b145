"""The tuner: its search over made-up timings, its bench on this machine's CPU, and the files that builds take up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint
from builds import kogc_cli, one_line

from kogc import tune, tuned
from kogc.build import prepare
from kogc.errors import KogcError
from kogc.plan.plan import Knobs, default_knobs
from kogc.profile import load_profile
from kogc.spec import load_spec
from kogc.targets.detect import detect_cpu_profile
from kogc.tuned import Measurement, Setting, Tuned

START = Setting(128, Knobs())
SPEC = load_spec("qwen3-0.6b")
H200 = load_profile("h200-sxm")
MEASURED = Measurement("it's small", 128, 2134.5, 2345.25, 0.8125, "by hand: 3 runs")


class Timings:
    """Rates by a formula; `refuse` names those that fail."""

    def __init__(self, rate: Callable[[Setting], float], refuse: Callable[[Setting], bool] = lambda s: False) -> None:
        self.rate, self.refuse = rate, refuse
        self.asked: list[Setting] = []

    def __call__(self, settings: Sequence[Setting]) -> list[float | None]:
        self.asked += settings
        return [None if self.refuse(s) else self.rate(s) for s in settings]


def optimum(s: Setting) -> float:
    """Best at in_flight 5, prefetch 0, 132 blocks; the best pace depends on prefetch."""
    k = s.knobs
    pace = 700 if k.prefetch else 1200
    return 1000 - 9 * abs(k.in_flight - 5) - 4 * k.prefetch - abs(k.pace - pace) / 50 - 10 * abs(s.blocks - 132)


def test_the_search_finds_the_best() -> None:
    timings = Timings(optimum)
    search = tune.Search(tune.candidates_for(H200, START), timings)
    best = search.run(START)
    assert (best.blocks, best.knobs.in_flight, best.knobs.prefetch, best.knobs.pace) == (132, 5, 0, 1200)
    assert set(best.changes(START).split()) == {"blocks=132", "in_flight=5", "pace=1200", "prefetch=0"}
    assert [step.name for step in search.steps[: len(search.candidates)]] == list(search.candidates)
    assert all(step.kept in step.rates for step in search.steps)


def test_the_fastest_of_those_that_pass_is_kept() -> None:
    """A variant that is fast because it is wrong is never chosen."""
    timings = Timings(optimum, refuse=lambda s: s.knobs.in_flight == 5 or s.blocks == 132)
    best = tune.Search(tune.candidates_for(H200, START), timings).run(START)
    assert best.knobs.in_flight in (4, 6)
    assert best.blocks == 130


def test_noise_changes_nothing() -> None:
    timings = Timings(lambda s: 1000.0 + s.knobs.prefetch / 10)
    assert tune.Search({"prefetch": (0, 8, 16)}, timings).run(START) == START
    assert len(timings.asked) == 3  # one round


def test_a_start_that_fails_is_an_error() -> None:
    with pytest.raises(KogcError, match="does not run here"):
        tune.Search({"prefetch": (0, 8)}, Timings(optimum, refuse=lambda s: True)).run(START)


def test_nothing_begins_after_the_deadline() -> None:
    timings = Timings(optimum)
    assert tune.Search(tune.CANDIDATES, timings, deadline=0.0).run(START) == START
    assert timings.asked == []


def test_what_may_be_asked_next_is_told_ahead() -> None:
    told: set[Setting] = set()
    timings = Timings(optimum)

    def measure(settings: Sequence[Setting]) -> list[float | None]:
        assert set(settings) <= told
        return timings(settings)

    tune.Search(tune.candidates_for(H200, START), measure, told.update).run(START)


def test_every_knob_has_candidates() -> None:
    """A new knob must be given values to try, or be left out on purpose here."""
    assert set(tune.CANDIDATES) == set(tuned.KNOBS)
    for name, values in tune.CANDIDATES.items():
        assert START.value(name) in values
        assert len(set(values)) == len(values) > 1
    assert tune.candidates_for(load_profile("cpu-avx2"), START).keys() == {"gather_splits"}


def test_files_come_back_as_written(tmp_path: Path) -> None:
    found = Tuned(Setting(132, Knobs(prefetch=0)), MEASURED)
    path = tmp_path / "tuned" / "a.yaml"
    tuned.write_tuned(path, found, SPEC)
    assert tuned.read_tuned(path, SPEC) == found
    with pytest.raises(KogcError, match="File exists"):
        tuned.write_tuned(path / "b.yaml", found, SPEC)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  hidden: 1024", "  hidden: 1025", ":4: shape.hidden: 1025, but qwen3-0.6b has 1024"),
        ("  dtype: bf16", "  dtype: fp16", ": shape.dtype: fp16, but qwen3-0.6b has bf16"),
        (
            "  pace: 900\n",
            "",
            ": missing key 'knobs.pace': written for the knobs of another kogc; run `kogc tune` again",
        ),
        ("  pace: 900", "  haste: 900", ": unknown key 'knobs.haste'"),
        ("  pace: 900", "  pace: -1", ": knobs.pace: -1 must be at least 0"),
        ("  pace: 900", "  pace: fast", ": knobs.pace: expected an integer, found 'fast'"),
        ("blocks: 128", "blocks: 0", ": blocks: 0 must be at least 1"),
        ("  depth: 128\n", "", ": missing key 'measured.depth'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = tuned.dump_tuned(Tuned(START, MEASURED), SPEC)
    assert text.count(old) == 1
    path = tmp_path / "a.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(KogcError) as error:
        tuned.read_tuned(path, SPEC)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}:")


def test_shipped_files_are_read() -> None:
    """Each lies where its shape and profile are looked up."""
    from kogc.resources import data_dir
    from kogc.spec import list_specs

    known = {tuned.tuned_file(load_spec(name), H200): load_spec(name) for name in list_specs()}
    for path in (data_dir("gpu_profiles") / "tuned" / H200.name).glob("*.yaml"):
        assert tuned.read_tuned(path, known[path]).setting.blocks <= H200.sms


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for tuned files of its own, with one for qwen3-0.6b on the H200."""
    monkeypatch.setattr(tuned, "data_dir", lambda kind: tmp_path)
    tuned.write_tuned(tuned.tuned_file(SPEC, H200), Tuned(Setting(132, Knobs(prefetch=0)), MEASURED), SPEC)
    return tuned.tuned_file(SPEC, H200)


def test_builds_take_the_file_up(shipped: Path) -> None:
    plan = prepare("qwen3-0.6b", "h200-sxm", 512).plan
    assert (plan.blocks, plan.knobs) == (132, Knobs(prefetch=0))
    assert tuned.knobs_for(SPEC, H200) == plan.knobs
    assert prepare("qwen3-0.6b", "h200-sxm", 512, blocks=132).plan.knobs == plan.knobs
    # but not for other blocks, another shape, or when knobs are given
    for name, blocks in (("qwen3-0.6b", 128), ("llama-3.2-1b", None)):
        plan = prepare(name, "h200-sxm", 512, blocks=blocks).plan
        assert plan.knobs == default_knobs(plan)
    given = prepare("qwen3-0.6b", "h200-sxm", 512, knobs=Knobs(pace=1)).plan
    assert (given.blocks, given.knobs) == (128, Knobs(pace=1))


def test_a_stale_file_is_one_line(shipped: Path) -> None:
    shipped.write_text(shipped.read_text().replace("  pace:", "  haste:"))
    result = kogc_cli("plan", "qwen3-0.6b", "--gpu", "h200-sxm")
    assert result.exit_code == 1
    assert f"{shipped}:" in one_line(result.stderr)


def test_models_that_differ_in_name_alone_share_a_file() -> None:
    assert tuned.shape_key(dataclasses.replace(SPEC, name="x", norm_eps=1e-3)) == tuned.shape_key(SPEC)
    assert tuned.shape_key(dataclasses.replace(SPEC, dtype="fp16")) != tuned.shape_key(SPEC)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint.make(tmp_path_factory.mktemp("small"), "llama")


def make_bench(checkpoint: Path, scratch: Path) -> tune.Bench:
    return tune.Bench(str(checkpoint), detect_cpu_profile(), 5, 100, scratch, Knobs())


def test_variants_run_over_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    with make_bench(checkpoint, tmp_path) as bench:
        start = Setting(prepare(str(checkpoint), bench.gpu).plan.blocks, Knobs())
        settings = [start, start.with_value("gather_splits", 1), start.with_value("in_flight", 2), start]
        rates = bench.measure(settings, repeats=1)
        assert all(rate is not None and rate > 0 for rate in rates)
        assert rates[0] == rates[3]
        assert len(list(tmp_path.iterdir())) == 1  # one artifact for this number of blocks
        comparison, ceiling = bench.verify(start)
        assert comparison.problems == []
        assert ceiling > 0


def test_variants_that_fail_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not compile, and one that computes something else."""

    class Done:
        def __init__(self, value: Any) -> None:
            self.value = value

        def result(self) -> Any:
            return self.value

    with make_bench(checkpoint, tmp_path) as bench:
        start = Setting(prepare(str(checkpoint), bench.gpu).plan.blocks, Knobs())
        broken, wrong = start.with_value("pace", 1), start.with_value("pace", 2)
        bench.measure([start], repeats=1)
        bench._builds[broken] = Done("it spills")  # type: ignore[assignment]
        plain = bench._logits
        monkeypatch.setattr(bench, "_logits", lambda r: plain(r) * (1 + 0.02 * (r.plan.knobs.pace == 2)))
        rates = bench.measure([start, broken, wrong], repeats=1)
        assert rates[0] is not None
        assert rates[1:] == [None, None]
        assert bench.refused[broken] == "it spills"
        assert "logits differ from the plain setting's by 2.0e-02" in bench.refused[wrong]
        monkeypatch.setattr(bench, "_logits", lambda r: plain(r) * np.nan)
        assert bench.measure([start.with_value("pace", 3)], repeats=1) == [None]


def test_command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "FINAL_REPEATS", 2)
    monkeypatch.setattr(tune, "REPEATS", 1)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    out = tmp_path / "found.yaml"
    result = kogc_cli("tune", checkpoint, "--gpu", detect_cpu_profile(), "--depth", 5, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["comparison"]["passed"]
    assert [step["name"] for step in report["steps"]] == ["gather_splits"]
    found = tuned.read_tuned(out, prepare(str(checkpoint), detect_cpu_profile()).plan.spec)
    assert dataclasses.asdict(found.setting.knobs) == report["knobs"]
    assert found.measured.tokens_per_second >= found.measured.tokens_per_second_before
