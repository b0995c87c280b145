"""Traces: events become slices, slices a table and a Chrome file; and a real trace of a model on this machine's CPU."""

from __future__ import annotations

import ctypes
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import random_checkpoint
from builds import kogc_cli
from numpy.typing import NDArray
from toy_kernel import ToyKernel, ToyLibrary, view
from toy_session import install, make_program

import kogc
from kogc import steady, trace
from kogc.bench import run_bench
from kogc.build import BuildOptions, build
from kogc.errors import KogcError
from kogc.runtime import Request, open_runtime
from kogc.runtime.args import KernelArgs
from kogc.session import Session
from kogc.targets.detect import detect_cpu_profile

DOCS = Path(__file__).resolve().parent.parent / "docs"
SVG = "{http://www.w3.org/2000/svg}"
WRAP = 1 << trace.CLOCK_BITS
LAYER = ("QKV_PRODUCTS", "QKV_PUT", "DOWN_GATHER")
TOKEN = ("BEGIN", "EMBED", *LAYER, *LAYER, "HEAD_PRODUCTS", "HEAD_CHOICE")  # a model of two layers
HZ = 1e9  # a cycle is a nanosecond


def buffer(blocks: Sequence[Sequence[tuple[int, int, str]]], room: int = 100) -> NDArray[np.uint64]:
    """What a kernel would leave for events (clock, waited, mark) of each block."""
    raw = np.zeros((len(blocks), 1 + room), np.uint64)
    for row, events in zip(raw, blocks, strict=True):
        row[0] = len(events)
        row[1 : 1 + len(events)] = [(c % WRAP) << 28 | w << 8 | trace.marks().index(m) for c, w, m in events]
    return raw


def steps(start: int, tokens: int = 3, slow: int = 0) -> list[tuple[int, int, str]]:
    """Events 100 cycles apart, with 30 waited at QKV_PUT, which takes `slow` longer."""
    events, clock = [], start
    for _ in range(tokens):
        for mark in TOKEN:
            clock += 100 + (slow if mark == "QKV_PUT" else 0)
            events.append((clock, 30 if mark == "QKV_PUT" else 0, mark))
    return events


def made(blocks: Sequence[Sequence[tuple[int, int, str]]], tokens: int = 3) -> trace.Trace:
    return trace.Trace(trace.decode(buffer(blocks)), HZ, tokens, 2)


def test_marks_are_those_of_the_header() -> None:
    assert trace.marks()[:4] == ("BEGIN", "EMBED", "QKV_PRODUCTS", "QKV_PUT")
    assert trace.marks()[-1] == "HEAD_CHOICE"
    assert len(set(trace.marks())) == len(trace.marks()) < trace.EVENT_ROOM


@pytest.mark.parametrize("start", [5, WRAP - 450, WRAP - 1150])
def test_slices_have_their_place_and_time(start: int) -> None:
    """Also where the clock's kept bits run over, before, in or after the token that blocks are aligned by."""
    events = trace.decode(buffer([steps(start), steps(7 * start + 3)]))
    per_block = 3 * len(TOKEN) - 1
    assert events.block.tolist() == [0] * per_block + [1] * per_block
    assert set(events.cycles.tolist()) == {100}
    names = [trace.marks()[m] for m in events.mark[:per_block]]
    assert names == [*TOKEN[1:], *TOKEN, *TOKEN]
    one = [-1, -1, 0, 0, 0, 1, 1, 1, -1, -1]
    assert events.layer[:per_block].tolist() == [*one[1:], *one, *one]
    assert events.token[:per_block].tolist() == [0] * 9 + [1] * 10 + [2] * 10
    # the BEGIN of the second token ends at 0 in every block
    begins = (events.token == 1) & (events.mark == 0)
    assert events.start[begins].tolist() == [-100, -100]


def test_table_adds_up() -> None:
    found = made([steps(0), steps(50, slow=40), steps(9, slow=40)])
    phases = {p.mark: p for p in found.phases()}
    assert list(phases) == [m.lower() for m in dict.fromkeys(TOKEN)]
    put = phases["qkv_put"]
    assert (put.blocks, put.median, put.worst_block, put.waiting) == (3, 0.14, 0.14, 0.03)
    assert put.per_token == pytest.approx((0.2 + 0.28 + 0.28) / 3)
    assert put.per_layer == pytest.approx(put.per_token / 2)
    assert phases["embed"].per_layer is None
    assert phases["embed"].per_token == pytest.approx(0.1)
    total = sum(p.per_token for p in phases.values())
    assert total == pytest.approx((1.0 + 1.08 + 1.08) / 3)
    assert found.to_json()["microseconds_per_token"] == total
    assert "qkv_put" in trace.table(found)


def test_a_phase_that_some_blocks_skip_is_averaged_over_all() -> None:
    without = [event for event in steps(0) if event[2] != "QKV_PUT"]
    put = next(p for p in made([steps(0), without]).phases() if p.mark == "qkv_put")
    assert (put.blocks, put.median) == (1, 0.1)
    assert put.per_token == pytest.approx(0.1)  # 2 layers of 0.1 in one of two blocks


def test_the_first_token_does_not_count() -> None:
    events = steps(0)
    late = [(clock + 10_000, waited, mark) for clock, waited, mark in events[4:]]
    phases = made([events[:4] + late]).phases()
    assert max(p.median for p in phases) == pytest.approx(0.1)


def test_clock_is_the_difference_of_a_short_and_a_long_run() -> None:
    """A launch that costs 5 us whatever its length does not slow the clock down."""
    short, long = buffer([steps(3, 2)]), buffer([steps(WRAP - 50, 3)])
    pair = ((short, 0.005 + 19e-4), (long, 0.005 + 29e-4))
    assert trace.clock_rate([pair]) == pytest.approx(HZ)
    with pytest.raises(KogcError, match="too busy"):
        trace.clock_rate([(pair[1], pair[0])])


def test_a_block_without_events_is_an_error() -> None:
    with pytest.raises(KogcError, match="block 1 noted 10 events and no second token"):
        trace.decode(buffer([steps(0), steps(0, 1)]))


def test_chrome_file_is_valid(tmp_path: Path) -> None:
    found = made([steps(0), steps(77)])
    trace.write_chrome(found, tmp_path / "t.json", 1)
    trace.write_chrome(found, tmp_path / "t.json.gz", 1)
    text = (tmp_path / "t.json").read_bytes()
    assert gzip.decompress((tmp_path / "t.json.gz").read_bytes()) == text
    events = json.loads(text)["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["block 0", "block 1"]
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == 2 * len(TOKEN)
    assert {e["args"]["token"] for e in slices} == {1}
    second_put = [e for e in slices if e["name"] == "qkv_put" and e["tid"] == 1][1]
    assert second_put["args"] == {"token": 1, "layer": 1, "waited_us": 0.03}
    assert (second_put["ts"], second_put["dur"]) == (0.5, 0.1)
    with pytest.raises(KogcError, match="No such file"):
        trace.write_chrome(found, tmp_path / "missing" / "t.json")


def test_steadiness_is_judged_against_the_growth_with_depth() -> None:
    times = np.linspace(100.0, 120.0, 1999)
    even = steady.judge(times, 128)
    assert even.tokens == 2000
    assert even.over_trend == pytest.approx(1.0)
    assert even.p99 / even.median == pytest.approx(1.09, abs=1e-3)
    times[::50] *= 1.5  # one token in fifty
    uneven = steady.judge(times, 128)
    assert uneven.over_trend == pytest.approx(1.5, abs=0.02)
    assert uneven.largest == pytest.approx(times.max())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    checkpoint = random_checkpoint.make(directory, "llama")
    build(str(checkpoint), detect_cpu_profile(), directory / "artifact", BuildOptions(max_context=400))
    return directory / "artifact"


@pytest.fixture
def small(artifact: Path) -> Iterator[Session]:
    with kogc.load(artifact) as session:
        yield session


def traced(session: Session) -> trace.Trace:
    from kogc.render import render
    from kogc.targets import compile_binary

    plan = trace.trace_plan(session.runtime.plan)
    return trace.record(session.runtime, compile_binary(render(plan), plan), plan, 5)


def test_real_trace(small: Session) -> None:
    before = small.runtime.kernel
    found = traced(small)
    assert small.runtime.kernel is before
    layers, events = small.spec.layers, found.events
    assert found.tokens == trace.TOKENS
    assert (events.cycles >= 0).all()
    assert set(events.token.tolist()) == set(range(trace.TOKENS))
    for block in range(small.runtime.plan.blocks):
        puts = events.where((events.block == block) & (events.mark == trace.marks().index("DOWN_PUT")))
        assert puts.layer.tolist() == list(range(layers)) * trace.TOKENS
    assert 1e8 < found.clock_hz < 1e10
    assert [p.mark for p in found.phases()] == [m.lower() for m in trace.marks()]


def test_a_trace_is_drawn(small: Session, tmp_path: Path) -> None:
    found = traced(small)
    trace.write_chrome(found, tmp_path / "trace.json.gz")
    script, out = DOCS / "draw_trace.py", tmp_path / "trace.svg"
    command = [sys.executable, str(script), str(tmp_path / "trace.json.gz"), str(out), "--layers", "0-1"]
    subprocess.run(command, check=True)
    picture = ElementTree.parse(out).getroot()
    events = found.events.where((found.events.token == 1) & (found.events.layer >= 0) & (found.events.layer <= 1))
    bars = [bar for bar in picture.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    assert len(bars) == len(events.start)
    width = sum(float(bar.get("width", 0)) for bar in bars)
    ends = events.start + events.cycles
    assert width == pytest.approx(960 * events.cycles.sum() / (ends.max() - events.start.min()), rel=0.01)
    words = {label.text for label in picture.iter(f"{SVG}text")}
    names = {trace.marks()[mark].lower().replace("_", " ") for mark in events.mark.tolist()}
    assert words >= names | {"layer 0", "layer 1", "us"} | {f"block {b}" for b in range(small.plan.blocks)}
    assert {bar.get("fill") for bar in bars}.isdisjoint({"#000000"}), "a mark has no colour"
    wrong = subprocess.run([*command[:-1], "7-9"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "holds nothing of token 1, layers 7 to 9" in wrong.stderr


def test_other_kernels_compute_the_same(small: Session) -> None:
    """The tracing kernel over the same weights gives the same logits; the plain one is in use again afterwards."""
    prompt = tuple(range(8))
    plain = np.array(small.runtime.run(Request(prompt, logits=True)).logits)
    traced(small)
    assert np.array_equal(small.runtime.run(Request(prompt, logits=True)).logits, plain)


def test_a_kernel_of_another_layout_is_refused(small: Session) -> None:
    import dataclasses

    runtime = small.runtime
    other = dataclasses.replace(runtime.kernel, plan=dataclasses.replace(runtime.plan, max_context=100))
    with pytest.raises(ValueError, match="another way"):
        runtime.use(other)


def test_arrivals(small: Session) -> None:
    request = Request((1,), max_new=50)
    tokens = small.runtime.run(request).tokens
    times = small.runtime.arrivals(request)
    assert len(times) == 50
    assert (np.diff(times) >= 0).all()
    assert len(small.runtime.arrivals(Request((1,), max_new=50, stop=(tokens[0],)))) == 1
    assert small.runtime.run(request).tokens == tokens
    with pytest.raises(KogcError, match="from depth 9: 2010 positions, the artifact has 400"):
        steady.watch(small.runtime, 9)


def test_bench_with_phases_trace_and_steady(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady, "TOKENS", 60)
    result: dict[str, Any] = run_bench(artifact, 8, (3,), repeat=1, phases=True, trace=tmp_path / "t.json", steady=True)
    assert result["steady"]["tokens"] == 60
    assert result["profile"]["depth"] == 3
    assert len(result["profile"]["phases"]) == len(trace.marks())
    assert json.loads((tmp_path / "t.json").read_bytes())["traceEvents"]
    out = capsys.readouterr().out
    assert "phases at depth 3" in out
    assert "steady: 60 tokens from depth 3" in out


def test_command_refuses_unknown_knobs() -> None:
    result = kogc_cli("bench", "qwen3-0.6b", "--dummy-weights", "--knob", "depth=3")
    assert result.exit_code == 2
    assert "depth=3" in result.output


class TracingKernel(ToyKernel):
    """A toy that leaves the events of `steps` in each block's part of the buffer, which it must find zeroed."""

    def run(self, args: KernelArgs) -> int:
        if args.trace:
            room = 1 + trace.TOKENS * trace.EVENT_ROOM * 3
            raw = view(ctypes.c_uint64, 2 * room, args.trace).reshape(2, room)
            assert not raw.any()
            raw[:] = buffer([steps(0, args.max_new), steps(99, args.max_new)], room - 1)
        return super().run(args)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_a_kernel_is_exchanged_and_its_trace_read(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a toy machine: buffers, arguments and the way back."""
    machine = install(target, monkeypatch)
    kernel = TracingKernel(machine.kernel.vocab)
    machine.driver.kernel = kernel
    monkeypatch.setattr("kogc.runtime.cpu._open_library", lambda path: ToyLibrary(kernel))
    monkeypatch.setattr(machine.driver, "cuEventElapsedTime", lambda *_: (0, float(len(kernel.launches))))
    with open_runtime(make_program(target, tmp_path)) as runtime:
        plain = runtime.kernel
        found = trace.record(runtime, b"binary", trace.trace_plan(runtime.plan), 3)
        assert runtime.kernel is plain
        assert len(runtime.run(Request((1,), max_new=4)).tokens) == 4
        assert len(runtime.arrivals(Request((1,), max_new=4))) == 4
    assert [launch.start for launch in kernel.launches[:7]] == [3] * 7
    assert found.events.where(found.events.token > 0).cycles.tolist() == [100] * (2 * 7 * len(TOKEN))
    assert not machine.driver.live
