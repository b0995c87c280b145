"""Random models, plans and texts on the emulated GPUs and the CPU: `python tests/fuzz.py SEED [COUNT] [FLAG...]`.

Not run by pytest, whose cases are fixed. A case follows from its seed, and is printed before it runs; it takes some ten
seconds. FLAGs go to the compiler of the emulated kernels, as `-fsanitize=undefined`. The exit status is 1 where a case
went wrong.
"""

from __future__ import annotations

import random
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import random_checkpoint as rc
import torch
from emulated_cases import error
from emulator import Emulated
from fp8_cache import over_cache
from fuzz_cases import CPUS, Case, drawn, planned, sampling_of
from sampling_reference import choice, processed
from test_cpu_numerics import make_program

from kogc.errors import KogcError
from kogc.plan.check import check
from kogc.plan.plan import Plan
from kogc.runtime import Request, open_runtime
from kogc.sampling import GREEDY, SEEDS, Sampling


def same(a: Any, b: Any, what: str) -> None:
    assert np.array_equal(np.asarray(a), np.asarray(b)), f"{what} differ"


def exact(got: np.ndarray, plan: Plan, checkpoint: Path, text: list[int], cache: np.ndarray | None) -> None:
    """Logits of the last positions are no further from FP32 than Transformers in BF16 is; over the cache, if given."""
    full, half = (rc.reference_logits(checkpoint, text, t)[-len(got) :] for t in (torch.float32, torch.bfloat16))
    ours = full if cache is None else over_cache(plan, checkpoint, text, cache)[-len(got) :]
    assert error(got, ours) <= error(half, full), (
        f"{len(got)} rows are off by {error(got, ours)}, not {error(half, full)}"
    )


def chosen(logits: np.ndarray, made: list[int], text: list[int], start: int, s: Sampling, logprobs: list[Any]) -> None:
    """Each token is what Transformers' processors and the seed's noise choose from the kernel's own logits."""
    of_all = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
    for i, token in enumerate(made):
        scores = processed(logits[i], s, text, made[:i])
        best, lead = choice(scores, s, start + len(text) - 1 + i)
        assert token == best or (lead < 1e-3 and np.isfinite(scores[token])), f"{token}, not {best}, {lead} ahead: {s}"
    assert len(logprobs) == (0 if s.logprobs is None else len(made))
    for row, token, got in zip(of_all, made, logprobs, strict=False):
        assert abs(got.chosen - row[token]) < 2e-5
        assert len(got.top) == min(s.logprobs or 0, len(row))
        assert np.allclose([p for _, p in got.top], np.sort(row)[::-1][: len(got.top)], atol=2e-5)


def on_gpu(case: Case, checkpoint: Path, rng: random.Random) -> None:
    plan = planned(case, checkpoint)
    model = Emulated(plan, checkpoint, samples=plan.samples is not None)
    text, cache = [rng.randrange(plan.spec.vocab) for _ in range(case.tokens)], model.buffers["kv"].bytes
    cache[:] = left = rng.choice((0, 0x7E))  # by an earlier text: any finite numbers
    cut = rng.randrange(len(text))
    steps(model, checkpoint, text, cut, rng)
    after_steps = cache.copy()
    if plan.passes and len(text) > 1:
        passes(model, checkpoint, text, cut, left, rng)
    cache[:] = after_steps
    start = rng.randrange(max(0, len(text) - 12), len(text))
    room = min(plan.max_context - len(text), rng.choice((1, 2, 5)))
    for sampling in (GREEDY, sampling_of(rng, plan.spec.vocab)) if room else ():
        generations(model, text, start, room, sampling, rng)
        if plan.samples:
            samples(model, checkpoint, text, start, room, sampling, rng)


def order(rng: random.Random) -> int:
    """Seed of an order of threads."""
    return rng.randrange(1, 999)


def cache_of(model: Emulated) -> np.ndarray | None:
    """An FP8 cache, over which logits are compared."""
    return model.buffers["kv"].bytes if model.plan.kv_dtype == "fp8" else None


def steps(model: Emulated, checkpoint: Path, text: list[int], cut: int, rng: random.Random) -> None:
    """Token by token, in one launch and in two."""
    whole = model.logits(text, order(rng))
    exact(whole, model.plan, checkpoint, text, cache_of(model))
    if cut:
        model.generate(text[:cut], 0, seed=order(rng))
    same(model.logits(text[cut:], order(rng), cut), whole[cut:], "logits of two launches")


def passes(model: Emulated, checkpoint: Path, text: list[int], cut: int, left: int, rng: random.Random) -> None:
    """In passes, in one launch and in two."""
    at, cache = len(text) - 1, model.buffers["kv"].bytes
    cache[:] = left
    model.prompt(text[:at], order(rng))
    in_one = cache.copy()
    exact(model.logits(text[at:], start=at), model.plan, checkpoint, text, cache_of(model))
    cache[:] = left
    for first, end in ((0, cut), (cut, at)):
        if first < end:
            model.prompt(text[first:end], order(rng), first)
    same(cache, in_one, "caches of passes cut elsewhere")


def generations(
    model: Emulated, text: list[int], start: int, room: int, sampling: Sampling, rng: random.Random
) -> None:
    """Tokens are the right ones, and a stop token and the host end them."""
    text = text[start:]
    made = model.generate(text, room, seed=order(rng), start=start, sampling=sampling)
    logprobs, model.logprobs = model.logprobs, []
    rows = model.logits(text + made[:-1], start=start)[len(text) - 1 :]
    chosen(rows, made, text, start, sampling, logprobs)
    stop = rng.choice(made)
    ended = model.generate(text, room, [model.plan.spec.vocab, stop], start=start, sampling=sampling)
    same(ended, made[: made.index(stop) + 1], "stopped tokens")
    same(model.generate(text, room, start=start, halt=True, sampling=sampling), made[:1], "halted tokens")


def samples(
    model: Emulated, checkpoint: Path, text: list[int], start: int, room: int, s: Sampling, rng: random.Random
) -> None:
    """Each of several samples is as it is alone, whichever of them end early."""
    last, n = len(text) - 1, rng.choice((1, 2, 5, 8, 9, 16))
    fixed: dict[str, Any] = {"start": last, "history": text[start:-1]}
    many, one = model.samples(text[-1], n, room, seed=order(rng), sampling=s, **fixed), rng.randrange(n)
    own = s if s.greedy else replace(s, seed=((s.seed or 0) + one) % SEEDS)
    chosen(many.logits[one], many.tokens[one], text[start:], start, own, many.logprobs[one])
    alone = model.samples(text[-1], 1, room, sampling=own, **fixed)
    same([*many.tokens[one], *many.logits[one].flat], [*alone.tokens[0], *alone.logits[0].flat], "a sample alone")
    if model.plan.kv_dtype == "bf16":
        exact(many.logits[one], model.plan, checkpoint, text + many.tokens[one][:-1], None)
    stop, halt = rng.choice(many.tokens[one]), rng.sample(range(n), rng.randrange(n + 1))
    ended = model.samples(text[-1], n, room, [stop], sampling=s, halt=halt, **fixed).tokens
    for i, (free, row) in enumerate(zip(many.tokens, ended, strict=True)):
        end = 0 if i in halt else free.index(stop) if stop in free else room
        same(row, free[: end + 1], f"tokens of sample {i} that ends early")


def on_cpu(case: Case, checkpoint: Path, rng: random.Random) -> None:
    program = make_program(checkpoint, case.machine, case.blocks, checkpoint, case.kv_dtype)
    check(program.plan)
    with open_runtime(program, oversubscribe=True) as runtime:
        plan, text = runtime.plan, [rng.randrange(runtime.plan.spec.vocab) for _ in range(case.tokens)]

        def logits(tokens: list[int], start: int = 0) -> np.ndarray:
            return np.array(runtime.run(Request(tuple(tokens), start, logits=True)).logits)

        whole, cut = logits(text), rng.randrange(1, len(text) + 1)
        over = runtime.download("kv", 0, plan.kv_bytes) if case.kv_dtype == "fp8" else None
        exact(whole, plan, checkpoint, text, over)
        same(np.concatenate([logits([t], i) for i, t in enumerate(text)]), whole, "logits token by token")
        runtime.run(Request(tuple(text[:cut])))
        if cut < len(text):
            same(logits(text[cut:], cut), whole[cut:], "logits after a pass")
        room = min(plan.max_context - len(text), 6)
        for s in (GREEDY, sampling_of(rng, plan.spec.vocab), sampling_of(rng, plan.spec.vocab)) if room else ():
            result = runtime.run(Request(tuple(text), max_new=room, sampling=s))
            rows = logits(text + result.tokens[:-1])[len(text) - 1 :]
            chosen(rows, result.tokens, text, 0, s, result.logprobs)
            stop = rng.choice(result.tokens)
            again = runtime.run(Request(tuple(text), max_new=room, sampling=s, stop=(stop,))).tokens
            same(again, result.tokens[: result.tokens.index(stop) + 1], "stopped tokens")


def right(seed: int) -> bool:
    """Whether a case passes, or is refused in a line, as where this CPU lacks the instructions."""
    case = drawn(seed)
    print(f"{seed}: {case}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            checkpoint = rc.make(Path(folder), case.family, **case.overrides)
            (on_cpu if case.machine in CPUS else on_gpu)(case, checkpoint, random.Random(seed))
        except KogcError as refusal:
            print(f"  refused: {refusal}")
        except Exception:
            traceback.print_exc(file=sys.stdout)
            return False
    return True


def main(first: int, count: int = 1, *flags: str) -> None:
    emulator.FLAGS = (*emulator.FLAGS, *flags)
    wrong = [seed for seed in range(first, first + count) if not right(seed)]
    print(f"{count} cases, wrong: {wrong or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
