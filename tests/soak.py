"""Many generations in a row on one session: `python tests/soak.py ARTIFACT [COUNT]`. Not run by pytest.

Random prompts (half of them continue the last one), lengths, sampling options and early ends; a part of them is
repeated from a cold cache and must give the same tokens. At the end the memory of the process, and of the GPU, must be
what it was after the first hundred.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from pathlib import Path

import kogc
from kogc.sampling import GREEDY, Sampling
from kogc.session import Session

WARM = 100  # generations before memory is looked at
REPEATED = 20  # one in so many is repeated from a cold cache
SLACK = 8 << 20  # bytes that the process may have grown by


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def gpu_memory_used(session: Session) -> int:
    """Bytes, of the whole device; 0 on a CPU."""
    if session.plan.target != "cuda":
        return 0
    from cuda.bindings import driver

    status, free, total = driver.cuMemGetInfo()
    assert status == driver.CUresult.CUDA_SUCCESS
    return int(total) - int(free)


def options(rng: random.Random) -> Sampling:
    if rng.random() < 0.3:
        return GREEDY
    return Sampling(
        temperature=rng.choice((0.0, 0.5, 1.0, 1.7)),
        top_k=rng.choice((0, 1, 5, 40)),
        top_p=rng.choice((1.0, 0.9, 0.5)),
        min_p=rng.choice((0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.5)),
        seed=rng.randrange(1 << 40),
        logprobs=rng.choice((None, None, 0, 5)),
    )


def one(session: Session, rng: random.Random, last: list[int]) -> list[int]:
    """A generation; the tokens that the next prompt may continue."""
    vocab, limit = session.spec.vocab, min(session.max_context, 200)
    start = last[: rng.randrange(len(last))] if last and rng.random() < 0.5 else []
    prompt = start + [rng.randrange(vocab) for _ in range(rng.randrange(1, 12))]
    prompt = prompt[-limit // 2 :]
    count, sampling = rng.randrange(1, 40), options(rng)
    close_after = rng.randrange(count) if rng.random() < 0.3 else count
    with session.stream(prompt, count, stop=(), sampling=sampling) as stream:
        for _ in stream:
            if len(stream.tokens) > close_after:
                break
    made = list(stream.tokens)
    assert len(made) == min(count, close_after + 1), f"{len(made)} tokens of {count}, closed after {close_after + 1}"
    if sampling.logprobs is not None:
        assert len(stream.logprobs) == len(made)
    if rng.randrange(REPEATED) == 0:
        session.reset()
        again = session.generate(prompt, len(made), stop=(), sampling=sampling).tokens
        assert again == made, f"{again} from a cold cache, {made} before"
    return prompt + made


def main(artifact: str, count: int = 10_000) -> None:
    rng, last, began, first = random.Random(0), [], time.monotonic(), (0, 0)
    with kogc.load(artifact) as session:
        for i in range(count):
            last = one(session, rng, last)
            if i == min(WARM, count - 1):
                first = resident(), gpu_memory_used(session)
        grown, grown_there = resident() - first[0], gpu_memory_used(session) - first[1]
    print(f"{count} generations in {time.monotonic() - began:.0f} s; the process grew by {grown / 1e6:.1f} MB", end="")
    print(f", what the GPU holds by {grown_there / 1e6:.1f} MB")
    assert grown <= SLACK, f"{grown} bytes more in memory than after {WARM} generations"
    assert grown_there <= SLACK, f"{grown_there} bytes more of the GPU's memory than after {WARM} generations"


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
