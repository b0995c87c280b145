"""`kogc build`: a model and a GPU become an artifact."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("build", short_help="Compile a model for one GPU.")
@click.argument("model", metavar="CHECKPOINT|SPEC")
@click.option("--gpu", default="auto", show_default=True, help="Profile (see `kogc gpus`), or auto: this machine.")
@click.option("-o", "out", type=click.Path(path_type=Path), help="Directory of the artifact.")
@click.option("--max-context", type=click.IntRange(min=1), metavar="N", help="Longest context in tokens.")
@click.option("--blocks", type=click.IntRange(min=1), metavar="N", help="Number of blocks (cpu: threads).")
@click.option(
    "--kv-dtype", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True, help="Of the KV cache."
)
@click.option("--dummy-weights", is_flag=True, help="Random weights, made on the device: for benchmarks.")
@click.option("--weights-by-reference", is_flag=True, help="Pack the weights at load, from where they are now.")
@click.option("--dump-source", type=click.Path(path_type=Path), metavar="DIR", help="Write the rendered source here.")
@click.option("--dry-run", is_flag=True, help="Plan, render and check; compile and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    gpu: str,
    out: Path | None,
    max_context: int | None,
    blocks: int | None,
    kv_dtype: str,
    dummy_weights: bool,
    weights_by_reference: bool,
    dump_source: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile a checkpoint (directory or hub id), or a bare spec, for one GPU."""
    from ..build import BuildOptions, build
    from .output import emit_json, remark, size

    options = BuildOptions(max_context, blocks, dummy_weights, weights_by_reference, dump_source, dry_run, kv_dtype)
    result = build(model, gpu, out, options)
    if as_json:
        emit_json(result.to_json())
        return
    for note in result.notes:
        remark(note)
    plan = result.plan
    what = f"{plan.spec.name} for {plan.profile.name}, {plan.blocks} blocks, context {plan.max_context:,}"
    if plan.kv_dtype != "bf16":
        what += f", KV cache in {plan.kv_dtype.upper()}"
    if result.out is None:
        click.echo(f"{what}: source {size(result.source_bytes)} (dry run: nothing written)")
    elif result.up_to_date:
        click.echo(f"{result.out}: up to date ({what})")
    else:
        click.echo(f"{result.out}: {what}, {size(result.artifact_bytes)} in {result.seconds:.1f} s")
