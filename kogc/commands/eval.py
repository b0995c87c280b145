"""`kogc eval`: perplexity of a text, and the distance from Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..evaluate import Evaluation


@click.command("eval", short_help="Measure perplexity, and the distance from Transformers in FP32.")
@click.argument("artifact", metavar="DIR")
@click.option("--text", "file", metavar="FILE", required=True, help="The text to predict (- is stdin).")
@click.option("--reference", metavar="DIR", help="A checkpoint, to compare with in Transformers on the CPU.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take only the first N tokens of the text.")
@click.option("--window", type=click.IntRange(min=2), metavar="N", help="Tokens seen at once [2048, or the context].")
@click.option("--device", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    artifact: str, file: str, reference: str | None, limit: int | None, window: int | None, device: int, as_json: bool
) -> None:
    """Predict a text token by token, and say how well: nats a token, perplexity, bits a byte.

    The text is cut into windows, each half a window after the last; a token is scored once, in the first window that
    holds it. With --reference, also KL(reference || build) of every prediction, in nats.
    """
    import kogc

    from ..evaluate import evaluate
    from .output import emit_json
    from .progress import spinner
    from .text_file import read_text

    text = read_text(file)
    with kogc.load(artifact, device) as session:
        other = None
        if reference is not None:
            from ..transformers_reference import TransformersReference

            other = TransformersReference(reference, session.spec.vocab)
        with spinner("evaluating"):
            result = evaluate(session, text, limit, window, other)
    if as_json:
        emit_json(result.to_json())
    else:
        _show(result)


def _show(result: Evaluation) -> None:
    click.echo(f"{result.tokens:,} tokens ({result.bytes:,} bytes), windows of {result.window}, stride {result.stride}")
    nats, perplexity = f"{result.nats_per_token:.4f} nats/token", f"perplexity {result.perplexity:.4f}"
    click.echo(f"{nats}, {perplexity}, {result.bits_per_byte:.4f} bits/byte")
    kl = result.divergence
    if kl is not None:
        quantiles = f"50 % {kl.p50:.2e}, 90 % {kl.p90:.2e}, 99 % {kl.p99:.2e}, largest {kl.max:.2e}"
        click.echo(f"KL(reference || build): mean {kl.mean:.2e} nats, {quantiles}")
        click.echo(f"best token as the reference's: {kl.top1_agreement:.2%}")
        click.echo(f"reference: {kl.reference_nats_per_token:.4f} nats/token")
