"""`kogc tune`: find the fastest setting of a model's kernel on this machine."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("tune", short_help="Search for the fastest setting on this machine.")
@click.argument("model", metavar="CHECKPOINT|SPEC")
@click.option("--gpu", default="auto", show_default=True, help="Profile of this machine.")
@click.option("-o", "out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it here.")
@click.option("--budget", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds of search.")
@click.option("--depth", type=click.IntRange(min=0), default=128, show_default=True, help="Context depth to tune at.")
@click.option(
    "--kv-dtype", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True, help="Of the KV cache."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, gpu: str, out: Path | None, budget: float, depth: int, kv_dtype: str, as_json: bool) -> None:
    """Time variants of a model's kernel, with random weights, and keep the fastest that computes the same.

    Without -o the result is written beside the GPU profiles, where builds of the same shape for the same GPU find it.
    """
    from ..tune import Step, run_tune
    from .output import emit_json, remark

    def report(step: Step) -> None:
        rates = ", ".join(f"{value}: {'refused' if r is None else f'{r:.1f}'}" for value, r in step.rates.items())
        click.echo(f"{step.name}: {rates} t/s; kept {step.kept}", err=True)

    outcome = run_tune(model, gpu, out, budget, depth, report, kv_dtype)
    if as_json:
        emit_json(outcome.to_json())
        return
    for setting, why in outcome.refused.items():
        remark(f"refused {setting}: {why}")
    m = outcome.tuned.measured
    gain = m.tokens_per_second / m.tokens_per_second_before - 1
    click.echo(f"{m.model} at depth {m.depth}: {outcome.tuned.setting.changes(outcome.start)}")
    speeds = f"{m.tokens_per_second_before:.1f} -> {m.tokens_per_second:.1f} t/s ({100 * gain:+.1f} %)"
    click.echo(f"{speeds}, {100 * m.share_of_ceiling:.1f} % of the read ceiling")
    click.echo(f"comparison: {outcome.comparison.summary()}")
    click.echo(f"wrote {outcome.out}")
