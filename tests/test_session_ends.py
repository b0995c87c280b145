"""How launches end: interrupts, closing under a launch or from another thread, a fork. On toys of both targets."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
from toy_kernel import continuation
from toy_session import VOCAB, Machine

from kogc.build import BuildOptions, build
from kogc.errors import KogcError
from kogc.sampling import Sampling
from kogc.session import Session
from kogc.targets.detect import detect_cpu_profile


def interrupted_once(call: Callable[[], None]) -> Callable[[], None]:
    """`call`, into whose first use an interrupt comes."""
    interrupts = [KeyboardInterrupt()]

    def wrapped() -> None:
        if interrupts:
            raise interrupts.pop()
        call()

    return wrapped


def test_an_interrupt_is_raised_after_the_kernel_has_ended(
    machine: Machine, toy: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.kernel.delay = 0.01
    stream = toy.stream([5], 60, stop=())
    next(stream)
    runtime = toy.runtime
    monkeypatch.setattr(runtime, "_wait", interrupted_once(runtime._wait))
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    assert machine.kernel.launches[-1].made < 60, "it was told to stop"
    machine.kernel.delay = 0.0
    assert toy.generate([6], 7, stop=()).tokens == continuation([6], 7, VOCAB)


def test_what_an_interrupt_has_left_running_is_ended_first(machine: Machine, toy: Session) -> None:
    machine.kernel.delay = 0.01
    stream = toy.stream([5], 60, stop=())
    next(stream)
    runtime = toy.runtime
    runtime._lock.release()  # as if the interrupt had come between the end of the wait and the lock
    with runtime._taken():
        assert machine.kernel.launches[-1].made < 60
        assert not runtime._running
    runtime._lock.acquire()
    stream.close()


def test_closing_a_session_ends_the_kernel_first(machine: Machine, toy: Session) -> None:
    machine.kernel.delay = 0.01
    stream = toy.stream([5], 60, stop=())
    next(stream)
    toy.close()
    assert 1 <= machine.kernel.launches[-1].made < 60
    if machine.target == "cuda":
        assert not machine.driver.live
    with pytest.raises(KogcError, match="closed"):
        next(stream)
    stream.close()


def test_closing_a_session_from_another_thread(machine: Machine, toy: Session) -> None:
    machine.kernel.delay = 0.001
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            while True:
                toy.reset()
                toy.generate([5], 20, stop=(), sampling=Sampling(seed=1, logprobs=1))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.1)
    toy.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["this session is closed"]


def test_a_launch_that_cannot_begin(machine: Machine, toy: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    expected = RuntimeError if machine.target == "cuda" else KogcError  # of the toy's driver, not of kogc
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(expected, match="can't start new thread"):
            toy.generate([5], 3, stop=())
    assert toy.generate([5], 3, stop=()).tokens == continuation([5], 3, VOCAB)
    toy.close()


def test_a_stream_says_how_it_ended(machine: Machine, toy: Session) -> None:
    first = toy.stream([5], 60, stop=())
    next(first)
    second = toy.stream([6], 3)
    for _ in range(2):  # not an empty continuation the second time
        with pytest.raises(KogcError, match="already generating"):
            next(second)
    first.close()
    assert (first.finish_reason, second.finish_reason) == ("closed", "closed")
    assert toy.stream([5], 3, stop=()).finish().finish_reason == "length"


@pytest.mark.parametrize("machine", ["cuda"], indirect=True)
def test_buffers_that_grow_replace_each_other(machine: Machine, toy: Session) -> None:
    toy.logits([5, 6])
    toy.generate([5], 2, sampling=Sampling(seed=1, logprobs=1))
    buffers = len(machine.driver.live)
    for n in range(3, 9):
        toy.logits(range(5, 5 + n))
        toy.generate([5], n, sampling=Sampling(seed=1, logprobs=1))
    assert len(machine.driver.live) == buffers


FORKED = """
import os, sys, kogc
with kogc.load(sys.argv[1]) as session:
    expected = session.generate([5, 6], 40, stop=()).tokens
    child = os.fork()
    good = True
    for _ in range(5):
        session.reset()
        good = good and session.generate([5, 6], 40, stop=()).tokens == expected
    if child == 0:
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child"
    assert good, "the parent"
"""


def test_after_a_fork_both_processes_generate(tmp_path: Path) -> None:
    checkpoint = random_checkpoint.make(tmp_path, "llama")
    build(str(checkpoint), detect_cpu_profile(), tmp_path / "artifact", BuildOptions(max_context=64))
    done = subprocess.run([sys.executable, "-c", FORKED, tmp_path / "artifact"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
