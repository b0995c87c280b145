"""`kogc run`: continue a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..plan.plan import Plan
    from ..session import Session


@click.command("run", short_help="Continue a text.")
@click.argument("artifact", metavar="DIR")
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue.")
@click.option("-f", "--file", metavar="FILE", help="Read the text to continue from a file (- is stdin).")
@click.option("-t", "--tokens", metavar="IDS", help="Token ids to continue, such as 1,15,7.")
@click.option("-n", "count", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens to make.")
@click.option("--device", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the GPU.")
def command(
    artifact: str, prompt: str | None, file: str | None, tokens: str | None, count: int, device: int
) -> None:
    """Continue a text greedily; it is printed as it is made. The figures go to stderr."""
    start = _prompt(prompt, file, tokens)
    import kogc

    with kogc.load(artifact, device) as session:
        _run(session, start, count)


def _prompt(text: str | None, file: str | None, tokens: str | None) -> str | Sequence[int]:
    from ..errors import KogcError, UsageError

    if sum(given is not None for given in (text, file, tokens)) != 1:
        raise UsageError("give one of -p TEXT, -f FILE and -t IDS")
    if text is not None:
        return text
    if tokens is not None:
        try:
            return [int(word) for word in tokens.split(",") if word.strip()]
        except ValueError:
            raise UsageError(f"-t {tokens}: not a list of token ids such as 1,15,7") from None
    assert file is not None
    try:
        with click.open_file(file, "rb") as stream:
            data: bytes = stream.read()
        return data.decode("utf-8")
    except OSError as error:
        raise KogcError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KogcError(f"{file}: not UTF-8 text") from None


def _run(session: Session, prompt: str | Sequence[int], count: int) -> None:
    with session.stream(prompt, count) as stream:
        for piece in stream:
            click.echo(piece.text if session.tokenizer else f"{piece.token} ", nl=False)
    click.echo()
    made = len(stream.tokens)
    figures = _figures(session.runtime.plan, stream.prompt_tokens, made, stream.seconds) if stream.seconds else ""
    click.echo(f"{stream.prompt_tokens} prompt tokens, {made} generated{figures}", err=True)


def _figures(plan: Plan, prompt: int, made: int, seconds: float) -> str:
    """Speed over prompt and continuation as timed on the device, bytes read, and their share of the measured ceiling.

    Every token but the last made is a pass; the vocabulary projection is read only for the tokens that are made.
    """
    passes = prompt + made - 1
    layers = plan.weight_bytes - plan.head.units * plan.head.unit_bytes
    read = passes * layers + made * (plan.weight_bytes - layers)
    read += sum(plan.kv_bytes_read(position) for position in range(passes))
    ceiling = plan.profile.measured.read_bandwidth
    share = f"{read / seconds / ceiling:.0%} of the read ceiling" if ceiling else "read ceiling n/a (see kogc bench)"
    return f", {passes / seconds:,.1f} tok/s, {read / seconds / 1e9:,.1f} GB/s, {share}"
