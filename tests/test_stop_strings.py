"""Stop strings: no text lost, none repeated, however the text is cut and wherever the string falls."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import random_checkpoint

from kogc.runtime import Request
from kogc.session import Session
from kogc.stop_strings import StopStrings
from kogc.tokenizer import Tokenizer


def naive(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string to be complete, seen character by character; whether there is one."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


def cut(rng: random.Random, text: str) -> list[str]:
    """A text in random pieces, empty ones among them."""
    places = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def some(rng: random.Random, alphabet: str, least: int, most: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(least, most)))


@pytest.mark.parametrize("alphabet", ["ab", "abc", "aé🙂", "\n#"])
def test_pieces_give_what_the_whole_text_gives(alphabet: str) -> None:
    rng, stopped = random.Random(alphabet), 0
    for _ in range(3000):
        stops = [some(rng, alphabet, 1, 5) for _ in range(rng.randint(0, 3))]
        text = some(rng, alphabet, 0, 40)
        filter_ = StopStrings(stops)
        given = "".join(filter_.push(piece) for piece in cut(rng, text)) + filter_.finish()
        assert (given, filter_.stopped) == naive(text, stops), (stops, text)
        stopped += filter_.stopped
    assert 500 < stopped < 2900, "both outcomes are tried"


def test_text_is_held_back_no_longer_than_it_must() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        stops = [some(rng, "ab", 1, 5) for _ in range(2)]
        filter_, given, seen = StopStrings(stops), "", ""
        for letter in some(rng, "ab", 0, 30):
            given, seen = given + filter_.push(letter), seen + letter
            if filter_.stopped:
                break
            held = seen[len(given) :]
            assert not held or any(stop.startswith(held) for stop in stops), (stops, seen, given)


def test_examples() -> None:
    filter_ = StopStrings(["\n\n", "END"])
    assert [filter_.push(p) for p in ("one\n", "two E", "N", "d", "\n", "\nmore", "more")] == [
        "one", "\ntwo ", "", "ENd", "", "", ""
    ]  # fmt: skip
    assert filter_.stopped
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


# --- in a session -----------------------------------------------------------------------------------------------------


class Scripted:
    """A runtime that makes the tokens it was given, and notes how many were asked for and that it was stopped."""

    plan = SimpleNamespace(max_context=1 << 20, passes=None, spec=SimpleNamespace(vocab=331, bos_token=1))
    last_timing = 1.0

    def __init__(self, tokens: list[int]) -> None:
        self.script = tokens
        self.made = 0
        self.closed = False

    def tokens(self, request: Request) -> Iterator[int]:
        try:
            for token in self.script[: request.max_new]:
                self.made += 1
                yield token
                if token in request.stop:
                    return
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One byte a token: every character beyond ASCII comes in parts."""
    directory = tmp_path_factory.mktemp("tokenizer")
    random_checkpoint.write_tokenizer(directory, 331)
    return Tokenizer(directory)


def scripted(tokenizer: Tokenizer, tokens: list[int]) -> tuple[Session, Scripted]:
    runtime: Any = Scripted(tokens)
    return Session(runtime, tokenizer, (2,)), runtime


def test_a_session_stops_at_the_string(tokenizer: Tokenizer) -> None:
    rng, stopped = random.Random(1), 0
    for _ in range(400):
        text = some(rng, "ab é🙂\n", 1, 30)
        stops = [some(rng, "ab é🙂\n", 1, 3) for _ in range(rng.randint(0, 3))]
        tokens = tokenizer.encode(text, special=False)
        session, runtime = scripted(tokenizer, tokens)
        expected, stops_at = naive(text, stops)
        stream = session.stream("x", len(tokens), stop_strings=stops)
        pieces = []
        for piece in stream:
            assert runtime.closed == stream._text.stopped, "the kernel is told before the reader is"
            pieces.append(piece.text)
        made = stream.result("".join(pieces))
        assert made.text == expected, (text, stops)
        assert made.finish_reason == ("stop" if stops_at else "length")
        assert made.tokens == tokens[: runtime.made]
        assert runtime.closed
        if stops_at:  # not a token more than the string needs
            assert tokenizer.decode(made.tokens[:-1]).find(naive(text, stops)[0]) == 0
            assert not naive(tokenizer.decode(made.tokens[:-1]), stops)[1]
            stopped += 1
    assert 100 < stopped < 390


def test_text_held_back_comes_with_a_stop_token(tokenizer: Tokenizer) -> None:
    session, _ = scripted(tokenizer, [*tokenizer.encode("ab\n", special=False), 2, 5])
    made = session.generate("x", 9, stop_strings=["\n\n"])
    assert (made.text, made.finish_reason, len(made.tokens)) == ("ab\n", "stop", 4)


def test_bytes_that_are_no_character_come_once(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🙂", special=False)[:2]
    session, _ = scripted(tokenizer, [*tokenizer.encode("a", special=False), *half, 2])
    assert session.generate("x", 9, stop_strings=["b"]).text.rstrip("\ufffd") == "a"
    session, _ = scripted(tokenizer, [*half, *tokenizer.encode("ab", special=False)])
    assert session.generate("x", 4, stop_strings=["b"]).text.lstrip("\ufffd") == "a"
