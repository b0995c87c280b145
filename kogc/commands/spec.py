"""`kogc spec`: the spec of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("spec", short_help="Write the spec of a checkpoint.")
@click.argument("checkpoint", metavar="DIR")
@click.option("-o", "out", type=click.Path(path_type=Path), help="Write the YAML to this file.")
def command(checkpoint: str, out: Path | None) -> None:
    """Write the spec of a checkpoint from its config.json."""
    from ..importer import spec_from_dir
    from ..spec import dump_spec
    from .output import emit_text, remark

    spec, notes = spec_from_dir(checkpoint)
    for note in notes:
        remark(note)
    text = dump_spec(spec)
    emit_text(text, out)
