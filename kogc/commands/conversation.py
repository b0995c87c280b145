"""A conversation in the terminal: a line is a turn, and each answer is printed as it is made."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from ..errors import KogcError

if TYPE_CHECKING:
    from types import FrameType

    from ..session import Session, Stream

PROMPT = "> "


def converse(session: Session, system: str | None, count: int | None, figures: Callable[[Stream], str]) -> None:
    """Answer every line of stdin until it ends. count: most tokens of an answer; None: what the context has room for.

    After each answer a line of `figures` goes to stderr. Ctrl-C ends the answer under way; at the prompt, everything.
    """
    _ = session.chat_template  # before the first line is typed
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _terminal_lines() if sys.stdin.isatty() else _piped_lines():
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        text, stream = _answer(session, session.chat_tokens(messages), count)
        messages.append({"role": "assistant", "content": text})
        click.echo(figures(stream), err=True)


def _answer(session: Session, prompt: list[int], count: int | None) -> tuple[str, Stream]:
    """The text printed, which is what the model said even where it was interrupted."""
    pieces = []
    with _noted_interrupts() as interrupts, session.stream(prompt, count or session.max_context) as stream:
        for piece in stream:
            pieces.append(piece.text)
            click.echo(piece.text, nl=False)
            if interrupts:
                break
    click.echo()
    return "".join(pieces), stream


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Collects a first Ctrl-C instead of raising it, so that the kernel is ended in order; a second one is raised."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _terminal_lines() -> Iterator[str]:
    """Lines typed at a prompt, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() history and editing
    while (line := _typed()) is not None:
        yield line


def _typed() -> str | None:
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None
    except UnicodeDecodeError:
        raise KogcError("standard input: not UTF-8 text") from None


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise KogcError("standard input: not UTF-8 text") from None
