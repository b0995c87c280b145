"""Settings that `kogc tune` found, one file for each shape of model on each GPU: gpu_profiles/tuned/PROFILE/SHAPE.yaml.

A build that is given no knobs takes them from there. The files are strict: one that was written for other knobs than
this kogc has is an error that names the line, for its numbers would mean something else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import KogcError
from .files import write_text
from .plan.plan import Knobs
from .profile import GpuProfile
from .resources import data_dir
from .spec import ModelSpec

if TYPE_CHECKING:
    from .strict_yaml import Table

SHAPE = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
KNOBS = tuple(field.name for field in fields(Knobs))
HEADER = "# Found by `kogc tune`; builds for this GPU and shape use it. Tune again rather than edit.\n"


@dataclass(frozen=True)
class Setting:
    """What a tuner chooses: the number of blocks and the plan's knobs."""

    blocks: int
    knobs: Knobs

    def with_value(self, name: str, value: int) -> Setting:
        """The same but for one knob, or for `blocks`."""
        values = {"blocks": self.blocks, **asdict(self.knobs), name: value}
        return Setting(values.pop("blocks"), Knobs(**values))

    def value(self, name: str) -> int:
        return self.blocks if name == "blocks" else int(getattr(self.knobs, name))

    def changes(self, other: Setting) -> str:
        """What differs from `other`, such as `pace=700 prefetch=4`; `default` where nothing does."""
        names = ("blocks", *KNOBS)
        return " ".join(f"{n}={self.value(n)}" for n in names if self.value(n) != other.value(n)) or "default"


@dataclass(frozen=True)
class Measurement:
    """What the tuner measured: tokens/s before and after, the latter's share of the read ceiling, and how."""

    model: str
    depth: int
    tokens_per_second_before: float
    tokens_per_second: float
    share_of_ceiling: float
    how: str


@dataclass(frozen=True)
class Tuned:
    setting: Setting
    measured: Measurement


def shape_key(spec: ModelSpec) -> str:
    """The file name of a shape: models that differ in name, norms or rotary embedding alone share their settings."""
    letters = ("l", "h", "f", "q", "kv", "d", "v")
    return "-".join(f"{a}{getattr(spec, name)}" for a, name in zip(letters, SHAPE, strict=True)) + f"-{spec.dtype}"


def tuned_file(spec: ModelSpec, profile: GpuProfile, kv_dtype: str = "bf16") -> Path:
    suffix = "" if kv_dtype == "bf16" else f"-kv-{kv_dtype}"
    return data_dir("gpu_profiles") / "tuned" / profile.name / f"{shape_key(spec)}{suffix}.yaml"


def tuned_for(spec: ModelSpec, profile: GpuProfile, kv_dtype: str = "bf16") -> Tuned | None:
    """The setting found for this shape on this GPU; None where there is none. KogcError (file:line) for a bad file.

    With another cache than BF16's what was found for BF16 serves too, where nothing was found for that cache.
    """
    paths = (tuned_file(spec, profile, kind) for kind in (kv_dtype, "bf16"))
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else read_tuned(path, spec)


def knobs_for(spec: ModelSpec, profile: GpuProfile) -> Knobs | None:
    """The knobs of `tuned_for`."""
    found = tuned_for(spec, profile)
    return None if found is None else found.setting.knobs


def read_tuned(path: Path, spec: ModelSpec) -> Tuned:
    """Read a file written for the shape of `spec`. KogcError (file:line) for a wrong key, type, shape or number."""
    from . import strict_yaml

    table = strict_yaml.read(path)
    table.only(("shape", "blocks", "knobs", "measured"))
    _check_shape(table.table("shape"), spec)
    knobs = table.table("knobs")
    try:
        knobs.only(KNOBS)
    except KogcError as error:
        raise KogcError(f"{error}: written for the knobs of another kogc; run `kogc tune` again or delete it") from None
    values = {name: _count(knobs, name) for name in KNOBS}
    measured = table.table("measured")
    measured.only([field.name for field in fields(Measurement)])
    return Tuned(
        Setting(_count(table, "blocks", 1), Knobs(**values)),
        Measurement(
            model=measured.text("model"),
            depth=_count(measured, "depth"),
            tokens_per_second_before=measured.number("tokens_per_second_before"),
            tokens_per_second=measured.number("tokens_per_second"),
            share_of_ceiling=measured.number("share_of_ceiling"),
            how=measured.text("how"),
        ),
    )


def _check_shape(table: Table, spec: ModelSpec) -> None:
    table.only((*SHAPE, "dtype"))
    for name in SHAPE:
        if table.integer(name) != getattr(spec, name):
            raise table.error(name, f"{table.integer(name)}, but {spec.name} has {getattr(spec, name)}")
    if table.text("dtype") != spec.dtype:
        raise table.error("dtype", f"{table.text('dtype')}, but {spec.name} has {spec.dtype}")


def _count(table: Table, name: str, least: int = 0) -> int:
    value = table.integer(name)
    if value < least:
        raise table.error(name, f"{value} must be at least {least}")
    return value


def dump_tuned(tuned: Tuned, spec: ModelSpec) -> str:
    """The file's text; the same setting and measurement give the same text."""
    m = tuned.measured
    lines = ["shape:", *(f"  {name}: {getattr(spec, name)}" for name in SHAPE), f"  dtype: {spec.dtype}"]
    lines += [f"blocks: {tuned.setting.blocks}", "knobs:"]
    lines += [f"  {name}: {getattr(tuned.setting.knobs, name)}" for name in KNOBS]
    lines += ["measured:", f"  model: {_quoted(m.model)}", f"  depth: {m.depth}"]
    lines += [f"  tokens_per_second_before: {m.tokens_per_second_before:.2f}"]
    lines += [f"  tokens_per_second: {m.tokens_per_second:.2f}", f"  share_of_ceiling: {m.share_of_ceiling:.4f}"]
    lines += [f"  how: {_quoted(m.how)}"]
    return HEADER + "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def write_tuned(path: Path, tuned: Tuned, spec: ModelSpec) -> None:
    """Write the file, with its directory; KogcError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None
    write_text(path, dump_tuned(tuned, spec))
