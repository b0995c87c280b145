"""`kogc bench`: tokens per second at given depths of context."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..plan.plan import Knobs


def _depths(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    return _numbers(value, 0, "depths such as 0,512,4096")


def _prompts(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int]:
    return [] if value is None else _numbers(value, 1, "numbers of tokens such as 512,4096")


def _samples(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int]:
    from ..plan.samples import COLUMNS

    numbers = [] if value is None else _numbers(value, 1, "numbers of samples such as 8,16")
    if max(numbers, default=1) > COLUMNS:
        raise click.BadParameter(f"{value}: at most {COLUMNS} samples are made together")
    return numbers


def _numbers(value: str, least: int, what: str) -> list[int]:
    try:
        numbers = [int(word) for word in value.split(",")]
    except ValueError:
        numbers = [least - 1]
    if min(numbers) < least:
        raise click.BadParameter(f"{value}: not a list of {what}")
    return numbers


# Options that say how a model is built.
OF_A_BUILD = {
    "gpu": "--gpu",
    "dummy_weights": "--dummy-weights",
    "max_context": "--max-context",
    "blocks": "--blocks",
    "kv_dtype": "--kv-dtype",
    "knobs": "--knob",
}


def with_knobs(start: Knobs, words: Sequence[str]) -> Knobs:
    """`start` with what the words set, NAME=N each; click.BadParameter names a word that sets nothing."""
    values = asdict(start)
    for word in words:
        name, _, value = word.partition("=")
        if name not in values or not (value.isascii() and value.isdecimal()):
            raise click.BadParameter(f"{word}: not NAME=N with a name of {', '.join(values)}", param_hint="--knob")
        values[name] = int(value)
    return replace(start, **values)


def _knobs(words: tuple[str, ...]) -> Knobs | None:
    """The knobs that the words name, the others at their defaults; None, which means the tuned ones, without words."""
    from ..plan.plan import Knobs

    return with_knobs(Knobs(), words) if words else None


@click.command("bench", short_help="Measure tokens per second.")
@click.argument("model", metavar="DIR|SPEC")
@click.option("--gpu", default="auto", show_default=True, help="Profile, for a model that is not built yet.")
@click.option("--dummy-weights", is_flag=True, help="Build the model with random weights for this run.")
@click.option("--max-context", type=click.IntRange(min=1), metavar="N", help="Longest context of that build.")
@click.option("--blocks", type=click.IntRange(min=1), metavar="N", help="Number of blocks of that build.")
@click.option(
    "--kv-dtype",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="Of that build's KV cache.",
)
@click.option("--knob", "knobs", multiple=True, metavar="NAME=N", help="A knob of that build; the rest: defaults.")
@click.option("-n", "count", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate.")
@click.option("-d", "depths", default="0,512,4096", show_default=True, callback=_depths, help="Context depths.")
@click.option("-p", "prompts", metavar="LIST", callback=_prompts, help="Also time prompts of so many tokens.")
@click.option("--samples", metavar="LIST", callback=_samples, help="Also time so many continuations together.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Timed runs of each depth.")
@click.option("--sample", is_flag=True, help="Also time tokens that are drawn, with filters and penalties.")
@click.option("--steady", is_flag=True, help="Also time each of 2,000 tokens, from the first depth.")
@click.option("--phases", is_flag=True, help="Also show what a token's time goes to, at the first depth.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Also write a Chrome/Perfetto trace.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    gpu: str,
    dummy_weights: bool,
    max_context: int | None,
    blocks: int | None,
    kv_dtype: str,
    knobs: tuple[str, ...],
    count: int,
    depths: list[int],
    prompts: list[int],
    samples: list[int],
    repeat: int,
    sample: bool,
    steady: bool,
    phases: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Measure an artifact; with --dummy-weights any spec, checkpoint or hub id.

    --phases and --trace run a second kernel, which notes the clock as it goes; speeds are those of the first. A trace
    file that ends in .gz is compressed, which viewers read as well.
    """
    from ..artifact import MANIFEST
    from ..build import BuildOptions, build
    from ..errors import UsageError

    context = click.get_current_context()

    def given(name: str) -> bool:
        return context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT

    asked = given("depths")
    chosen: dict[str, Any] = {
        "n": count,
        "depths": depths,
        "prompts": prompts,
        "samples": samples,
        "repeat": repeat,
        "phases": phases,
        "trace": trace,
        "steady": steady,
        "sample": sample,
    }
    if (Path(model) / MANIFEST).is_file():
        if options := [flag for name, flag in OF_A_BUILD.items() if given(name)]:
            raise UsageError(f"{model} is built: {', '.join(options)} would not change it")
        _measure(Path(model), asked, as_json, **chosen)
    elif not dummy_weights:
        raise UsageError(f"{model} is not an artifact: build it first, or bench it with --dummy-weights")
    else:
        with tempfile.TemporaryDirectory(prefix="kogc-bench-") as directory:
            out = Path(directory) / "artifact"
            build(model, gpu, out, BuildOptions(max_context, blocks, True, kv_dtype=kv_dtype, knobs=_knobs(knobs)))
            _measure(out, asked, as_json, **chosen)


def _measure(artifact: Path, asked: bool, as_json: bool, n: int, depths: list[int], **chosen: Any) -> None:
    """Run and print. Depths that nobody asked for are left out where the context has no room for them."""
    from ..artifact import read_manifest
    from ..bench import run_bench
    from .output import emit_json

    if not asked:
        room = read_manifest(artifact).max_context - n - 1
        depths = [depth for depth in depths if depth <= room] or [0]
    report = run_bench(artifact, n, depths, as_json, **chosen)
    if as_json:
        emit_json(report)
