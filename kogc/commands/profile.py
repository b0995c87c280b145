"""`kogc profile`: one profile as YAML, with this GPU's read ceiling where it is measured."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("profile", short_help="Write a GPU's profile, measured on this machine.")
@click.option("--measure", is_flag=True, help="Measure how fast this machine's GPU reads its memory (a minute).")
@click.option("--gpu", default="auto", show_default=True, help="Profile to start from (see `kogc gpus`).")
@click.option("-o", "out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the YAML here.")
def command(measure: bool, gpu: str, out: Path | None) -> None:
    """Write a profile to a file that --gpu FILE.yaml takes, or to the standard output.

    With --measure the read ceiling of the GPU at hand is in it: the best of a few numbers of blocks.
    """
    from ..profile import dump_profile, load_profile
    from ..targets import detect_profile
    from .output import emit_text, remark, size

    if measure:
        from ..measure import measure_profile

        profile, _ = measure_profile(gpu, lambda blocks, rate: remark(f"{blocks} blocks: {size(rate)}/s"))
        head = f"{profile.product}, measured by `kogc profile --measure`."
    else:
        profile, note = detect_profile() if gpu == "auto" else (load_profile(gpu), None)
        if note:
            remark(note)
        head = f"{profile.product}, as `kogc profile` knows it."
    text = dump_profile(profile, head)
    emit_text(text, out)
