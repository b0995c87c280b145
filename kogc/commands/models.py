"""`kogc models`: the specs that ship."""

from __future__ import annotations

from typing import Any

import click


@click.command("models", short_help="List the model specs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the model specs: parameters, and weight bytes read per token."""
    from ..spec import list_specs, load_spec
    from .output import emit_json, size, table

    rows: list[dict[str, Any]] = []
    for name in list_specs():
        spec = load_spec(name)
        layer = spec.hidden * (spec.qkv_rows + spec.q_rows + 3 * spec.ffn)
        matrices = spec.layers * layer + spec.vocab * spec.hidden
        small = (2 * spec.layers + 1) * spec.hidden
        small += spec.layers * (spec.qkv_rows * spec.qkv_bias + 2 * spec.head_dim * spec.qk_norm)
        embedding = 0 if spec.tied_embeddings else spec.vocab * spec.hidden
        rows.append(
            {
                "name": name,
                "family": spec.family,
                "parameters": matrices + small + embedding,
                "bytes_per_token": 2 * matrices,
                "layers": spec.layers,
                "hidden": spec.hidden,
                "max_context": spec.max_context,
            }
        )
    if as_json:
        emit_json(rows)
        return
    headers = ("model", "family", "parameters", "bytes/token", "layers", "hidden", "context")
    lines = [
        (r["name"], r["family"], f"{r['parameters'] / 1e6:,.0f} M", size(r["bytes_per_token"]), r["layers"],
         r["hidden"], r["max_context"])
        for r in rows
    ]  # fmt: skip
    click.echo(table(headers, lines))
