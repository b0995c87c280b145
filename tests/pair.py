"""Kernels of several trees, or with other knobs, in turns on one GPU: `python tests/pair.py MODEL VARIANT...`.

Two machines of one kind differ by more than most changes to a kernel are worth, and so do two runs on one; in one
process over the same weights kernels can be compared. A VARIANT is a directory of templates (`git worktree add before
HEAD~1` makes before/templates), and behind it the knobs that are not to be the model's tuned ones:
`templates,in_flight=4,pace=600`. A row is printed only where the kernel has passed the comparison with the reference.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from kogc.build import prepare
from kogc.commands.bench import with_knobs
from kogc.errors import KogcError
from kogc.render import render
from kogc.targets import compile_binary
from kogc.tune import TOKENS, Bench, Variant, compile_variant
from kogc.tuned import Setting

HEAD = "| variant | us/token | | of the ceiling | comparison |\n|---|---:|---:|---|---|"


@dataclass(frozen=True)
class OfTree(Setting):
    """A setting, rendered from a directory of templates."""

    templates: Path


def compile_of_tree(model: str, gpu: str, max_context: int, setting: Setting, kv_dtype: str) -> Variant | str:
    """As kogc.tune.compile_variant, from the setting's templates where it names some."""
    if not isinstance(setting, OfTree):
        return compile_variant(model, gpu, max_context, setting, kv_dtype)
    try:
        plan = prepare(model, gpu, max_context, setting.blocks, setting.knobs, kv_dtype=kv_dtype).plan
        return plan, compile_binary(render(plan, setting.templates), plan)
    except KogcError as error:
        return str(error)


def variant(text: str, start: Setting) -> OfTree:
    """`DIR,NAME=N,...` as a setting; click.BadParameter names what is wrong with it."""
    tree, *words = text.split(",")
    if not (Path(tree) / "monokernel.jinja").is_file():
        raise click.BadParameter(f"{tree}: no monokernel.jinja there", param_hint="VARIANT")
    return OfTree(start.blocks, with_knobs(start.knobs, words), Path(tree).resolve())


def row(bench: Bench, name: str, setting: Setting, rate: float, first: float) -> str:
    """A line of the table; KogcError where the kernel does not compute what the reference does."""
    comparison, ceiling = bench.verify(setting)
    share = f"{100 * bench.bytes_per_token(setting) * rate / ceiling:.1f} % of {ceiling / 1e12:.2f} TB/s"
    return f"| {name} | {1e6 / rate:.1f} | {100 * (first / rate - 1):+.2f} % | {share} | {comparison.summary()} |"


@click.command()
@click.argument("model")
@click.argument("variants", metavar="VARIANT...", nargs=-1, required=True)
@click.option("--gpu", default="auto", show_default=True)
@click.option("--depth", default=128, show_default=True)
@click.option("--repeat", default=9, show_default=True, help="Timed runs of each variant, in turns.")
@click.option("--kv-dtype", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True)
def main(model: str, variants: tuple[str, ...], gpu: str, depth: int, repeat: int, kv_dtype: str) -> None:
    """Time variants of a kernel in turns."""
    context = depth + 1 + TOKENS
    plan = prepare(model, gpu, context, kv_dtype=kv_dtype).plan
    start = Setting(plan.blocks, plan.knobs)
    settings = [variant(text, start) for text in variants]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Bench(model, gpu, depth, context, Path(scratch), start.knobs, 0, kv_dtype, compile_of_tree) as bench,
    ):
        rates = bench.measure(settings, repeat)
        click.echo(f"{plan.spec.name} at depth {depth}, medians of {repeat} runs of {TOKENS} tokens\n{HEAD}")
        for name, setting, rate in zip(variants, settings, rates, strict=True):
            if rate is not None:
                click.echo(row(bench, name, setting, rate, rates[0] or rate))
            else:
                click.echo(f"| {name} | refused: {bench.refused[setting]} | | | |")
        if bench.refused:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
