"""What a session knows of its KV cache: a known beginning is not run again, and nothing false is remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from toy_kernel import continuation
from toy_session import VOCAB, Letters, Machine

from kogc.errors import KogcError
from kogc.runtime import Runtime
from kogc.session import Session


def last_launch(machine: Machine) -> tuple[int, list[int]]:
    """Where the last launch started, and the prompt it was given."""
    launch = machine.kernel.launches[-1]
    return launch.start, launch.prompt


def rest_of(machine: Machine, prompt: list[int], before: int, seen: int) -> tuple[int, list[int]]:
    """What of a prompt must run when it continues one of `before` tokens, of whose continuation `seen` were seen.

    Where prompts go in passes, only what passes leave in the cache is what a cold start would leave there.
    """
    start = before - 1 if machine.target == "cuda" else before + seen - 1
    return start, prompt[start:]


def test_a_common_beginning_is_not_run_again(machine: Machine, toy: Session) -> None:
    made = toy.generate([5, 6, 7], 4, stop=()).tokens
    longer = [5, 6, 7, *made[:2], 50, 51]
    again = toy.generate(longer, 3, stop=())
    expected = rest_of(machine, longer, 3, 3)
    assert last_launch(machine) == expected
    assert again.tokens == continuation(longer, 3, VOCAB)
    assert (again.prompt_tokens, again.cached_tokens) == (7, expected[0])
    assert toy.generate([5, 60], 3, stop=()).tokens == continuation([5, 60], 3, VOCAB)
    assert last_launch(machine) == (1, [60])
    toy.generate([6, 60], 3, stop=())
    assert last_launch(machine) == (0, [6, 60])


def test_the_last_token_made_was_not_run(machine: Machine, toy: Session) -> None:
    made = toy.generate([5, 6], 4, stop=()).tokens
    toy.generate([5, 6, *made, 9], 1, stop=())
    assert last_launch(machine) == rest_of(machine, [5, 6, *made, 9], 2, 4)


def test_a_stop_token_was_not_run(machine: Machine, toy: Session) -> None:
    expected = continuation([5, 6], 4, VOCAB)
    made = toy.generate([5, 6], 30, stop=expected[3:]).tokens
    assert made == expected
    toy.generate([5, 6, *made, 9], 1, stop=())
    assert last_launch(machine) == rest_of(machine, [5, 6, *made, 9], 2, 4)


def test_the_last_token_of_a_prompt_always_runs(machine: Machine, toy: Session) -> None:
    toy.generate([5, 6, 7], 8, stop=())
    for prompt in ([5, 6, 7], [5, 6], [5]):
        made = toy.generate(prompt, 8, stop=())
        assert last_launch(machine) == (len(prompt) - 1, prompt[-1:])
        assert made.tokens == continuation(prompt, 8, VOCAB)


def test_a_closed_stream_leaves_what_was_seen(machine: Machine, toy: Session) -> None:
    machine.kernel.delay = 0.005
    with toy.stream([5, 6], 60, stop=()) as stream:
        seen = [next(stream).token for _ in range(3)]
    machine.kernel.delay = 0.0
    toy.generate([5, 6, *seen, 9], 1, stop=())
    assert last_launch(machine) == rest_of(machine, [5, 6, *seen, 9], 2, 3)


def test_a_stream_that_never_started_changes_nothing(machine: Machine, toy: Session) -> None:
    toy.generate([5, 6, 7], 2, stop=())
    toy.stream([9, 9], 5).close()
    toy.generate([5, 6, 8], 2, stop=())
    assert last_launch(machine) == (2, [8])


def test_a_stream_looks_at_the_cache_when_it_starts(machine: Machine, toy: Session) -> None:
    toy.generate([5, 6, 7], 2, stop=())
    stream = toy.stream([5, 6, 8], 2, stop=())
    toy.generate([9, 6, 8], 2, stop=())
    assert [piece.token for piece in stream] == continuation([5, 6, 8], 2, VOCAB)
    assert (last_launch(machine), stream.cached_tokens) == ((0, [5, 6, 8]), 0)


def test_a_refused_generation_leaves_the_running_one_alone(machine: Machine, toy: Session) -> None:
    stream = toy.stream([5, 6], 3, stop=())
    next(stream)
    for refused in (lambda: toy.generate([5, 6], 3), lambda: toy.logits([5, 6])):
        with pytest.raises(KogcError, match="already generating"):
            refused()
    rest = [piece.token for piece in stream]
    toy.generate([5, 6, *stream.tokens], 1, stop=())
    assert last_launch(machine) == rest_of(machine, [5, 6, *stream.tokens], 2, 3)
    assert stream.tokens[-1:] == rest[-1:]


def test_logits_leave_their_tokens(machine: Machine, toy: Session) -> None:
    toy.generate([5, 6, 7], 8, stop=())
    toy.logits([5, 6, 40, 41])
    assert last_launch(machine) == (0, [5, 6, 40, 41])
    toy.generate([5, 6, 7], 1, stop=())
    # Tokens of a teacher-forced launch went one by one.
    assert last_launch(machine) == ((0, [5, 6, 7]) if machine.target == "cuda" else (2, [7]))
    next(iter(toy.logits_in_parts([5, 6, 40, 41])))
    toy.generate([5, 6], 1, stop=())
    assert last_launch(machine) == (0, [5, 6])  # logits that were not read to their end may not all have been made


@pytest.mark.parametrize("harm", [{"stall": [1, 17, 33, 6, 4, 9, 1, 0]}, {"fail": 3}])
def test_an_error_leaves_nothing(machine: Machine, toy: Session, harm: dict[str, Any]) -> None:
    toy.generate([5, 6, 7], 4, stop=())
    before = vars(machine.kernel).copy()
    vars(machine.kernel).update(harm)
    with pytest.raises(KogcError, match="kernel"):
        toy.generate([5, 6, 7, 8], 4, stop=())
    vars(machine.kernel).update({key: before[key] for key in harm})
    toy.generate([5, 6, 7], 4, stop=())
    assert last_launch(machine) == (0, [5, 6, 7])


def test_an_exception_of_the_reader_leaves_nothing(machine: Machine, runtime: Runtime) -> None:
    class Broken(Letters):
        def push(self, token: int) -> str:
            raise RuntimeError("broken")

    opened = Session(runtime, Broken(), ())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="broken"):
        opened.generate([5, 6, 7])
    opened.tokenizer = None
    opened.generate([5, 6, 7], 1)
    assert last_launch(machine) == (0, [5, 6, 7])


def test_reset_forgets(machine: Machine, toy: Session) -> None:
    def forgets(action: Callable[[], object]) -> None:
        toy.generate([5, 6, 7], 4, stop=())
        action()
        assert toy.generate([5, 6, 7], 4, stop=()).cached_tokens == 0
        assert last_launch(machine) == (0, [5, 6, 7])

    forgets(toy.reset)
    forgets(lambda: toy.runtime)  # whoever has it may write the cache
    stream = toy.stream([5, 6, 7], 4, stop=())
    next(stream)
    toy.reset()
    list(stream)
    toy.generate([5, 6, 7], 4, stop=())
    assert last_launch(machine) == (0, [5, 6, 7])
