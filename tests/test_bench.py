"""Bench and comparison: a kernel that computes the model passes; one that does not is caught, and gives no speed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kogc import bench, rope
from kogc.bench import run_bench
from kogc.compare import LIMITS, RoundedReference, compare
from kogc.errors import KogcError, UsageError
from kogc.kv_layout import pack_kv, unpack_kv
from kogc.kv_numbers import round_kv
from kogc.packing import SlabWeights, operands, total_bytes
from kogc.plan.plan import Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.reference import Reference
from kogc.runtime import Request, Result
from kogc.spec import ModelSpec, Rope

SPEC = ModelSpec(
    name="small", family="llama", layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=32, vocab=131,
    tied_embeddings=False, norm_eps=1e-5, max_context=320, qkv_bias=False, qk_norm=False, sliding_window=None,
    sliding_layers=None, rope=Rope(10000.0), dtype="bf16", bos_token=None, eos_tokens=(),
)  # fmt: skip
Spoil = Callable[[Request, NDArray[np.float32], int], NDArray[np.float32]]


class Fp8Reference(Reference):
    """The reference as a kernel with an FP8 cache computes: attention sees new keys and values rounded."""

    def _attention(self, stream: Any, layer: int, x: Any, cos_sin: Any, past: Any, stored: Any) -> Any:
        _, computed = super()._attention(stream, layer, x, cos_sin, past, None)
        keys, values = (round_kv(vectors[:, -len(x) :], "fp8") for vectors in computed)
        out, _ = super()._attention(stream, layer, x, cos_sin, past, (keys, values))
        before = [np.empty_like(keys[:, :0])] * 2 if past is None else past
        return out, tuple(np.concatenate(pair, axis=1) for pair in zip(before, (keys, values), strict=True))


class NumpyRuntime:
    """A device whose kernel is the reference itself, over random packed weights and a cache in the target's layout.

    `spoil(request, logits, launch)` may change the logits that a launch gives; `wrong_token` its greedy choice.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.program = SimpleNamespace(weights=None)
        self.launches = 0
        self.spoil: Spoil = lambda request, logits, launch: logits
        self.wrong_token = False
        self.bandwidths = [1e9, 1e9]  # before the speeds are measured, and after
        rng = np.random.default_rng(1)
        values = rng.normal(0, 0.2, total_bytes(plan) // 2).astype(np.float32)
        self.weights = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        place = operands(plan)[-1]
        self.weights[place.offset : place.offset + place.bytes] = rope.inv_freq(plan.spec).view(np.uint8)
        self.kv = np.zeros(plan.kv_bytes, np.uint8)
        self.spoil_cache = lambda keys, values: (keys, values)
        kernel = Fp8Reference if plan.kv_dtype == "fp8" else Reference
        self.reference = kernel(plan.spec, SlabWeights(plan, lambda at, n: self.weights[at : at + n].tobytes()))

    def download(self, name: str, offset: int, count: int) -> NDArray[np.uint8]:
        memory = {"weights": self.weights, "kv": self.kv}[name]
        return np.array(memory[offset : offset + count])

    def fill_kv(self, positions: int) -> None:
        rng = np.random.default_rng(2)
        for head in self._heads():
            head[:] = pack_kv(self.plan, self.plan.target, *rng.uniform(-1, 1, (2, 320, 32)).astype(np.float32))

    def run(self, request: Request) -> Result:
        self.launches += 1
        s = self.plan.spec
        past = None
        if request.start:
            both = [unpack_kv(self.plan, self.plan.target, head, request.start) for head in self._heads()]
            layers = [both[i : i + s.kv_heads] for i in range(0, len(both), s.kv_heads)]
            past = [(np.stack([k for k, _ in layer]), np.stack([v for _, v in layer])) for layer in layers]
        exact, cache = self.reference.forward(request.prompt, past)
        pairs = [(k, v) for keys, values in cache for k, v in zip(keys, values, strict=True)]
        for head, (k, v) in zip(self._heads(), pairs, strict=True):
            packed = pack_kv(self.plan, self.plan.target, *self.spoil_cache(k, v))
            head[: len(packed)] = packed
        logits = self.spoil(request, exact, self.launches)
        token = int(logits[-1].argmax()) ^ self.wrong_token
        return Result([token] * request.max_new, logits if request.logits else None, 1.0 + self.launches % 3)

    def samples(self, request: Request, n: int) -> Iterator[tuple[int, int]]:
        """Sample i takes, of each position's tokens, the one that lies seed + i after the best."""
        self.launches += 1
        self.of_samples = np.empty((request.max_new, n, self.plan.spec.vocab), np.float32)
        for i in range(n):
            tokens = list(request.prompt)
            for step in range(request.max_new):
                logits = self.spoil(request, self.reference.logits(tuple(tokens))[-1:], self.launches)
                self.of_samples[step, i] = logits[0]
                tokens.append((int(logits.argmax()) + (request.sampling.seed or 0) + i) % self.plan.spec.vocab)
                yield i, tokens[-1]
        self.last_timing = 1.0

    def sample_logits(self, n: int, max_new: int) -> Any:
        return self.of_samples

    def read_bandwidth(self) -> float:
        return self.bandwidths.pop(0)

    def _heads(self) -> Iterator[Any]:
        count = self.plan.spec.layers * self.plan.spec.kv_heads
        yield from self.kv.reshape(count, -1, self.plan.chunk_bytes)


def make_runtime(target: str = "cpu", spec: ModelSpec = SPEC, kv_dtype: str = "bf16") -> Any:
    profile = load_profile({"cuda": "h200-sxm", "cpu": "cpu-avx2"}[target])
    return NumpyRuntime(make_plan(spec, profile, Options(blocks=3, kv_dtype=kv_dtype)))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = make_runtime()

    class Opened:
        runtime = made

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(bench, "load", lambda path, device, sampling: Opened())
    return made


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("window", [None, 40])
def test_the_model_itself_passes(target: str, window: int | None) -> None:
    spec = dataclasses.replace(SPEC, sliding_window=window, family="mistral" if window else "llama")
    found = compare(make_runtime(target, spec), (0, 5, 200))
    assert found.problems == []
    passes = [(0, 1, True)] if target == "cuda" else []
    places = [(d.depth, d.positions, d.in_passes) for d in found.depths]
    assert places == [(0, 16, False), *passes, (5, 1, False), (200, 1, False)]
    # Only a cache that a prompt wrote is rounded.
    assert all(d.relative_error < (5e-3 if d.in_passes else 1e-5) for d in found.depths)
    assert sum(d.decided for d in found.depths) >= 15


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_an_fp8_cache_is_compared_as_stored_and_its_cost_is_told(target: str) -> None:
    """Logits must be those of the stored keys and values to FP32's precision, though far from FP32's own."""
    found = compare(make_runtime(target, kv_dtype="fp8"), (0, 5, 200))
    assert found.problems == []
    assert all(d.relative_error < 1e-5 for d in found.depths)
    assert all(d.stored_error is not None and 1e-3 < d.stored_error < 2**-4 for d in found.depths)
    assert found.cache_error is not None
    assert 2e-3 < found.cache_error < 0.3
    assert [d.cache_error is None for d in found.depths if d.depth] == [True, True]
    assert found.to_json()["cache_error"] == found.cache_error
    assert f"costs a relative logit error of {found.cache_error:.1e}" in found.summary()
    assert compare(make_runtime(target)).cache_error is None


def test_a_wrong_vector_in_an_fp8_cache_is_found() -> None:
    """One value of one head with the exponent of its neighbour: logits over the cache as stored do not show it."""
    runtime = make_runtime("cuda", kv_dtype="fp8")

    def spoil(keys: NDArray[np.float32], values: NDArray[np.float32]) -> Any:
        values = values.copy()
        values[3] *= 2
        return keys, values

    runtime.spoil_cache = spoil
    assert any("a stored key or value is off by 1.0" in problem for problem in compare(runtime).problems)


def test_samples_are_compared() -> None:
    found = compare(make_runtime("cuda"), samples=(2, 5))
    assert found.problems == []
    assert [(d.samples, d.positions) for d in found.depths if d.samples] == [(2, 4), (5, 4)]


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        (lambda request, launch: request.sampling.seed is not None, "of 3 samples: relative logit error"),
        (lambda request, launch: request.sampling.seed == 3, "a sample differs when it is made alone"),
        (lambda request, launch: request.sampling.seed == 1 and launch % 2, "two runs of the same launch differ"),
    ],
)
def test_wrong_samples_are_noticed(spoilt: Any, problem: str) -> None:
    runtime = make_runtime("cuda")
    runtime.spoil = error_of(0.05, spoilt)
    assert [p for p in compare(runtime, samples=(3,)).problems if problem in p]


def test_samples_are_timed_beside_one_stream(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "plan", make_runtime("cuda").plan)
    speeds = run_bench("unused", 4, (0,), samples=(2, 5))["tests"]
    assert [speed["test"].split(" (")[0] for speed in speeds] == ["tg4", "tg4 x2", "tg4 x5"]
    assert speeds[2]["tokens_per_second"] == pytest.approx(5 * 4 / 1e-3)
    assert speeds[2]["bytes_per_token"] < speeds[0]["bytes_per_token"] / 4


def test_what_passes_leave_in_the_cache_is_compared() -> None:
    runtime = make_runtime("cuda")
    runtime.spoil = error_of(0.05, lambda request, launch: request.start == 15)
    assert [p for p in compare(runtime).problems if "depth 0 after passes" in p]


def error_of(size: float, only: Callable[[Request, int], bool]) -> Spoil:
    def spoil(request: Request, logits: NDArray[np.float32], launch: int) -> NDArray[np.float32]:
        if not only(request, launch):
            return logits
        noise = np.random.default_rng(3).normal(0, 1, logits.shape).astype(np.float32)
        scale = np.linalg.norm(logits, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        return np.asarray(logits + size * scale * noise, np.float32)

    return spoil


def nan(request: Request, logits: NDArray[np.float32], launch: int) -> NDArray[np.float32]:
    out: NDArray[np.float32] = logits.copy()
    out[-1, 3] = np.nan
    return out


def one_bit(request: Request, logits: NDArray[np.float32], launch: int) -> NDArray[np.float32]:
    out: NDArray[np.float32] = logits.copy()
    out[0, 0] = np.nextafter(out[0, 0], np.float32(9)) if launch == 2 else out[0, 0]
    return out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (error_of(0.02, lambda request, launch: request.start == 0), "depth 0: relative logit error 2.0.e-02"),
        (error_of(0.06, lambda request, launch: request.start > 0), "depth 200: relative logit error 6.0.e-02"),
        (nan, "depth 0: relative logit error nan"),
        (one_bit, "two runs of the same launch differ"),
        (lambda request, logits, launch: logits[:, ::-1].copy(), "clear greedy tokens differ|relative logit error"),
    ],
)
def test_wrong_logits_fail(runtime: Any, capsys: pytest.CaptureFixture[str], spoil: Spoil, message: str) -> None:
    runtime.spoil = spoil
    with pytest.raises(KogcError, match=message) as caught:
        run_bench("unused", 4, (0, 200))
    assert "no speed is given" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_token_that_is_not_the_best_fails(runtime: Any) -> None:
    runtime.wrong_token = True
    with pytest.raises(KogcError, match="a generated token is not the best of its own logits"):
        run_bench("unused", 4)


def test_rounding_of_activations_is_admitted_and_not_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model amplifies rounding beyond the fixed limit, twice the reference's own rounding error is."""
    monkeypatch.setitem(LIMITS, "bf16", 1e-6)
    runtime = make_runtime()
    runtime.reference = RoundedReference(SPEC, runtime.reference.weights)
    found = compare(runtime, (0, 200))
    assert found.problems == []
    assert all(d.limit == pytest.approx(2 * d.relative_error) for d in found.depths)
    worst = max(d.limit for d in found.depths)
    runtime.spoil = error_of(1.1 * worst, lambda request, launch: True)
    assert len(compare(runtime, (0, 200)).problems) == 2


def test_limits_are_tighter_for_more_bits() -> None:
    assert LIMITS["fp16"] < LIMITS["bf16"]


@pytest.mark.parametrize("slowed", [0, 1])
def test_figures_follow_from_times_and_bytes(runtime: Any, capsys: pytest.CaptureFixture[str], slowed: int) -> None:
    runtime.bandwidths[slowed] = 0.7e9  # by a neighbour, before or after the runs: the ceiling is the other one
    result = run_bench("unused", 4, (0, 200), repeat=3)
    plan = runtime.plan
    for test, depth in zip(result["tests"], (0, 200), strict=True):
        # The toy launches take 1, 2 and 3 ms in turn, so three repeats have the median 4 tokens / 2 ms.
        assert test["tokens_per_second"] == pytest.approx(2000)
        # Position p reads p earlier positions: keys and values, in BF16, of two layers with two heads of 32.
        kv = (depth + 1.5) * 2 * 2 * 32 * 2 * 2
        assert test["bytes_per_token"] == pytest.approx(plan.weight_bytes + kv)
        assert test["bytes_per_second"] == pytest.approx(2000 * (plan.weight_bytes + kv))
        assert test["share"] == pytest.approx(test["bytes_per_second"] / 1e9)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert len({len(line) for line in printed[:4]}) == 1
    assert "| tg4 @ d200 |" in printed[3]
    assert "2000.00 ±" in printed[2]
    assert printed[4].startswith("comparison: FP32 reference on the device's own weights")
    assert "16 at depth 0, 1 at depth 200" in printed[4]


def test_prompts_have_a_row_of_their_own(runtime: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench("unused", 4, (0,), repeat=3, prompts=(64, 300))
    assert [test["test"] for test in result["tests"]] == ["tg4", "pp64", "pp300"]
    assert result["tests"][1]["tokens_per_second"] == pytest.approx(64 / 2e-3)
    printed = capsys.readouterr().out.splitlines()
    assert "| pp300" in printed[4]
    assert len({len(line) for line in printed[:5]}) == 1
    with pytest.raises(KogcError, match="a prompt of 320 tokens and one more need 321 positions"):
        run_bench("unused", 4, (0,), prompts=(320,))


def test_json_is_the_callers_to_print(runtime: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench("unused", 4, (0,), json=True)
    assert capsys.readouterr().out == ""
    again = json.loads(json.dumps(result))
    assert again["comparison"]["passed"] is True
    assert again["model"] == "small"


def test_a_depth_beyond_the_context_is_refused(runtime: Any) -> None:
    with pytest.raises(KogcError, match="depth 300 and 20 tokens need 321 positions, the artifact has 320"):
        run_bench("unused", 20, (0, 300))
    assert runtime.launches == 0


@pytest.mark.parametrize(
    "arguments", [{"n": 0}, {"depths": ()}, {"depths": (-1,)}, {"repeat": 0}, {"prompts": (64, 0)}, {"samples": (17,)}]
)
def test_senseless_arguments_are_refused(runtime: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run_bench("unused", **arguments)


def test_too_few_tokens_fail(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = runtime.run

    def run(request: Request) -> Result:
        result: Result = honest(request)
        return result if request.logits else Result(result.tokens[:-1], None, result.milliseconds)

    monkeypatch.setattr(runtime, "run", run)
    with pytest.raises(KogcError, match="the kernel made 3 of 4 tokens"):
        run_bench(Path("unused"), 4)
