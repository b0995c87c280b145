"""The kernel's own profile: events that a tracing build notes, as a table of phases and as a Chrome/Perfetto trace.

An event names what ends there; its slice begins at the block's event before. A table's rows therefore add up to the
time of a token. Clocks are cycles of each SM: the rate is that of the run itself, and blocks are aligned where they
begin the second token, for they all do within about a microsecond of each other, when the choice has been exchanged.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import KogcError
from .files import write_atomically
from .plan.plan import Plan
from .resources import data_dir
from .runtime import Request, Runtime

TOKENS = 8  # of a traced run; the first pays for cold caches and is left out
FILE_TOKENS = 2  # written to a trace file, from the second on: more makes files that viewers load slowly
CLOCK_BITS = 36
EVENT_ROOM = 24  # events of a layer, or of a token outside its layers: more than the kernel has marks

CLOCK_PAIRS = 3

I64 = NDArray[np.int64]
Run = tuple[NDArray[np.uint64], float]  # the event buffer, and milliseconds on the device


@dataclass(frozen=True)
class Events:
    """Slices, one an element of each array. start, cycles and waited are in cycles, start since the alignment.

    layer: -1 outside the layers. token: 0 for the first of the run. mark: index in marks().
    """

    block: I64
    token: I64
    layer: I64
    mark: I64
    start: I64
    cycles: I64
    waited: I64

    def where(self, chosen: NDArray[np.bool_]) -> Events:
        return Events(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: Iterable[Events]) -> Events:
        columns = zip(*([getattr(part, name) for name in Events.__dataclass_fields__] for part in parts), strict=True)
        return Events(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class Phase:
    """One mark over all blocks, layers and tokens; times in microseconds.

    median, worst_block (the largest of the blocks' medians) and waiting (median, for weights) are of one slice.
    per_layer and per_token: sums of the median token, averaged over the blocks; None for what no layer does.
    blocks: how many noted it at all.
    """

    mark: str
    blocks: int
    median: float
    worst_block: float
    waiting: float
    per_layer: float | None
    per_token: float


@dataclass(frozen=True)
class Trace:
    """A traced run: slices, cycles per second of the clock, tokens and layers, and what their events are called."""

    events: Events
    clock_hz: float
    tokens: int
    layers: int

    def phases(self) -> list[Phase]:
        """In the order of the kernel; the first token is left out."""
        events = self.events.where(self.events.token > 0)
        blocks = int(self.events.block.max()) + 1
        return [self._phase(events.where(events.mark == m), m, blocks) for m in np.unique(events.mark)]

    def _phase(self, events: Events, mark: int, blocks: int) -> Phase:
        cycles, micro = events.cycles, 1e6 / self.clock_hz
        own = [float(np.median(cycles[events.block == b])) for b in np.unique(events.block)]
        of_tokens = np.bincount(events.token, cycles, self.tokens)[1:]
        per_token = float(np.median(of_tokens)) / blocks * micro
        in_layers = bool((events.layer >= 0).any())
        return Phase(
            marks()[mark].lower(), len(own), float(np.median(cycles)) * micro, max(own) * micro,
            float(np.median(events.waited)) * micro, per_token / self.layers if in_layers else None, per_token,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        phases = self.phases()
        return {
            "clock_hz": self.clock_hz,
            "tokens": self.tokens - 1,
            "microseconds_per_token": sum(phase.per_token for phase in phases),
            "phases": [asdict(phase) for phase in phases],
        }


@functools.cache
def marks() -> tuple[str, ...]:
    """Names of the events, from the header that the kernel is compiled with."""
    text = (data_dir("templates") / "common/trace.h").read_text()
    found = re.search(r"enum Mark \{(.*?)\}", text, re.DOTALL)
    assert found, "trace.h defines no enum Mark"
    return tuple(re.findall(r"\b[A-Z_][A-Z0-9_]*\b", re.sub(r"//.*", "", found[1])))


def trace_plan(plan: Plan, tokens: int = TOKENS) -> Plan:
    """The same plan, built so that it notes the events of `tokens` tokens."""
    return replace(plan, trace_events=tokens * EVENT_ROOM * (plan.spec.layers + 1))


def record(runtime: Runtime, image: bytes, plan: Plan, depth: int, tokens: int = TOKENS) -> Trace:
    """Run the tracing build `image` of `plan` for `tokens` tokens from `depth`; the runtime's own kernel stays in use.

    The clock's rate is the difference of two runs in cycles over that in time: what a launch costs cancels. It is the
    median of a few such pairs.
    """
    own = runtime.kernel
    runtime.fill_kv(depth)
    runtime.use(runtime.load_kernel(plan, image))
    try:
        _run(runtime, depth, tokens)  # loads code, wakes clocks
        pairs = [(_run(runtime, depth, 2), _run(runtime, depth, tokens)) for _ in range(CLOCK_PAIRS)]
    finally:
        runtime.use(own)
    return Trace(decode(pairs[-1][1][0]), clock_rate(pairs), tokens, plan.spec.layers)


def clock_rate(pairs: Sequence[tuple[Run, Run]]) -> float:
    """Cycles a second, from pairs of a short and a long run. KogcError where the long ones took no longer."""
    rates = [
        (_length(long) - _length(short)) / (long_ms - short_ms) * 1e3
        for (short, short_ms), (long, long_ms) in pairs
        if long_ms > short_ms
    ]
    if not rates:
        raise KogcError("a traced run took no longer than one of two tokens: the machine is too busy to measure")
    return float(np.median(rates))


def _run(runtime: Runtime, depth: int, tokens: int) -> Run:
    prompt = (runtime.plan.spec.bos_token or 0,)
    result = runtime.run(Request(prompt, start=depth, max_new=tokens))
    raw = runtime.read_trace()
    if int(raw[:, 0].max()) >= runtime.plan.trace_events:
        raise KogcError(f"the kernel noted more events than a trace keeps ({runtime.plan.trace_events} a block)")
    return raw, result.milliseconds


def _length(raw: NDArray[np.uint64]) -> float:
    """Cycles from a block's first event to its last, median over the blocks."""
    clocks = [_clock(row[1 : 1 + int(row[0])]) for row in raw]
    return float(np.median([int(clock[-1] - clock[0]) for clock in clocks]))


def _clock(words: NDArray[np.uint64]) -> I64:
    """Clocks of a block's events in order; the counter keeps its low bits only, and starts again."""
    low: I64 = (words >> np.uint64(64 - CLOCK_BITS)).astype(np.int64)
    return low + np.cumsum(np.diff(low, prepend=low[:1]) < 0) * (1 << CLOCK_BITS)


def decode(raw: NDArray[np.uint64]) -> Events:
    """Slices from uint64[blocks][1 + trace_events]. KogcError where a block noted no second token."""
    return Events.join(_decode_block(block, row[1 : 1 + int(row[0])]) for block, row in enumerate(raw))


def _decode_block(block: int, words: NDArray[np.uint64]) -> Events:
    clock = _clock(words)
    mark = (words & np.uint64(0xFF)).astype(np.int64)
    waited = (words >> np.uint64(8) & np.uint64(0xFFFFF)).astype(np.int64)
    token = np.cumsum(mark == marks().index("BEGIN")) - 1
    if not (token == 1).any():
        raise KogcError(f"trace: block {block} noted {len(words)} events and no second token")
    clock = clock - clock[np.argmax(token == 1)]
    same = np.full(len(words) - 1, block)
    return Events(same, token[1:], _layers(mark)[1:], mark[1:], clock[:-1], np.diff(clock), waited[1:])


def _layers(mark: I64) -> I64:
    """The layer of each event: a new one begins where the mark that begins a token's first layer comes again."""
    names = marks()
    outside = np.isin(mark, [i for i, name in enumerate(names) if name.startswith(("BEGIN", "EMBED", "HEAD_"))])
    begin = np.cumsum(mark == names.index("BEGIN"))
    first = mark[np.argmax(~outside)]
    count = np.cumsum(mark == first)
    before = np.zeros(int(begin.max()) + 1, np.int64)  # layers that had begun when each token did
    starts = np.flatnonzero(mark == names.index("BEGIN"))
    before[1:] = count[starts]
    return np.where(outside, -1, count - before[begin] - 1)


def table(trace: Trace) -> str:
    """The phases for people."""
    from .commands.output import table as aligned

    headers = ("ends at", "blocks", "median us", "worst block", "for weights", "us/layer", "us/token", "share")
    phases = trace.phases()
    total = sum(phase.per_token for phase in phases)
    rows = [
        (
            p.mark, p.blocks, f"{p.median:.2f}", f"{p.worst_block:.2f}", f"{p.waiting:.2f}",
            "-" if p.per_layer is None else f"{p.per_layer:.2f}", f"{p.per_token:.1f}",
            f"{100 * p.per_token / total:.1f} %",
        )
        for p in phases
    ]  # fmt: skip
    rows.append(("token", max(p.blocks for p in phases), "", "", "", "", f"{total:.1f}", "100.0 %"))
    clock = f"{trace.tokens - 1} tokens, clock {trace.clock_hz / 1e6:.0f} MHz; us/layer and us/token are block averages"
    return f"{aligned(headers, rows)}\n{clock}"


def write_chrome(trace: Trace, path: Path, tokens: int = FILE_TOKENS) -> None:
    """Write tokens 1 to `tokens` for ui.perfetto.dev or chrome://tracing, a track a block; gzip for a name in .gz."""
    text = json.dumps(chrome(trace, tokens), separators=(",", ":")).encode()
    try:
        write_atomically(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None


def chrome(trace: Trace, tokens: int = FILE_TOKENS) -> dict[str, Any]:
    """The trace in the Trace Event Format; times in microseconds from the start of the second token."""
    chosen = trace.events.where((trace.events.token > 0) & (trace.events.token <= tokens))
    micro, names = 1e6 / trace.clock_hz, [name.lower() for name in marks()]
    columns = (chosen.block, chosen.token, chosen.layer, chosen.mark, chosen.start, chosen.cycles, chosen.waited)
    slices = [
        {
            "name": names[mark], "ph": "X", "pid": 0, "tid": block, "ts": round(start * micro, 3),
            "dur": round(cycles * micro, 3),
            "args": {"token": token, "layer": layer, "waited_us": round(waited * micro, 3)},
        }
        for block, token, layer, mark, start, cycles, waited in zip(*(c.tolist() for c in columns), strict=True)
    ]  # fmt: skip
    tracks = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": block, "args": {"name": f"block {block}"}}
        for block in np.unique(chosen.block).tolist()
    ]
    return {"displayTimeUnit": "ns", "traceEvents": [*tracks, *slices]}
