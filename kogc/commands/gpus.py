"""`kogc gpus`: the profiles that ship."""

from __future__ import annotations

import click


@click.command("gpus", short_help="List the GPU and CPU profiles.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the GPU and CPU profiles, and what is known of each."""
    from dataclasses import asdict

    from ..profile import list_profiles, load_profile
    from .output import emit_json, size, table

    profiles = [load_profile(name) for name in list_profiles()]
    if as_json:
        emit_json([asdict(profile) for profile in profiles])
        return
    rows = []
    for p in profiles:
        measured = p.measured.read_bandwidth
        rows.append(
            (
                p.name,
                p.arch,
                p.sms or "-",
                size(p.memory_bytes) if p.memory_bytes else "-",
                f"{size(p.bandwidth_datasheet)}/s" if p.bandwidth_datasheet else "-",
                f"{size(measured)}/s" if measured else "-",
                p.product,
            )
        )
    click.echo(table(("profile", "arch", "SMs/CUs", "memory", "data sheet", "measured", "product"), rows))
