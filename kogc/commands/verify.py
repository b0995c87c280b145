"""`kogc verify`: are the files of an artifact what the manifest says?"""

from __future__ import annotations

import click


@click.command("verify", short_help="Hash an artifact's files again.")
@click.argument("artifact", metavar="DIR")
def command(artifact: str) -> None:
    """Hash every file of an artifact, and weights that it refers to, again and compare with its manifest."""
    from ..artifact import read_manifest, verify
    from ..hub import check_reference
    from .output import size
    from .progress import byte_progress

    manifest = read_manifest(artifact)
    referred = manifest.weights.files or {}
    files = [*manifest.files.values(), *referred.values()]
    total = sum(entry.bytes for entry in files)
    with byte_progress("hashing", total) as advance:
        verify(artifact, advance)
        if referred:
            check_reference(manifest.weights, advance)
    click.echo(f"{artifact}: {len(files)} files, {size(total)}, all as built")
