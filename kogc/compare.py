"""Does the kernel compute the model? Its logits against the FP32 reference, from the very weights on the device."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import F32, convert, to_float32
from .errors import KogcError
from .kv_layout import unpack_kv
from .packing import SlabWeights
from .plan.plan import CHUNK
from .reference import KeyValue, Reference
from .runtime import Request, Result, Runtime
from .runtime.samples import making_samples
from .sampling import Sampling

THREADS = 8  # that unpack what is read of a cache
POSITIONS = 16  # teacher-forced from depth 0
SAMPLE_TOKENS = 4  # of each sample
SAMPLE_SEED = 1
NEW_TOKENS = 16  # generated after them, for the test that two runs agree
# Relative L2 error of a position's logits: the kernel rounds activations to the weights' type where the usual
# implementations do, the reference nowhere; BF16 keeps 8 bits, FP16 11.
LIMITS = {"bf16": 1e-2, "fp16": 3e-3}
# Random models amplify rounding, the more so over a random cache (measured: 2e-2 at depth 500 in BF16, where a single
# lost position gives 1e-1). Beyond LIMITS, an error may be this many times what rounding does to the reference itself.
ROUNDING = 2.0
# Of a key or value in an FP8 cache, relative to its length: what rounding to four bits of mantissa can make of it,
# beside what any kernel's may differ by.
FP8_LIMIT = 2.0**-4 + 1e-2
DECIDED = 4.0  # the reference's choice counts where its top two differ by more than this many largest errors


@dataclass(frozen=True)
class Depth:
    """The comparison at one depth. relative_error: the worst position's, and its limit; both without unit.

    decided: positions whose best token is clear; agreeing: those of them where kernel and reference choose the same.
    in_passes: what came before the positions went through the model in passes of many tokens. samples: so many were
    made together, of which one is compared.

    With an FP8 cache the reference sees the keys and values that the device has stored for the positions: rounded so
    coarsely, neighbours in FP32 become neighbours in E4M3, and logits would differ by that. Instead stored_error is the
    worst stored vector's distance from the reference's own, and cache_error what the cache costs: the relative error of
    the logits against a reference that rounds nothing (None where what came before was random).
    """

    depth: int
    positions: int
    relative_error: float
    limit: float
    decided: int
    agreeing: int
    in_passes: bool = False
    stored_error: float | None = None
    cache_error: float | None = None
    samples: int = 0

    @property
    def where(self) -> str:
        after = " after passes" if self.in_passes else ""
        return f"depth {self.depth}{after}" + (f" of {self.samples} samples" if self.samples else "")


@dataclass(frozen=True)
class Comparison:
    """`repeatable`: two launches gave the same bits. `consistent`: each token made is the best of its logits.

    independent: a sample's logits have the same bits when it is made alone.
    """

    depths: tuple[Depth, ...]
    repeatable: bool
    consistent: bool
    independent: bool = True

    @property
    def relative_error(self) -> float:
        return max(d.relative_error for d in self.depths)

    @property
    def cache_error(self) -> float | None:
        """What an FP8 cache costs, at its worst; None with a BF16 cache."""
        return max((d.cache_error for d in self.depths if d.cache_error is not None), default=None)

    @property
    def problems(self) -> list[str]:
        """What failed, one phrase each; empty when all is well."""
        found = [] if self.repeatable else ["two runs of the same launch differ"]
        if not self.consistent:
            found.append("a generated token is not the best of its own logits")
        if not self.independent:
            found.append("a sample differs when it is made alone")
        for d in self.depths:
            if not d.relative_error <= d.limit:  # written so that NaN fails
                error = f"relative logit error {d.relative_error:.2e} (limit {d.limit:.1e})"
                found.append(f"{d.where}: {error}")
            if d.stored_error is not None and not d.stored_error <= FP8_LIMIT:
                found.append(f"{d.where}: a stored key or value is off by {d.stored_error:.2e} (limit {FP8_LIMIT:.1e})")
            if d.agreeing < d.decided:
                found.append(f"{d.where}: {d.decided - d.agreeing} of {d.decided} clear greedy tokens differ")
        return found

    def to_json(self) -> dict[str, Any]:
        errors = {"relative_error": self.relative_error, "cache_error": self.cache_error}
        return {**asdict(self), "passed": not self.problems, **errors}

    def summary(self) -> str:
        """One line for people."""
        where = ", ".join(f"{d.positions} at {d.where}" for d in self.depths)
        errors = ", ".join(f"{d.relative_error:.1e} (limit {d.limit:.1e})" for d in self.depths)
        decided, agreeing = sum(d.decided for d in self.depths), sum(d.agreeing for d in self.depths)
        return (
            f"FP32 reference on the device's own weights, positions: {where}; largest relative logit error: {errors}; "
            f"greedy tokens agree at {agreeing} of {decided} clear positions; two runs bit-identical{self._cost}"
        )

    @property
    def _cost(self) -> str:
        """What a line says of an FP8 cache."""
        if self.cache_error is None:
            return ""
        stored = max(d.stored_error for d in self.depths if d.stored_error is not None)
        return (
            f"; all this over the FP8 cache as stored, whose keys and values are within {stored:.1e}: against FP32 "
            f"throughout it costs a relative logit error of {self.cache_error:.1e}"
        )


def compare(runtime: Runtime, depths: tuple[int, ...] = (), seed: int = 0, samples: tuple[int, ...] = ()) -> Comparison:
    """Compare at depth 0, and at each other depth over a KV cache of random values. Overwrites the KV cache.

    samples: also compare the last of so many samples that are made together, for each of these numbers.
    Takes about as long as reading the weights back and multiplying by them on the CPU, once a depth.
    """
    rng = np.random.default_rng(seed)
    weights = _weights(runtime)
    from_start, repeatable, consistent = _at_start(runtime, weights, rng)
    deeper = [_at_depth(runtime, weights, rng, d) for d in depths if d > 0]
    sampled = [_of_samples(runtime, weights, rng, n) for n in samples]
    repeatable &= all(repeated for _, repeated, _ in sampled)
    independent = all(alone for _, _, alone in sampled)
    return Comparison((*from_start, *deeper, *(d for d, _, _ in sampled)), repeatable, consistent, independent)


def require(comparison: Comparison) -> None:
    """KogcError with all that failed."""
    if comparison.problems:
        what = "; ".join(comparison.problems)
        raise KogcError(f"the comparison with the FP32 reference failed, so no speed is given: {what}")


def _weights(runtime: Runtime) -> SlabWeights:
    return SlabWeights(runtime.plan, lambda offset, n: runtime.download("weights", offset, n).tobytes())


def _tokens(runtime: Runtime, rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(int(t) for t in rng.integers(0, runtime.plan.spec.vocab, count))


class RoundedReference(Reference):
    """The reference with what enters each projection rounded to the weights' type, and keys and values to BF16.

    Keys are rounded before they are rotated, not after: the size of the error is the same.
    """

    def _norm(self, x: F32, weight: F32) -> F32:
        return self._round(super()._norm(x, weight))

    def _attention(self, *args: Any) -> tuple[F32, KeyValue]:
        out, kv = super()._attention(*args)
        return self._round(out), kv

    def _heads(self, stream: Any, layer: int, which: str, x: F32, heads: int) -> F32:
        out = super()._heads(stream, layer, which, x, heads)
        return out if which == "q" else self._round(out, "bf16")

    def _gated(self, *args: Any) -> F32:
        return self._round(super()._gated(*args))

    def _round(self, x: F32, dtype: str | None = None) -> F32:
        dtype = dtype or self.spec.dtype
        return to_float32(convert(np.ascontiguousarray(x), "fp32", dtype), dtype)


class Expected:
    """Logits of the reference after `prompt`, and the error that rounding alone would give.

    stored: the prompt's keys and values in an FP8 cache. unrounded: logits of a reference without such a cache.
    """

    def __init__(
        self,
        weights: SlabWeights,
        prompt: tuple[int, ...],
        past: list[KeyValue] | None,
        stored: list[KeyValue] | None = None,
        unrounded: F32 | None = None,
    ) -> None:
        self._weights, self._prompt, self._past, self._stored = weights, prompt, past, stored
        self._spec, self._unrounded = weights.plan.spec, unrounded
        self._exact, self._computed = Reference(self._spec, weights).forward(prompt, past, stored)

    @cached_property
    def _rounded(self) -> F32:
        return RoundedReference(self._spec, self._weights).forward(self._prompt, self._past, self._stored)[0]

    def _stored_error(self) -> float | None:
        if self._stored is None:
            return None
        new = -len(self._prompt)
        pairs = zip(self._stored, self._computed, strict=True)
        return max(_relative(ours, own[:, new:]) for both in pairs for ours, own in zip(*both, strict=True))

    def check(self, depth: int, ours: F32, in_passes: bool = False) -> Depth:
        """`ours`: the logits of the last positions, as many as it has rows."""
        exact = self._exact[-len(ours) :]
        error, limit = _relative(ours, exact), LIMITS[self._spec.dtype]
        if error > limit:
            limit = max(limit, ROUNDING * _relative(self._rounded[-len(ours) :], exact))
        top = np.partition(exact, -2, axis=1)[:, -2:] if exact.shape[1] > 1 else exact.repeat(2, axis=1)
        decided = top[:, 1] - top[:, 0] > DECIDED * np.abs(ours - exact).max()
        agreeing = decided & (ours.argmax(axis=1) == exact.argmax(axis=1))
        cost = None if self._unrounded is None else _relative(ours, self._unrounded[-len(ours) :])
        counts = int(decided.sum()), int(agreeing.sum())
        return Depth(depth, len(ours), error, limit, *counts, in_passes, self._stored_error(), cost)


def _at_start(runtime: Runtime, weights: SlabWeights, rng: np.random.Generator) -> tuple[list[Depth], bool, bool]:
    """The comparison at depth 0, whether a second run is bit-identical, and whether tokens follow from logits."""
    count = min(POSITIONS, runtime.plan.max_context)
    prompt = _tokens(runtime, rng, count)
    request = Request(prompt, max_new=min(NEW_TOKENS, runtime.plan.max_context - count), logits=True)
    first, second = _run(runtime, request), _run(runtime, request)
    assert first.logits is not None
    assert second.logits is not None
    same = first.tokens == second.tokens and np.array_equal(first.logits.view("u4"), second.logits.view("u4"))
    consistent = not request.max_new or first.tokens[:1] == [int(first.logits[-1].argmax())]
    unrounded = Reference(runtime.plan.spec, weights).logits(prompt) if runtime.plan.kv_dtype == "fp8" else None

    def expected() -> Expected:
        return Expected(weights, prompt, None, _stored(runtime, 0, count), unrounded)

    at_start = expected()
    checks = [at_start.check(0, first.logits)]
    if runtime.plan.passes and count > 1 and request.max_new:
        _run(runtime, Request(prompt, max_new=1))
        logits = _run(runtime, Request(prompt[-1:], count - 1, logits=True)).logits
        assert logits is not None
        after_passes = at_start if unrounded is None else expected()  # the cache has changed
        checks.append(after_passes.check(0, logits, in_passes=True))
    return checks, same, consistent


def _of_samples(runtime: Runtime, weights: SlabWeights, rng: np.random.Generator, n: int) -> tuple[Depth, bool, bool]:
    """The last of n samples after a prompt; whether a second run, and the sample alone, give the same bits."""
    prompt = _tokens(runtime, rng, min(POSITIONS, runtime.plan.max_context - SAMPLE_TOKENS))
    count = len(prompt)
    first, second = (_samples(runtime, prompt, SAMPLE_SEED, n) for _ in range(2))
    alone = _samples(runtime, prompt, SAMPLE_SEED + n - 1, 1)
    (tokens, logits), own = first, slice(n - 1, n)
    same = tokens == second[0] and np.array_equal(logits.view("u4"), second[1].view("u4"))
    independent = tokens[own] == alone[0] and np.array_equal(logits[:, own].view("u4"), alone[1].view("u4"))
    expected = Expected(weights, prompt + tuple(tokens[-1][:-1]), None)
    found = expected.check(0, np.ascontiguousarray(logits[:, n - 1]), in_passes=count > 1)
    return replace(found, samples=n), same, independent


def _samples(runtime: Runtime, prompt: tuple[int, ...], seed: int, n: int) -> tuple[list[list[int]], F32]:
    """Tokens of n samples, drawn, and float32[tokens][n][vocab] logits."""
    request = Request(prompt, max_new=SAMPLE_TOKENS, sampling=Sampling(seed=seed), logits=True)
    tokens: list[list[int]] = [[] for _ in range(n)]
    several = making_samples(runtime)
    for sample, token in several.samples(request, n):
        tokens[sample].append(token)
    return tokens, several.sample_logits(n, SAMPLE_TOKENS).copy()


def _at_depth(runtime: Runtime, weights: SlabWeights, rng: np.random.Generator, depth: int) -> Depth:
    runtime.fill_kv(depth)
    prompt = _tokens(runtime, rng, 1)
    past = _cached(runtime, 0, depth)
    logits = _run(runtime, Request(prompt, depth, logits=True)).logits
    assert logits is not None
    return Expected(weights, prompt, past, _stored(runtime, depth, 1)).check(depth, logits)


def _run(runtime: Runtime, request: Request) -> Result:
    """A copy of the result: a runtime may give the same buffer again."""
    result = runtime.run(request)
    logits = None if result.logits is None else result.logits.copy()
    return Result(result.tokens, logits, result.milliseconds)


def _stored(runtime: Runtime, start: int, count: int) -> list[KeyValue] | None:
    """Keys and values of an FP8 cache from position `start` on, of each layer; None of another cache."""
    return _cached(runtime, start, count) if runtime.plan.kv_dtype == "fp8" else None


def _cached(runtime: Runtime, start: int, count: int) -> list[KeyValue]:
    """Keys and values as the device holds them: float32 [kv_heads, count, head_dim] each, of each layer."""
    plan = runtime.plan
    heads = plan.spec.kv_heads
    first, end = start // CHUNK, -(-(start + count) // CHUNK)
    inside = slice(start - first * CHUNK, start - first * CHUNK + count)
    shape = (plan.spec.layers, 2, heads, count, plan.spec.head_dim)
    out = np.empty(shape, np.float32)

    def unpack(head: int, raw: NDArray[np.uint8]) -> None:
        both = unpack_kv(plan, plan.target, raw, inside.stop)
        for which, vectors in enumerate(both):
            out[head // heads, which, head % heads] = vectors[inside]

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[None]] = deque()
        for head in range(plan.spec.layers * heads):
            offset = (head * plan.chunks + first) * plan.chunk_bytes
            raw = runtime.download("kv", offset, (end - first) * plan.chunk_bytes)
            waiting.append(pool.submit(unpack, head, raw))
            if len(waiting) > THREADS:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    return [(keys, values) for keys, values in out]


def _relative(ours: F32, exact: F32) -> float:
    """Relative L2 error of the worst vector along the last axis; NaN, which no limit admits, if any number is NaN."""
    return float((np.linalg.norm(ours - exact, axis=-1) / np.linalg.norm(exact, axis=-1)).max())
