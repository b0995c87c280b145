"""`kogc verify`: are the files of an artifact what the manifest says?"""

from __future__ import annotations

import click


@click.command("verify", short_help="Hash an artifact's files again.")
@click.argument("artifact", metavar="DIR")
def command(artifact: str) -> None:
    """Hash every file of an artifact again and compare with its manifest."""
    from ..artifact import read_manifest, verify
    from .output import size
    from .progress import byte_progress

    total = sum(entry.bytes for entry in read_manifest(artifact).files.values())
    with byte_progress("hashing", total) as advance:
        manifest = verify(artifact, advance)
    click.echo(f"{artifact}: {len(manifest.files)} files, {size(total)}, all as built")
