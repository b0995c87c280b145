"""Several continuations of a prompt from a session, over the toy kernel: together on a GPU, one by one on a CPU."""

from __future__ import annotations

import pytest
from toy_kernel import continuation
from toy_session import CONTEXT, VOCAB, Letters, Machine

from kogc.errors import KogcError
from kogc.runtime import Request
from kogc.runtime.samples import making_samples
from kogc.sampling import Sampling
from kogc.session import Session

TOP = (1 << 64) - 1

# Where samples are made together; elsewhere it is one stream after the other.
TOGETHER = pytest.mark.parametrize("machine", ["cuda"], indirect=True)


def test_each_is_a_continuation_of_the_prompt(toy: Session, machine: Machine) -> None:
    made = toy.generate_many([5, 6, 7], 3, 10, stop=())
    assert [one.tokens for one in made] == [continuation([5, 6, 7], 10, VOCAB)] * 3
    assert {(one.finish_reason, one.prompt_tokens) for one in made} == {("length", 3)}
    assert len({one.seconds for one in made}) == 1
    assert len(machine.kernel.launches) == (1 if machine.target == "cuda" else 3)


def test_a_runtime_says_how_many_it_makes_together(machine: Machine, toy: Session) -> None:
    request = Request((5, 6), max_new=2)
    if machine.target == "cpu":
        with pytest.raises(ValueError, match="toy on cpu-avx2 makes samples one after the other"):
            making_samples(toy.runtime)
        return
    for count in (0, 17):
        with pytest.raises(ValueError, match=f"{count} samples: a kernel makes 1 to 16"):
            list(making_samples(toy.runtime).samples(request, count))
    assert not machine.kernel.launches


def test_samples_draw_with_seeds_that_follow_one_another(toy: Session, machine: Machine) -> None:
    launches = machine.kernel.launches
    toy.generate_many([5, 6], 3, 4, sampling=Sampling(seed=TOP - 1))
    assert [launch.seed for launch in launches] == ([TOP - 1] if machine.target == "cuda" else [TOP - 1, TOP, 0])
    launches.clear()
    toy.generate_many([5, 6], 2, 4, sampling=Sampling())
    toy.generate_many([5, 6], 2, 4, sampling=Sampling())
    seeds = [launch.seed for launch in launches]
    assert len(set(seeds)) == len(seeds)
    assert machine.target == "cuda" or (seeds[1] - seeds[0]) % (TOP + 1) == 1


def test_a_prompt_that_is_known_is_not_run_again(toy: Session, machine: Machine) -> None:
    toy.generate([5, 6, 7, 8], 3, stop=())
    prompt = [5, 6, 7, 8, 50]
    made = toy.generate_many(prompt, 2, 3, stop=())
    assert made[0].cached_tokens == (3 if machine.target == "cuda" else 4)
    again = toy.generate_many(prompt, 2, 3, stop=())
    assert [one.tokens for one in again] == [one.tokens for one in made] == [continuation(prompt, 3, VOCAB)] * 2
    assert again[0].cached_tokens == 4


def test_log_probabilities_are_each_samples_own(toy: Session, machine: Machine) -> None:
    machine.kernel.diverge = True
    for one in toy.generate_many([5, 6], 3, 4, stop=(), sampling=Sampling(seed=1, logprobs=2)):
        assert [record.top[0][0] for record in one.logprobs] == one.tokens


def test_a_stop_token_ends_a_sample(toy: Session) -> None:
    whole = continuation([5, 6], 10, VOCAB)
    for one in toy.generate_many([5, 6], 2, 10, stop=[whole[3]]):
        assert (one.tokens, one.finish_reason) == (whole[:4], "stop")


def test_the_context_ends_samples(toy: Session) -> None:
    for one in toy.generate_many([5] * (CONTEXT - 4), 2, 10, stop=()):
        assert (len(one.tokens), one.finish_reason) == (4, "context")


@TOGETHER
def test_a_stop_string_ends_its_sample_alone(toy: Session, machine: Machine) -> None:
    machine.kernel.diverge = True
    free = toy.generate_many([5, 6], 3, 30, stop=())
    machine.kernel.delay = 0.005
    toy.tokenizer = Letters()  # type: ignore[assignment]
    others = {*free[0].tokens, *free[2].tokens}
    number = next(k for k, token in enumerate(free[1].tokens) if token % 2 == 0 and token not in others)
    made = toy.generate_many([5, 6], 3, 30, stop=(), stop_strings=[f"<{free[1].tokens[number]}>"])
    assert made[1].tokens == free[1].tokens[: number + 1]
    assert [one.finish_reason for one in made] == ["length", "stop", "length"]
    assert [one.tokens for one in (made[0], made[2])] == [one.tokens for one in (free[0], free[2])]
    assert f"<{free[1].tokens[number]}>" not in made[1].text


@pytest.mark.parametrize("n", [0, 17, -1])
def test_other_numbers_of_samples_are_refused(toy: Session, n: int) -> None:
    with pytest.raises(KogcError, match=f"n: {n} is not from 1 to 16"):
        toy.generate_many([5], n)


@TOGETHER
def test_samples_that_memory_does_not_hold_are_refused(toy: Session, machine: Machine) -> None:
    machine.driver.memory = 256 << 20
    with pytest.raises(KogcError, match="16 samples of 40 tokens need .* GB of GPU memory more; .* are free"):
        toy.generate_many([5], 16, 40)
    machine.driver.memory = 150 << 30
    assert len(toy.generate_many([5], 16, 40)) == 16


def test_buffers_of_samples_are_given_back(toy: Session, machine: Machine) -> None:
    for n in (2, 16, 3):
        toy.generate_many([5, 6], n, 20, sampling=Sampling(seed=1, logprobs=1))
    toy.close()
    assert not machine.driver.live
