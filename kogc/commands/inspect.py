"""`kogc inspect`: what an artifact is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..artifact import Manifest


@click.command("inspect", short_help="Show what an artifact is.")
@click.argument("artifact", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(artifact: str, as_json: bool) -> None:
    """Show what an artifact was built from and for."""
    from ..artifact import read_manifest
    from .output import emit_json, size, table

    manifest = read_manifest(artifact)
    if as_json:
        emit_json(manifest.to_json())
        return
    for key, value in _facts(manifest):
        click.echo(f"{key + ':':<16}{value}")
    click.echo()
    rows = [(o.name, o.dtype, "x".join(map(str, o.shape)), size(o.bytes), o.layout) for o in manifest.operands]
    click.echo(table(("operand", "dtype", "shape", "bytes", "layout"), rows))
    click.echo()
    files = [(name, size(entry.bytes), entry.sha256[:16]) for name, entry in sorted(manifest.files.items())]
    click.echo(table(("file", "bytes", "sha256"), files))


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    """The lines above the tables."""
    from .output import size

    spec = manifest.spec
    where = f", {manifest.sms} {manifest.profile.unit}" if manifest.sms else ""
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    source = manifest.hub or manifest.weights.location
    facts = [
        ("model", f"{manifest.model} ({spec.family}, {spec.layers} layers, {spec.dtype})"),
        ("built for", f"{manifest.profile.name} ({manifest.target}, {manifest.arch}{where})"),
        ("built by", f"kogc {manifest.kogc}, {tools}"),
        ("launch", f"{manifest.blocks} blocks of {manifest.threads} threads, {size(manifest.shared_memory)} shared"),
        (
            "context",
            f"{manifest.max_context:,} tokens, KV cache {size(manifest.kv_bytes)} in {manifest.kv_dtype.upper()}",
        ),
        ("weights", f"{manifest.weights.kind}, {size(manifest.weights_bytes)}" + (f", {source}" if source else "")),
        ("stop tokens", ", ".join(map(str, manifest.stop_tokens)) or "none"),
    ]
    return facts + [("note", note) for note in manifest.notes]
