"""What a kernel leaves behind, and how its warps end together, on the emulated machine."""

from __future__ import annotations

import numpy as np
import pytest
from emulated_cases import CASES, SMALL, TINY, Case, planned, prompt
from emulator import Emulated, EmulatorError, Patch

NOT_A_NUMBER = {"bf16": 0x7F80, "fp16": 0x7C00}  # infinity
BAD = 11  # a token whose embedding holds it

CASES["ends"] = Case("llama", 2, SMALL, stages=3)
CASES["async-ends"] = Case("llama", 2, SMALL, stages=3, arch="sm_80")
CASES["meetings"] = Case("llama", 4, TINY, stages=6)


def all_of(*changes: tuple[str, str, str]) -> Patch:
    """A patch that makes several changes, each of which must find its text."""

    def patch(headers: dict[str, str]) -> dict[str, str]:
        for file, old, new in changes:
            assert old in headers[file], f"{file} has changed: {old}"
            headers[file] = headers[file].replace(old, new)
        return headers

    return patch


@pytest.mark.parametrize("name", ["llama", "fp16", "async", "fp8"])
def test_numbers_that_are_none_end_with_their_text(name: str) -> None:
    """The next text is a cold start, though the cache behind its last position still holds what they have left."""
    plan, checkpoint = planned(name)
    model = Emulated(plan, checkpoint)
    rows = model.buffers["embedding"].bytes.view(np.uint16).reshape(plan.spec.vocab, -1)
    rows[BAD, 0] = NOT_A_NUMBER[plan.spec.dtype]
    good = [5, 9, 2]
    cold = model.logits(good)
    assert np.isfinite(cold).all()
    assert not np.isfinite(model.logits([*good, 30, BAD, 7, 8])).all()
    np.testing.assert_array_equal(model.logits(good), cold)


def test_a_pass_does_not_see_what_a_text_has_left() -> None:
    """Columns of a tile of queries, three a token, end on both sides of a tile of the cache that is not full."""
    model = Emulated(*planned("llama"))
    tokens, cache = prompt(model.plan.spec.vocab, 25), model.buffers["kv"].bytes
    logits = []
    for left in (0, 0x7E):  # in every byte: large numbers, and finite ones
        cache[:] = left
        model.prompt(tokens[:5])
        model.prompt(tokens[5:-1], start=5)
        logits.append(model.logits(tokens[-1:], start=len(tokens) - 1))
    np.testing.assert_array_equal(logits[1], logits[0])


def stalls(model: Emulated, launch: str, orders: int) -> int:
    """In how many orders of threads a launch that ends early does not come to its end."""
    tokens, count = prompt(model.plan.spec.vocab, 2), 0
    for order in range(1, orders + 1):
        try:
            if launch == "generate":
                model.generate(tokens, 40, stop=range(16), seed=order)
            else:
                assert model.plan.passes
                model.prompt(tokens[:1] * (model.plan.passes.tokens + 2), seed=order)
        except EmulatorError:
            count += 1
    return count


# A warp that copies is held up where it has seen no room for more, until the others have gone on.
HELD = "if (warp() == PRODUCER + 1) for (int i = 0; i < 3000; i++) emulated::yield();\n"
STREAM = ("cuda/stream.cuh", "return agreed(barrier_test(empty, parity));  // what", "return false;  // what")
STREAM_HELD = (
    "cuda/stream.cuh",
    "      if (agreed(words<P>().finished)) return",
    HELD + "      if (agreed(words<P>().finished)) return",
)
PASS = ("cuda/pass_stream.cuh", "finished) && !room()) break;", "finished)) break;")
PASS_HELD = (
    "cuda/pass_stream.cuh",
    "      if (all_lanes(pass_words<P>().finished)",
    HELD + "      if (all_lanes(pass_words<P>().finished)",
)
STOPPED = ("cuda/pass.cuh", "load_host(args_.stop_word)", "(first() > 0)")  # by the host, at the second pass


@pytest.mark.parametrize(
    ("case", "launch", "held", "bug"),
    [
        ("async-ends", "generate", (STREAM_HELD,), STREAM),
        ("async-ends", "prompt", (PASS_HELD, STOPPED), PASS),
        ("ends", "prompt", (PASS_HELD, STOPPED), PASS),
    ],
    ids=["generate", "prompt before Hopper", "prompt"],
)
def test_copying_warps_end_at_one_stage(
    case: str, launch: str, held: tuple[tuple[str, str, str], ...], bug: tuple[str, str, str]
) -> None:
    plan, checkpoint = planned(case)
    assert stalls(Emulated(plan, checkpoint, all_of(*held)), launch, 12) == 0
    assert stalls(Emulated(plan, checkpoint, all_of(bug, *held)), launch, 12) > 0


def from_count(start: int, compared: str) -> Patch:
    """The kernel of samples as if its blocks had met so often before; how the count is compared."""
    count, shifted = "RELEASED ? load_acquired(count) : load_word(count)", f"{start}u * blocks"
    words, turn = "words.finished = words.met = words.passed = 0;", "return step * of_step(args) + 1 +"
    return all_of(
        ("cuda/samples.cuh", words, f"words.finished = 0; words.met = words.passed = {start};"),
        ("cuda/sample_layout.cuh", turn, turn.replace("return", f"return {start}u +")),
        (
            "cuda/pass_layout.cuh",
            f"(i32)(({count}) - needed) >= 0",
            compared.replace("COUNT", f"(({count}) + {shifted})"),
        ),
    )


def test_the_count_of_meetings_may_pass_its_end() -> None:
    plan, checkpoint = planned("meetings")
    near_the_end = (1 << 30) - 10  # times four blocks
    sound = Emulated(plan, checkpoint, from_count(near_the_end, "(i32)(COUNT - needed) >= 0"), samples=True)
    broken = Emulated(plan, checkpoint, from_count(near_the_end, "COUNT >= needed"), samples=True)
    expected = Emulated(plan, checkpoint, samples=True).samples(7, 3, 4).tokens
    wrong = 0
    for order in range(1, 9):
        assert sound.samples(7, 3, 4, seed=order).tokens == expected
        try:
            wrong += broken.samples(7, 3, 4, seed=order).tokens != expected
        except EmulatorError:
            wrong += 1
    assert wrong
