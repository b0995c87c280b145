"""`kogc run`: continue a text, or hold a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..plan.plan import Plan
    from ..sampling import Sampling
    from ..session import Session, Stream


DEFAULT_COUNT = 128
COUNT_HELP = f"Most tokens to make [{DEFAULT_COUNT}; with --chat, of an answer: as many as the context has room for]."


@click.command("run", short_help="Continue a text, or hold a conversation.")
@click.argument("artifact", metavar="DIR")
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue.")
@click.option("-f", "--file", metavar="FILE", help="Read the text to continue from a file (- is stdin).")
@click.option("-t", "--tokens", metavar="IDS", help="Token ids to continue, such as 1,15,7.")
@click.option("--chat", is_flag=True, help="Converse: a line of stdin is a turn.")
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@click.option("-n", "count", type=click.IntRange(min=1), metavar="N", help=COUNT_HELP)
@click.option("--samples", type=click.IntRange(1, 16), metavar="N", help="Make N continuations together, 1 to 16.")
@click.option("--temperature", type=float, metavar="T", help="Divides the logits; 0: the largest is taken.")
@click.option("--top-k", type=int, metavar="K", help="Draw among the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, metavar="P", help="Draw among the likeliest tokens that reach probability P.")
@click.option("--min-p", type=float, metavar="P", help="Draw among tokens at least P times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, metavar="X", help="Divides the logits of tokens seen; 1: off.")
@click.option("--presence-penalty", type=float, metavar="X", help="Subtracted for tokens made before.")
@click.option("--frequency-penalty", type=float, metavar="X", help="Subtracted for each time a token was made.")
@click.option("--seed", type=int, metavar="N", help="The same seed makes the same text.")
@click.option("--greedy", is_flag=True, help="Take the largest logit: the same as --temperature 0.")
@click.option("--ignore-generation-config", is_flag=True, help="Begin from plain settings, not from the model's own.")
@click.option("--device", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the GPU.")
def command(
    artifact: str,
    prompt: str | None,
    file: str | None,
    tokens: str | None,
    chat: bool,
    system: str | None,
    count: int | None,
    samples: int | None,
    greedy: bool,
    ignore_generation_config: bool,
    device: int,
    **settings: float | None,
) -> None:
    """Continue a text; it is printed as it is made. The figures go to stderr.

    Tokens are chosen as the model's generation_config.json asks, else the largest logit is taken. Options change that
    one by one; --top-k, --top-p, --min-p and --seed mean a draw, at temperature 1 where nothing says another.

    With --samples, N continuations are made together, sample i with the seed + i, and printed when all have ended.

    With --chat, hold a conversation by the checkpoint's chat template. Ctrl-C ends an answer; Ctrl-C or Ctrl-D at the
    prompt ends the conversation.
    """
    start = None if chat else _prompt(prompt, file, tokens)
    _check_chat(chat, system, (prompt, file, tokens), samples)
    given = {name: value for name, value in settings.items() if value is not None}
    _check(given, greedy)
    import kogc
    from kogc.sampling import GREEDY

    with kogc.load(artifact, device, sampling=GREEDY if ignore_generation_config else None) as session:
        session.sampling = _sampling(session.sampling, given, greedy)
        if start is not None and samples is not None:
            _run_samples(session, start, count or DEFAULT_COUNT, samples)
        elif start is not None:
            _run(session, start, count or DEFAULT_COUNT)
        else:
            from .conversation import converse

            converse(session, system, count, lambda stream: _figures(session.plan, stream))


def _check_chat(chat: bool, system: str | None, prompts: Sequence[str | None], samples: int | None) -> None:
    from ..errors import UsageError

    if chat and samples is not None:
        raise UsageError("--chat and --samples exclude each other")
    if chat and any(prompt is not None for prompt in prompts):
        raise UsageError("--chat reads its turns from stdin: -p TEXT, -f FILE and -t IDS exclude it")
    if system is not None and not chat:
        raise UsageError("--system TEXT needs --chat")


DRAWING = ("top_k", "top_p", "min_p", "seed")  # options that mean nothing to a greedy choice


def _check(given: dict[str, float], greedy: bool) -> None:
    """Refuse what is out of range before anything is loaded."""
    from ..errors import KogcError, UsageError
    from ..sampling import Sampling

    largest = "--greedy" if greedy else "--temperature 0" if given.get("temperature") == 0 else None
    drawing = [name for name in (*(["temperature"] if greedy else []), *DRAWING) if name in given]
    if largest and drawing:
        raise UsageError(f"{largest} and --{drawing[0].replace('_', '-')} exclude each other")
    try:
        Sampling(**given)  # type: ignore[arg-type]
    except KogcError as error:
        name, _, rest = str(error).partition(":")
        raise UsageError(f"--{name.replace('_', '-')}:{rest}") from None


def _sampling(base: Sampling, given: dict[str, float], greedy: bool) -> Sampling:
    """The model's own way with what the command line changes."""
    from dataclasses import replace

    if greedy:
        given = {**given, "temperature": 0.0}
    elif base.greedy and "temperature" not in given and any(name in given for name in DRAWING):
        given = {**given, "temperature": 1.0}
    return replace(base, **given)  # type: ignore[arg-type]


def _prompt(text: str | None, file: str | None, tokens: str | None) -> str | Sequence[int]:
    from ..errors import UsageError
    from .text_file import read_text

    if sum(given is not None for given in (text, file, tokens)) != 1:
        raise UsageError("give one of -p TEXT, -f FILE and -t IDS")
    if text is not None:
        return text
    if tokens is not None:
        words = [word.strip() for word in tokens.split(",") if word.strip()]
        if not all(word.isascii() and word.isdecimal() for word in words):
            raise UsageError(f"-t {tokens}: not a list of token ids such as 1,15,7")
        return [int(word) for word in words]
    assert file is not None
    return read_text(file)


def _run(session: Session, prompt: str | Sequence[int], count: int) -> None:
    with session.stream(prompt, count) as stream:
        for piece in stream:
            click.echo(piece.text if session.tokenizer else f"{piece.token} ", nl=False)
    click.echo()
    click.echo(_figures(session.plan, stream), err=True)


def _run_samples(session: Session, prompt: str | Sequence[int], count: int, n: int) -> None:
    made = session.generate_many(prompt, n, count)
    for number, one in enumerate(made, 1):
        click.echo(f"--- sample {number} of {n}, {len(one.tokens)} tokens ({one.finish_reason})")
        click.echo(one.text if session.tokenizer else " ".join(map(str, one.tokens)))
    first, total = made[0], sum(len(one.tokens) for one in made)
    cached = f" ({first.cached_tokens} cached)" if first.cached_tokens else ""
    counts = f"{first.prompt_tokens} prompt tokens{cached}, {n} samples, {total} generated"
    speed = f", {total / first.seconds:,.1f} tok/s generated, the prompt's time counted" if first.seconds else ""
    click.echo(counts + speed, err=True)


def _figures(plan: Plan, stream: Stream) -> str:
    """Tokens, speed over what was run as timed on the device, bytes read, and their share of the measured ceiling.

    Every token but the cached and the last made is a pass; the vocabulary projection is read only for those made.
    """
    made, cached, seconds = len(stream.tokens), stream.cached_tokens, stream.seconds
    counts = f"{stream.prompt_tokens} prompt tokens{f' ({cached} cached)' if cached else ''}, {made} generated"
    if not seconds or not made:
        return counts
    end = stream.prompt_tokens + made - 1
    layers = plan.weight_bytes - plan.head.units * plan.head.unit_bytes
    read = (end - cached) * layers + made * (plan.weight_bytes - layers)
    read += sum(plan.kv_bytes_read(position) for position in range(cached, end))
    ceiling = plan.profile.measured.read_bandwidth
    share = f"{read / seconds / ceiling:.0%} of the read ceiling" if ceiling else "read ceiling n/a (see kogc bench)"
    return f"{counts}, {(end - cached) / seconds:,.1f} tok/s, {read / seconds / 1e9:,.1f} GB/s, {share}"
