"""How even the time of a token is: one long generation, watched from outside.

The plain kernel runs; the host polls the word of the next token without pause and notes its own clock when it comes.
That costs the kernel nothing, and tells about a microsecond apart what a user would see. A host that was interrupted
notices late, so what it adds to the tail is never hidden. On a CPU the watching thread takes time from the kernel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import KogcError
from .runtime import Request, Runtime

TOKENS = 2000
PERCENTILE = 99


@dataclass(frozen=True)
class Steady:
    """Microseconds a token, over `tokens` of one generation from `depth`.

    The context grows meanwhile, and the time with it. over_trend: the 99th percentile of each token's time over that
    of a straight line through them all at its place, scaled so that its median is 1.
    """

    depth: int
    tokens: int
    median: float
    p99: float
    largest: float
    over_trend: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line for people."""
        over_median, over_trend = 100 * (self.p99 / self.median - 1), 100 * (self.over_trend - 1)
        return (
            f"{self.tokens} tokens from depth {self.depth}: median {self.median:.1f} us, 99th percentile "
            f"{self.p99:.1f} us ({over_median:+.1f} %; {over_trend:+.1f} % over the growth with depth), "
            f"largest {self.largest:.1f} us"
        )


def watch(runtime: Runtime, depth: int, tokens: int | None = None) -> Steady:
    """Generate tokens (TOKENS) from `depth` over random keys and values. KogcError where the context is too short."""
    tokens = tokens or TOKENS
    if depth + 1 + tokens > runtime.plan.max_context:
        have = f"the artifact has {runtime.plan.max_context}"
        raise KogcError(f"--steady makes {tokens} tokens from depth {depth}: {depth + 1 + tokens} positions, {have}")
    runtime.fill_kv(depth)
    arrivals = runtime.arrivals(Request((runtime.plan.spec.bos_token or 0,), start=depth, max_new=tokens))
    if len(arrivals) != tokens:
        raise KogcError(f"the kernel made {len(arrivals)} of {tokens} tokens")
    return judge(np.diff(arrivals) / 1e3, depth)


def judge(times: NDArray[np.float64], depth: int) -> Steady:
    """The figures of a generation from each token's microseconds, float64[tokens - 1], in order."""
    at = np.arange(len(times))
    typical = times <= np.percentile(times, 95)  # the tail that is to be judged must not bend the line
    trend = np.polyval(np.polyfit(at[typical], times[typical], 1), at)
    ratio = times / trend
    return Steady(
        depth=depth,
        tokens=len(times) + 1,
        median=float(np.median(times)),
        p99=float(np.percentile(times, PERCENTILE)),
        largest=float(times.max()),
        over_trend=float(np.percentile(ratio, PERCENTILE) / np.median(ratio)),
    )
