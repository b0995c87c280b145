"""Tokens per second at chosen depths, beside the machine's own read ceiling and a comparison with the reference.

No speed leaves this module without a comparison that passed in the same run on the same device.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import steady as steadiness
from . import trace as tracing
from .compare import Comparison, compare, require
from .errors import KogcError, UsageError
from .files import check_writable
from .plan.plan import Plan
from .plan.samples import COLUMNS
from .runtime import Request, Runtime
from .runtime.samples import making_samples
from .sampling import GREEDY, Sampling
from .session import load

# What --sample measures: every part of sampling at once.
SAMPLED = Sampling(
    temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, seed=1
)
HEADERS = ("model", "size", "target", "test", "t/s", "GB/token", "GB/s", "ceiling GB/s", "share", "comparison")


@dataclass(frozen=True)
class Speed:
    """One row: n tokens generated from `depth`. Rates are medians over the repeats; bytes are what must be read.

    spread: standard deviation of tokens_per_second over the repeats. share: of the memory's read ceiling, measured in
    the same run, before and after, of which the higher counts; weights that stay in a cache may be read faster. Of a
    prompt (`pp`), whose tokens share what is read, n tokens go in and the rate is theirs until the first new token is
    there; bytes and share are 0.
    """

    test: str
    depth: int
    n: int
    tokens_per_second: float
    spread: float
    bytes_per_token: float
    bytes_per_second: float
    share: float = 0.0


def run_bench(
    artifact_dir: str | os.PathLike[str],
    n: int = 128,
    depths: Sequence[int] = (0,),
    json: bool = False,
    repeat: int = 3,
    device: int = 0,
    phases: bool = False,
    trace: Path | None = None,
    steady: bool = False,
    sample: bool = False,
    prompts: Sequence[int] = (),
    samples: Sequence[int] = (),
) -> dict[str, Any]:
    """Load an artifact, compare it with the reference, and time n tokens at each depth. Speeds in tokens/s, bytes/s.

    Prints the table, unless the caller wants to print the result as JSON. KogcError if the comparison fails (nothing
    is timed then) or a depth does not fit the context. phases, trace: also profile a tracing build of the same plan at
    the first depth, as a table or as a Chrome trace file; the speeds are the plain kernel's. steady: also time each of
    2,000 tokens from the first depth. sample: one more row at the first depth, with tokens drawn. prompts: also time
    prompts of so many tokens, from an empty context. samples: also time so many continuations together, at the first
    depth.
    """
    with load(Path(artifact_dir), device, sampling=GREEDY) as session:
        runtime = session.runtime
        _check(runtime.plan, n, depths, repeat, prompts, samples, steady)
        if trace is not None:
            check_writable(trace)
        comparison = compare(runtime, tuple(depths), samples=tuple(samples))
        require(comparison)
        ceiling = runtime.read_bandwidth()
        speeds = [_speed(runtime, depth, n, repeat) for depth in depths]
        if sample:
            speeds.append(_speed(runtime, depths[0], n, repeat, SAMPLED))
        speeds += [_samples_speed(runtime, speeds[0], count, repeat) for count in samples]
        speeds += [_prompt_speed(runtime, count, repeat) for count in prompts]
        ceiling = max(ceiling, runtime.read_bandwidth())  # at both ends: a neighbour may have slowed one of them
        speeds = [replace(speed, share=speed.bytes_per_second / ceiling) for speed in speeds]
        result = _result(runtime, speeds, ceiling, repeat, comparison)
        evenness = steadiness.watch(runtime, depths[0]) if steady else None
        profile = _profile(runtime, depths[0]) if phases or trace else None
    if not json:
        print(table(result))
    if evenness is not None:
        result["steady"] = evenness.to_json()
        if not json:
            print(f"steady: {evenness.summary()}")
    if profile is not None:
        result["profile"] = {"depth": depths[0], **profile.to_json()}
        if trace is not None:
            tracing.write_chrome(profile, trace)
        if phases and not json:
            print(f"\nphases at depth {depths[0]}\n{tracing.table(profile)}")
    return result


def table(result: dict[str, Any]) -> str:
    """The result as llama-bench prints its own: a Markdown table, and below it what was compared."""
    rows = [HEADERS, *(_row(result, speed) for speed in result["tests"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADERS))]
    left = 4  # columns of words; the rest are numbers, but for the last

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = "| " + " | ".join("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:]), f"comparison: {result['comparison']['summary']}"])


def _check(
    plan: Plan,
    n: int,
    depths: Sequence[int],
    repeat: int,
    prompts: Sequence[int],
    samples: Sequence[int],
    steady: bool = False,
) -> None:
    if n < 1 or repeat < 1 or not depths or min(depths) < 0 or min(prompts, default=1) < 1:
        raise UsageError("bench needs at least one token, one repeat and one depth, none of them negative")
    if samples and (min(samples) < 1 or max(samples) > COLUMNS):
        raise UsageError(f"bench can make 1 to {COLUMNS} samples together")
    if samples and plan.samples is None:
        raise KogcError(f"--samples: {plan.spec.name} on {plan.profile.name} makes samples one after the other")
    wanted = {f"depth {max(depths)} and {n} tokens": max(depths) + 1 + n}
    if steady:
        wanted[f"--steady from depth {depths[0]}"] = depths[0] + 1 + steadiness.TOKENS
    wanted |= {f"a prompt of {count} tokens and one more": count + 1 for count in prompts}
    for what, longest in wanted.items():
        if longest > plan.max_context:
            have = f"the artifact has {plan.max_context}: rebuild with a larger --max-context, or ask for less"
            raise KogcError(f"{what} need {longest} positions, {have}")


def _speed(runtime: Runtime, depth: int, n: int, repeat: int, sampling: Sampling = GREEDY) -> Speed:
    """One token as the prompt at position `depth`, then n tokens; no stop token ends them."""
    runtime.fill_kv(depth)
    request = Request((runtime.plan.spec.bos_token or 0,), start=depth, max_new=n, sampling=sampling)
    runtime.run(request)  # the first launch also pays for loading code and waking clocks
    rates = []
    for _ in range(repeat):
        result = runtime.run(request)
        if len(result.tokens) != n:
            raise KogcError(f"the kernel made {len(result.tokens)} of {n} tokens at depth {depth}")
        rates.append(n / (result.milliseconds / 1e3))
    rate = statistics.median(rates)
    per_token = runtime.plan.weight_bytes + _mean_kv_bytes(runtime.plan, depth, n)
    spread = statistics.stdev(rates) if repeat > 1 else 0.0
    test = f"tg{n}" + (f" @ d{depth}" if depth else "") + ("" if sampling.greedy else " sampled")
    return Speed(test, depth, n, rate, spread, per_token, per_token * rate)


def _samples_speed(runtime: Runtime, one: Speed, count: int, repeat: int) -> Speed:
    """`count` continuations together, each as the one stream of `one`: tokens per second, and how many times one's.

    Bytes are those of a step: the weights and the prompt's keys and values once, and each sample's own.
    """
    plan, depth, n = runtime.plan, one.depth, one.n
    runtime.fill_kv(depth)
    request = Request((plan.spec.bos_token or 0,), start=depth, max_new=n)
    rates = []
    for _ in range(repeat + 1):  # the first launch also pays for loading code
        made = sum(1 for _ in making_samples(runtime).samples(request, count))
        if made != n * count:
            raise KogcError(f"the kernel made {made} of {n * count} tokens of {count} samples at depth {depth}")
        rates.append(made / (runtime.last_timing / 1e3))
    rate = statistics.median(rates[1:])
    shared = plan.kv_bytes_read(depth)
    step = plan.weight_bytes + shared + count * (_mean_kv_bytes(plan, depth, n) - shared)
    spread = statistics.stdev(rates[1:]) if repeat > 1 else 0.0
    test = f"{one.test} x{count} ({rate / one.tokens_per_second:.2f} times one)"
    return Speed(test, depth, n, rate, spread, step / count, rate / count * step)


def _prompt_speed(runtime: Runtime, n: int, repeat: int) -> Speed:
    """A prompt of n random tokens, up to the first new one."""
    rng = np.random.default_rng(n)
    prompt = tuple(int(token) for token in rng.integers(0, runtime.plan.spec.vocab, n))
    request = Request(prompt, max_new=1)
    runtime.run(request)
    rates = [n / (runtime.run(request).milliseconds / 1e3) for _ in range(repeat)]
    spread = statistics.stdev(rates) if repeat > 1 else 0.0
    return Speed(f"pp{n}", 0, n, statistics.median(rates), spread, 0.0, 0.0)


def _profile(runtime: Runtime, depth: int) -> tracing.Trace:
    """Build the tracing kernel of the same plan, and run it over the same weights."""
    from .render import render
    from .targets import compile_binary

    plan = tracing.trace_plan(runtime.plan)
    return tracing.record(runtime, compile_binary(render(plan), plan), plan, depth)


def _mean_kv_bytes(plan: Plan, depth: int, n: int) -> float:
    """KV bytes read a token, on average over the n tokens: the first sees `depth` earlier positions."""
    return statistics.fmean(plan.kv_bytes_read(position) for position in range(depth, depth + n))


def _result(
    runtime: Runtime, speeds: list[Speed], ceiling: float, repeat: int, comparison: Comparison
) -> dict[str, Any]:
    plan = runtime.plan
    return {
        "model": plan.spec.name,
        "dtype": plan.spec.dtype,
        "weight_bytes": plan.weight_bytes,
        "dummy_weights": runtime.program.weights is None,
        "target": plan.target,
        "gpu": plan.profile.name,
        "blocks": plan.blocks,
        "knobs": asdict(plan.knobs),
        "max_context": plan.max_context,
        "kv_dtype": plan.kv_dtype,
        "repeat": repeat,
        "ceiling_bytes_per_second": ceiling,
        "tests": [asdict(speed) for speed in speeds],
        "comparison": {**comparison.to_json(), "summary": comparison.summary()},
    }


def _row(result: dict[str, Any], speed: dict[str, Any]) -> tuple[str, ...]:
    prompt = not speed["bytes_per_token"]
    checks = [d for d in result["comparison"]["depths"] if d["depth"] == speed["depth"]]
    error = checks[-1 if prompt else 0]["relative_error"]
    model = result["model"] + (" (dummy)" if result["dummy_weights"] else "")
    return (
        f"{model} {result['dtype']}" + (" KV fp8" if result["kv_dtype"] == "fp8" else ""),
        f"{result['weight_bytes'] / 1e9:.2f} GB",
        f"{result['gpu']} x{result['blocks']}",
        speed["test"],
        f"{speed['tokens_per_second']:.2f} ± {speed['spread']:.2f}",
        "" if prompt else f"{speed['bytes_per_token'] / 1e9:.3f}",
        "" if prompt else f"{speed['bytes_per_second'] / 1e9:.1f}",
        f"{result['ceiling_bytes_per_second'] / 1e9:.1f}",
        "" if prompt else f"{100 * speed['share']:.1f} %",
        f"passed {error:.1e}",
    )
