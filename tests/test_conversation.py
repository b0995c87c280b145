"""Conversations over a real kernel: the prefix that is reused changes nothing, and the terminal holds them."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint
from builds import kogc_cli, one_line, process_command, process_env
from chat_templates import CHATML, INSTRUCT, add_chat_template
from click.testing import CliRunner

import kogc
from kogc.build import BuildOptions, build
from kogc.cli import cli
from kogc.prefix_cache import shared_length
from kogc.runtime import Request
from kogc.session import Session
from kogc.targets.detect import detect_cpu_profile

CONTEXT = 2048


def build_small(directory: Path, template: str | None, family: str, **changes: Any) -> Path:
    changes = {"max_position_embeddings": CONTEXT, **changes}
    checkpoint = random_checkpoint.make(directory, family, tokenizer=True, **changes)
    if template is not None:
        add_chat_template(checkpoint, template)
    build(str(checkpoint), detect_cpu_profile(), directory / "artifact", BuildOptions(max_context=CONTEXT))
    return directory / "artifact"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never stops by itself."""
    return build_small(tmp_path_factory.mktemp("qwen3"), CHATML, "qwen3", eos_token_id=None)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sliding window much shorter than the text, an odd number of layers, a stop token."""
    return build_small(tmp_path_factory.mktemp("mistral"), INSTRUCT, "mistral", sliding_window=37)


@pytest.fixture(params=["artifact", "windowed"])
def warm_and_cold(request: pytest.FixtureRequest) -> Iterator[tuple[Session, Session]]:
    """Two sessions of one model: one keeps its cache, the other is reset before each use."""
    path = request.getfixturevalue(request.param)
    with kogc.load(path) as warm, kogc.load(path) as cold:
        yield warm, cold


# --- the same as a cold start -----------------------------------------------------------------------------------------


def test_ten_turns_are_ten_cold_starts(warm_and_cold: tuple[Session, Session]) -> None:
    warm, cold = warm_and_cold
    messages: list[dict[str, str]] = []
    cached = []
    for turn in range(10):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        prompt = warm.chat_tokens(messages)
        cold.reset()
        answer, expected = warm.generate(prompt, 30), cold.generate(prompt, 30)
        assert answer.tokens == expected.tokens
        assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)
        assert expected.cached_tokens == 0
        cached.append(answer.cached_tokens)
        messages.append({"role": "assistant", "content": answer.text})
    assert cached[0] == 0
    # The history is the text of the tokens, which need not be the same tokens again: at least the turns before are.
    assert all(later > earlier for earlier, later in pairwise(cached[1:]))


def test_random_generations_are_cold_starts(warm_and_cold: tuple[Session, Session]) -> None:
    """Prompts of any length, made from what came before; streams closed anywhere, before the first token too."""
    warm, cold = warm_and_cold
    rng, before, reused = random.Random(0), [1], 0
    for _ in range(250):
        prompt = before[: rng.randint(0, len(before))] + rng.choices(range(warm.spec.vocab), k=rng.randint(0, 9))
        prompt, count = (prompt or [1])[-300:], rng.randint(1, 24)
        seen = rng.choice([0, 1, count // 2, count, count, count])
        cold.reset()
        expected = cold.generate(prompt, count)
        with warm.stream(prompt, count) as stream:
            tokens = [piece.token for _, piece in zip(range(seen), stream, strict=False)]
        assert tokens == expected.tokens[:seen], (prompt, count)
        reused += stream.cached_tokens
        before = prompt + expected.tokens
        if rng.random() < 0.1:
            warm.logits(before[: rng.randint(1, len(before))])
    assert reused > 2000


def test_the_cache_is_to_the_bit_that_of_a_cold_start(warm_and_cold: tuple[Session, Session]) -> None:
    """Over 600 positions, so that the attention of several chunks and splits is among it."""
    warm, cold = warm_and_cold
    rng = np.random.default_rng(1)
    prompt = [int(t) for t in rng.integers(0, warm.spec.vocab, 600)]
    cold.reset()
    expected = cold.logits(prompt)[-100:]
    warm.generate(prompt[:333], 5, stop=())
    warm.generate([*prompt[:501], 7], 5, stop=())
    runtime = warm._runtime
    assert shared_length(warm._cached._tokens, prompt) == 501
    assert np.array_equal(runtime.run(Request(tuple(prompt[500:]), 500, logits=True)).logits, expected)
    warm.reset()


# --- in the terminal --------------------------------------------------------------------------------------------------


def chat(artifact: Path, text: str | bytes, *args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["run", str(artifact), "--chat", *map(str, args)], input=text)
    return done.exit_code, done.stdout, done.stderr


def test_lines_are_turns(artifact: Path) -> None:
    status, out, err = chat(artifact, "hello\n\nand then?\r\nlast", "--system", "Be kind.", "-n", 12)
    assert status == 0
    figures = err.splitlines()
    assert len(figures) == 3  # an empty line is no turn
    assert re.match(r"\d+ prompt tokens, 12 generated, [\d,.]+ tok/s, ", figures[0])
    for line in figures[1:]:
        assert re.match(r"\d+ prompt tokens \(\d+ cached\), 12 generated, [\d,.]+ tok/s, ", line)
    with kogc.load(artifact) as session:
        messages = [{"role": "system", "content": "Be kind."}]
        for turn in ("hello", "and then?", "last"):
            messages.append({"role": "user", "content": turn})
            answer = session.generate(session.chat_tokens(messages), 12).text
            messages.append({"role": "assistant", "content": answer})
            assert out.startswith(answer + "\n")
            out = out[len(answer) + 1 :]
    assert out == ""


def test_a_conversation_ends_with_its_context(artifact: Path) -> None:
    status, _, err = chat(artifact, "a" * (CONTEXT - 90) + "\nmore\n")
    assert status == 1
    figures, error = err.splitlines()
    assert "generated" in figures
    assert re.match(rf"kogc: the prompt has \d+ tokens, the context {CONTEXT}: no room to continue", error)


def test_interrupt_ends_the_answer_and_not_the_conversation(artifact: Path, tmp_path: Path) -> None:
    command = process_command("run", artifact, "--chat")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=process_env(tmp_path)) as run:
        assert run.stdin
        assert run.stdout
        run.stdin.write(b"hello\n")
        run.stdin.flush()
        os.read(run.stdout.fileno(), 1)  # the answer has begun, and is far from its end
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(b"again\n", timeout=120)
    first, second = err.decode().splitlines()
    assert run.returncode == 0, err
    made = [int(re.search(r"(\d+) generated", line)[1]) for line in (first, second)]  # type: ignore[index]
    assert 0 < made[0] < CONTEXT - 200
    assert made[0] + made[1] < CONTEXT
    assert int(re.search(r"\((\d+) cached\)", second)[1]) > 50  # type: ignore[index]
    assert out.endswith(b"\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--chat", "-p", "x"), "--chat reads its turns from stdin: -p TEXT, -f FILE and -t IDS exclude it"),
        (("--system", "x", "-p", "x"), "--system TEXT needs --chat"),
        (("--chat", "-n", "0"), "'-n'"),
    ],
)
def test_wrong_usage_is_one_line(args: tuple[str, ...], message: str) -> None:
    result = kogc_cli("run", "x", *args)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)


def test_bad_turns_are_one_line(artifact: Path, windowed: Path) -> None:
    assert chat(artifact, b"\xff\xfe\n") == (1, "", "kogc: standard input: not UTF-8 text\n")
    status, _, err = chat(windowed, "x\n", "--system", "none here")
    assert status == 1
    assert "tokenizer_config.json: the chat template failed: Roles must alternate" in one_line(err)
    bytes_of_an_argument = b"\xff".decode("utf-8", "surrogateescape")
    assert chat(artifact, "x\n", "--system", bytes_of_an_argument) == (1, "", "kogc: the text is not UTF-8\n")
    assert chat(artifact, "") == (0, "", "")  # nobody said anything


def test_an_artifact_without_template_is_one_line(artifact: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(artifact, tmp_path / "bare"))
    (bare / "tokenizer_config.json").write_text("{}" + " " * ((bare / "tokenizer_config.json").stat().st_size - 2))
    status, out, err = chat(bare, "hello\n")
    assert (status, out) == (1, "")
    assert "no chat template: neither chat_template.jinja nor" in one_line(err)
