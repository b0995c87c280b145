"""Search a plan's knobs on the machine itself.

Coordinate descent from the setting at hand: for one knob after the other every candidate is timed beside the setting
held so far, in turns, and the fastest is kept; until a round changes nothing. A variant counts only if its logits are
those of the plain setting, and the winner is compared with the reference. Compiles run ahead in processes of their own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .build import BuildOptions, build, prepare
from .compare import LIMITS, Comparison, compare, require
from .errors import KogcError, UsageError
from .files import check_writable
from .model_source import find_model
from .plan.plan import Knobs, Plan
from .profile import GpuProfile, list_profiles
from .runtime import Kernel, Request, Result, Runtime
from .sampling import GREEDY
from .session import load
from .tuned import Measurement, Setting, Tuned, tuned_file, write_tuned

# What each knob may be; a knob without candidates is not searched. Those with most effect come first.
CANDIDATES: dict[str, tuple[int, ...]] = {
    "in_flight": (1, 2, 3, 4, 5, 6, 8),
    "prefetch": (0, 4, 8, 16, 32),
    "pace": (300, 500, 700, 900, 1200, 1800),
    "stage_bytes": (8192, 16384, 32768),
    "in_flight_head": (3, 4, 5, 6, 8, 10),
    "in_flight_exchange": (1, 2, 3, 4),
    "gather_splits": (1, 2, 4, 8),
    "turn": (1, 2, 4),
}
CPU_KNOBS = ("gather_splits",)  # the others mean nothing there
HIP_KNOBS = {"in_flight": (4, 6, 8, 12, 16), "gather_splits": (1, 2, 4, 8), "turn": (1, 2, 4)}
MARGIN = 1.002  # a candidate must be this much faster: less is noise
REPEATS, FINAL_REPEATS = 5, 15  # timed runs of each variant, in turns
TOKENS = 64  # of a timed run
CHECK_TOKENS = 8  # teacher-forced, of the comparison with the plain setting
CHECK_SHARE = 0.5  # of the reference's limit: where sums are taken in another order, other activations round up
ROUNDS = 3

Variant = tuple[Plan, bytes]
Rate = float | None  # tokens per second; None: refused
Measure = Callable[[Sequence[Setting]], list[Rate]]


@dataclass(frozen=True)
class Step:
    """One knob's turn: candidates with their rates, and the value that was kept."""

    name: str
    rates: dict[int, Rate]
    kept: int


@dataclass
class Search:
    """Coordinate descent. `measure` times settings in turns; `ahead` is told what may be asked for next."""

    candidates: dict[str, tuple[int, ...]]
    measure: Measure
    ahead: Callable[[Sequence[Setting]], None] = lambda settings: None
    deadline: float = float("inf")  # of time.monotonic: no step begins after it
    report: Callable[[Step], None] = lambda step: None
    steps: list[Step] = field(default_factory=list)

    def run(self, start: Setting) -> Setting:
        """The fastest setting found. KogcError if the start itself is refused."""
        best = start
        for _ in range(ROUNDS):
            before = best
            for name in self.candidates:
                if time.monotonic() >= self.deadline:
                    return best
                best = self._step(name, best)
            if best == before:
                break
        return best

    def _step(self, name: str, at: Setting) -> Setting:
        self.ahead([s for other in self.candidates for s in self._settings(other, at)])
        settings = self._settings(name, at)
        rates = self.measure(settings)
        if rates[0] is None:
            raise KogcError("tune: the setting to start from does not run here")
        rated = [(rate, setting) for rate, setting in zip(rates, settings, strict=True) if rate is not None]
        rate, fastest = max(rated, key=lambda pair: pair[0])
        kept = fastest if rate > rates[0] * MARGIN else at
        values = [setting.value(name) for setting in settings]
        self.steps.append(Step(name, dict(zip(values, rates, strict=True)), kept.value(name)))
        self.report(self.steps[-1])
        return kept

    def _settings(self, name: str, at: Setting) -> list[Setting]:
        """The setting at hand, then those with another value of one knob."""
        return [at, *(at.with_value(name, v) for v in self.candidates[name] if v != at.value(name))]


def candidates_for(profile: GpuProfile, start: Setting) -> dict[str, tuple[int, ...]]:
    """What is searched on a GPU: the knobs, and numbers of blocks near the number of its SMs."""
    if profile.target == "cpu":
        return {name: CANDIDATES[name] for name in CPU_KNOBS}
    near = {start.blocks, profile.blocks, *(profile.sms - fewer for fewer in (0, 2, 4, 8, 12))}
    if start.blocks < profile.blocks:  # a model too small for all SMs
        near = {start.blocks, start.blocks // 2}
    knobs = HIP_KNOBS if profile.target == "hip" else CANDIDATES
    return {**knobs, "blocks": tuple(sorted(b for b in near if b > 0))}


def compile_variant(model: str, gpu: str, max_context: int, setting: Setting, kv_dtype: str = "bf16") -> Variant | str:
    """Plan and binary of a setting, or why there is none: text passes between processes unchanged."""
    from .render import render
    from .targets import compile_binary

    try:
        plan = prepare(model, gpu, max_context, setting.blocks, setting.knobs, kv_dtype=kv_dtype).plan
        return plan, compile_binary(render(plan), plan)
    except KogcError as error:
        return str(error)


class Died(KogcError):
    """A variant ended its launch. A GPU runs nothing more in this process then, so the search ends as well."""


@dataclass
class Bench:
    """Times variants of one model's kernel on a device. Weights are kept for each number of blocks; kernels change."""

    model: str
    gpu: str
    depth: int
    max_context: int
    scratch: Path
    start: Knobs  # whose logits every variant's are compared with
    device: int = 0
    kv_dtype: str = "bf16"
    compile: Callable[[str, str, int, Any, str], Variant | str] = compile_variant  # in a process of its own
    refused: dict[Setting, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._runtimes: dict[int, Runtime] = {}
        self._plain: dict[int, NDArray[np.float32]] = {}  # logits of the knobs at the start, for each number of blocks
        self._builds: dict[Setting, Future[Variant | str]] = {}
        self._kernels: dict[Setting, Kernel] = {}
        workers = max(1, min(16, len(os.sched_getaffinity(0)) - 1))
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for runtime in self._runtimes.values():
            runtime.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ahead(self, settings: Sequence[Setting]) -> None:
        """Compile in the background what may be timed next, and nothing else that has not begun."""
        for setting, waiting in list(self._builds.items()):
            if setting not in settings and waiting.cancel():
                del self._builds[setting]
        self._compile(settings)

    def _compile(self, settings: Sequence[Setting]) -> None:
        plain = [Setting(blocks, self.start) for blocks in {s.blocks for s in settings} - set(self._runtimes)]
        for setting in [*settings, *plain]:
            if setting not in self._builds:
                model, gpu, context = self.model, self.gpu, self.max_context
                self._builds[setting] = self._pool.submit(self.compile, model, gpu, context, setting, self.kv_dtype)

    def measure(self, settings: Sequence[Setting], repeats: int = REPEATS) -> list[Rate]:
        """Tokens per second of each setting, the median of runs in turns; None for one that is refused."""
        self._compile(settings)
        for setting in settings:
            self._admit(setting)
        good = [s for s in dict.fromkeys(settings) if s not in self.refused]
        rates: dict[Setting, list[float]] = {setting: [] for setting in good}
        for turn in range(repeats + 1):
            for setting in good:
                rate = self._time(setting)
                if turn:  # the first turn warms up
                    rates[setting].append(rate)
        return [statistics.median(rates[s]) if s in rates else None for s in settings]

    def verify(self, setting: Setting) -> tuple[Comparison, float]:
        """Compare a setting with the reference, at its depth; KogcError if it fails. Also the ceiling in bytes/s."""
        runtime = self._use(setting)
        comparison = compare(runtime, (self.depth,))
        require(comparison)
        return comparison, runtime.read_bandwidth()

    def bytes_per_token(self, setting: Setting) -> float:
        plan = self._use(setting).plan
        return plan.weight_bytes + plan.kv_bytes_read(self.depth + TOKENS // 2)

    # -- one variant

    def _admit(self, setting: Setting) -> None:
        """Load a variant and compare its logits with the plain setting's, once."""
        if setting in self.refused or setting in self._kernels:
            return
        try:
            self._kernels[setting] = self._load(setting)
            self._compare(setting)
        except Died:
            raise
        except KogcError as error:
            self.refused[setting] = str(error)

    def _load(self, setting: Setting) -> Kernel:
        variant = self._builds[setting].result()
        if isinstance(variant, str):
            raise KogcError(variant)
        return self._runtime(setting.blocks).load_kernel(*variant)

    def _runtime(self, blocks: int) -> Runtime:
        """Weights laid out for a number of blocks, and their kernel with the knobs of the start."""
        if blocks not in self._runtimes:
            artifact = self.scratch / f"blocks-{blocks}"
            self._compile([plain := Setting(blocks, self.start)])
            self._builds[plain].result()  # from here on in the build cache
            options = BuildOptions(self.max_context, blocks, True, kv_dtype=self.kv_dtype, knobs=self.start)
            build(self.model, self.gpu, artifact, options)
            runtime = self._runtimes[blocks] = load(artifact, self.device, sampling=GREEDY).runtime
            self._plain[blocks] = self._logits(runtime)
            runtime.fill_kv(self.depth)
        return self._runtimes[blocks]

    def _compare(self, setting: Setting) -> None:
        runtime = self._use(setting)
        ours, plain = self._logits(runtime), self._plain[setting.blocks]
        runtime.fill_kv(self.depth)
        error = float((np.linalg.norm(ours - plain, axis=1) / np.linalg.norm(plain, axis=1)).max())
        limit = CHECK_SHARE * LIMITS[runtime.plan.spec.dtype]
        if not error <= limit:  # written so that NaN fails
            raise KogcError(f"logits differ from the plain setting's by {error:.1e} (limit {limit:.1e})")

    def _use(self, setting: Setting) -> Runtime:
        runtime = self._runtime(setting.blocks)
        runtime.use(self._kernels[setting])
        return runtime

    def _logits(self, runtime: Runtime) -> NDArray[np.float32]:
        rng = np.random.default_rng(0)
        prompt = tuple(int(t) for t in rng.integers(0, runtime.plan.spec.vocab, CHECK_TOKENS))
        logits = self._run(runtime, Request(prompt, logits=True)).logits
        assert logits is not None
        return np.array(logits)

    def _time(self, setting: Setting) -> float:
        runtime = self._use(setting)
        request = Request((runtime.plan.spec.bos_token or 0,), start=self.depth, max_new=TOKENS)
        return TOKENS / (self._run(runtime, request).milliseconds / 1e3)

    def _run(self, runtime: Runtime, request: Request) -> Result:
        """Run to the end; Died, with the setting's name, where that fails."""
        plan = runtime.plan
        what = Setting(plan.blocks, plan.knobs).changes(Setting(0, self.start))
        try:
            result = runtime.run(request)
        except KogcError as error:
            raise Died(f"tune: with {what}: {error}") from None
        if len(result.tokens) != request.max_new:
            raise Died(f"tune: with {what}: the kernel made {len(result.tokens)} of {request.max_new} tokens")
        return result


@dataclass(frozen=True)
class Outcome:
    """A finished search. `refused` says why, by what the setting changes."""

    tuned: Tuned
    start: Setting
    steps: tuple[Step, ...]
    refused: dict[str, str]
    comparison: Comparison
    out: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        m = self.tuned.measured
        return {
            "model": m.model,
            "out": str(self.out),
            "changes": self.tuned.setting.changes(self.start),
            "blocks": self.tuned.setting.blocks,
            "knobs": vars(self.tuned.setting.knobs),
            "measured": vars(m),
            "steps": [{"name": s.name, "rates": s.rates, "kept": s.kept} for s in self.steps],
            "refused": self.refused,
            "comparison": self.comparison.to_json(),
            "seconds": round(self.seconds, 1),
        }


def run_tune(
    model: str,
    gpu: str = "auto",
    out: Path | None = None,
    budget: float = 300.0,
    depth: int = 128,
    report: Callable[[Step], None] = lambda step: None,
    kv_dtype: str = "bf16",
) -> Outcome:
    """Search from the default knobs for `budget` seconds, and write the winner (to its place for builds, or `out`).

    Uses random weights: speed does not depend on them. KogcError if the winner fails the comparison with the
    reference; nothing is written then.
    """
    started = time.monotonic()
    if not budget >= 0:  # NaN as well
        raise UsageError(f"--budget {budget}: not a number of seconds")
    context = depth + 1 + TOKENS
    if context > (most := find_model(model).spec.max_context):
        raise UsageError(f"--depth {depth}: with {TOKENS} tokens more than the {most} of the model's context")
    plan = prepare(model, gpu, context, tuned=False, kv_dtype=kv_dtype).plan
    path = out or tuned_file(plan.spec, plan.profile, kv_dtype)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(out)
    gpu = plan.profile.name if plan.profile.name in list_profiles() and gpu == "auto" else gpu
    start = Setting(plan.blocks, plan.knobs)
    with (
        tempfile.TemporaryDirectory(prefix="kogc-tune-") as scratch,
        Bench(model, gpu, depth, context, Path(scratch), start.knobs, kv_dtype=kv_dtype) as bench,
    ):
        candidates = candidates_for(plan.profile, start)
        search = Search(candidates, bench.measure, bench.ahead, started + budget, report)
        bench.measure([start], 1)
        if why := bench.refused.get(start):
            raise KogcError(f"tune: the setting to start from does not run here: {why}")
        best = search.run(start)
        before, after = bench.measure([start, best], FINAL_REPEATS)
        assert before is not None
        assert after is not None
        if after < before:  # what looked faster was noise
            best, after = start, before
        comparison, ceiling = bench.verify(best)
        share = bench.bytes_per_token(best) * after / ceiling
    how = f"medians of {FINAL_REPEATS} runs of {TOKENS} tokens in turns, random weights; comparison passed: "
    how += f"relative error {comparison.relative_error:.1e}"
    tuned = Tuned(best, Measurement(plan.spec.name, depth, before, after, share, how))
    write_tuned(path, tuned, plan.spec)
    refused = {setting.changes(start): why for setting, why in bench.refused.items()}
    return Outcome(tuned, start, tuple(search.steps), refused, comparison, path, time.monotonic() - started)
