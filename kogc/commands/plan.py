"""`kogc plan`: the phase table, without building anything."""

from __future__ import annotations

from typing import Any

import click


@click.command("plan", short_help="Show how the work is cut, and what a token costs.")
@click.argument("model")
@click.option("--gpu", default="auto", show_default=True, help="Profile (see `kogc gpus`), or auto.")
@click.option("--max-context", type=click.IntRange(min=1), metavar="N", help="Longest context in tokens.")
@click.option("--blocks", type=click.IntRange(min=1), metavar="N", help="Number of blocks.")
@click.option(
    "--kv-dtype", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True, help="Of the KV cache."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, gpu: str, max_context: int | None, blocks: int | None, kv_dtype: str, as_json: bool) -> None:
    """Show how the work of MODEL (checkpoint, spec or hub id) is cut, and what a token costs."""
    from ..build import prepare
    from ..phase_table import phase_table
    from .output import emit_json, remark

    prepared = prepare(model, gpu, max_context, blocks, kv_dtype=kv_dtype)
    data = phase_table(prepared.plan)
    if as_json:
        emit_json(data)
        return
    for note in prepared.notes:
        remark(note)
    tables = [
        _head(data),
        _phases(data),
        _exchanges(data),
        *_shared_memory(data),
        *_passes(data),
        *_samples(data),
        _costs(data),
    ]
    click.echo("\n\n".join(tables))


def _head(data: dict[str, Any]) -> str:
    from .output import size

    attention = data["attention"]
    cache = f"{size(data['kv_cache_bytes'])} in {data['kv_dtype'].upper()}"
    return (
        f"{data['model']} on {data['gpu']} ({data['target']}, {data['arch']}): {data['blocks']} blocks, "
        f"{data['layers']} layers, context {data['max_context']:,}\n"
        f"slab {size(data['slab_bytes'])} a block, KV cache {cache}\n"
        f"attention: {attention['units']} units of {attention['heads_per_block']} query heads, "
        f"the context of each shared by {attention['splits']} blocks"
    )


def _phases(data: dict[str, Any]) -> str:
    from .output import span, table

    rows = [
        (p["name"], p["times"], p["rows"], p["columns"], p["unit"], span(p["rows_per_block"]),
         span(p["bytes_per_block"]), p["stages"] or "-")
        for p in data["phases"]
    ]  # fmt: skip
    return table(("phase", "times", "rows", "columns", "unit", "rows/block", "bytes/block", "stages"), rows)


def _exchanges(data: dict[str, Any]) -> str:
    from .output import table

    return table(("exchange", "words", "bytes"), [(e["name"], e["words"], e["bytes"]) for e in data["exchanges"]])


def _shared_memory(data: dict[str, Any]) -> list[str]:
    from .output import table

    memory = data["shared_memory"]
    if not memory["regions"]:
        return []
    ring = f", ring of {memory['stages']} stages of {memory['stage_bytes']:,}" if memory["stages"] else ""
    title = f"shared memory: {memory['bytes']:,} bytes{ring}"
    rows = [(region["name"], region["offset"], region["bytes"]) for region in memory["regions"]]
    return [f"{title}\n{table(('region', 'offset', 'bytes'), rows)}"]


def _passes(data: dict[str, Any]) -> list[str]:
    from .output import size, table

    if cpu := data["cpu_passes"]:
        sizes = f"{size(cpu['thread_bytes'])} of memory a thread, {size(cpu['exchange_bytes'])} of exchanges"
        return [f"prompts: {cpu['tokens']} tokens a pass, in the phases above; {sizes}"]
    passes = data["passes"]
    if not passes:
        return ["prompts: token by token"]
    title = f"prompts: {passes['tokens']} tokens a pass, ring of {passes['stages']} stages of {passes['stage_bytes']:,}"
    names = ("groups", "splits", "tiles_per_block", "fragments_per_block", "slice")
    rows = [(p["name"], *(p[name] for name in names), size(p["traffic"])) for p in passes["products"]]
    head = ("phase", "groups", "splits", "tiles/block", "fragments/block", "in a stage", "moved/block")
    return [f"{title}, {size(passes['scratch_bytes'])} to work in\n{table(head, rows)}"]


def _samples(data: dict[str, Any]) -> list[str]:
    from .output import size, table

    samples = data["samples"]
    if not samples:
        return ["samples: one after the other"]
    ring = f"ring of {samples['stages']} stages of {samples['stage_bytes']:,}, {samples['in_flight']} in flight"
    title = f"samples: up to {samples['columns']} together, {ring}, {size(samples['scratch_bytes'])} to work in"
    rows = [
        (p["name"], p["tiles_per_block"], p["slice"], "columns" if p["split"] else "rows") for p in samples["products"]
    ]
    return [f"{title}\n{table(('phase', 'tiles/block', 'in a stage', 'warps share'), rows)}"]


def _costs(data: dict[str, Any]) -> str:
    from .output import size, table

    rows = []
    for cost in data["per_token"]:
        seconds = cost["seconds_at_ceiling"]
        speed = (f"{seconds * 1e6:,.0f} us", f"{1 / seconds:,.0f}") if seconds else ("-", "-")
        rows.append((cost["depth"], size(cost["weight_bytes"]), size(cost["kv_bytes"]), *speed))
    ceiling = data["ceiling"]
    bandwidth = f"{size(ceiling['bandwidth'])}/s, " if ceiling["bandwidth"] else ""
    headers = ("depth", "weights/token", "KV/token", "at the ceiling", "tokens/s")
    return f"read ceiling: {bandwidth}{ceiling['how']}\n{table(headers, rows)}"
