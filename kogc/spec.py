"""The model spec: the facts of one dense decoder, read from and written to YAML. It holds no policy.

All sizes are counts of elements. The activation is always SiLU; attention scores are scaled by head_dim ** -0.5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import KogcError
from .resources import data_dir

if TYPE_CHECKING:
    from . import strict_yaml

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = ("bf16", "fp16")
# What the attention phases can tile: a head is read in steps of 32 elements, and 128 is the widest that is laid out.
HEAD_DIMS = (32, 64, 96, 128)
MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
# Rotary numbers and their products stay inside FP32.
MAX_ROPE = 1e12

SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": ("factor", "original_max_position", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched. Fields that the type does not use are None.

    attention_factor (yarn) multiplies both cosine and sine; it is always the resolved number.
    """

    type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the whole head: base frequency and optional scaling."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a model. `sliding_layers` None with a window set means every layer uses the window."""

    name: str
    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool
    norm_eps: float
    max_context: int
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    sliding_layers: tuple[int, ...] | None
    rope: Rope
    dtype: str
    bos_token: int | None
    eos_tokens: tuple[int, ...]

    @property
    def q_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key projection (and of the value projection)."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of query, key and value projections together."""
        return self.q_rows + 2 * self.kv_rows

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def window(self, layer: int) -> int | None:
        """Positions that attention of `layer` sees, the current one included; None: all of them."""
        if self.sliding_window is None:
            return None
        if self.sliding_layers is None or layer in self.sliding_layers:
            return self.sliding_window
        return None


SPEC_KEYS = (
    "name", "family", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied_embeddings",
    "norm_eps", "max_context", "qkv_bias", "qk_norm", "sliding_window", "sliding_layers", "rope", "dtype",
    "bos_token", "eos_tokens",
)  # fmt: skip


def list_specs() -> list[str]:
    """Names of the shipped specs, sorted."""
    return sorted(p.stem for p in data_dir("model_specs").glob("*.yaml"))


def load_spec(path_or_name: str | Path) -> ModelSpec:
    """Read a spec from a YAML file, or a shipped one by its name. KogcError names file and line."""
    from . import strict_yaml  # only here: the loader has specs too, and needs no YAML

    return _from_table(strict_yaml.read(find_spec(path_or_name)))


def parse_spec(text: str, file: str = "spec.yaml") -> ModelSpec:
    """Read a spec from YAML text; `file` names it in errors."""
    from . import strict_yaml

    return _from_table(strict_yaml.parse(text, file))


def find_spec(path_or_name: str | Path) -> Path:
    """The YAML file that a path or a shipped name stands for; KogcError where there is none."""
    text = str(path_or_name)
    # A name has no separator and no suffix, so it can never reach outside the shipped directory.
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        shipped = data_dir("model_specs") / f"{text}.yaml"
        if shipped.is_file():
            return shipped
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in text or isinstance(path_or_name, Path):
        raise KogcError(f"{text}: no such spec file")
    raise KogcError(f"unknown model spec {text!r}: neither a file nor one of {', '.join(list_specs())}")


def dump_spec(spec: ModelSpec) -> str:
    """The spec as YAML text that load_spec reads back unchanged; keys in a fixed order, so it is reproducible."""
    lines: list[str] = []
    for key in SPEC_KEYS:
        value = getattr(spec, key)
        if key == "rope":
            lines += _dump_rope(spec.rope)
        else:
            lines.append(f"{key}: {_dump_value(value)}")
    return "\n".join(lines) + "\n"


def validate(spec: ModelSpec, where: str) -> None:
    """Refuse a spec whose facts contradict each other; the error begins with `where: key:`."""
    problem = _problem(spec)
    if problem is not None:
        raise KogcError(f"{where}: {problem[0]}: {problem[1]}")


def _from_table(table: strict_yaml.Table) -> ModelSpec:
    table.only(SPEC_KEYS)
    spec = ModelSpec(
        name=table.text("name"),
        family=table.text("family"),
        layers=table.integer("layers"),
        hidden=table.integer("hidden"),
        ffn=table.integer("ffn"),
        heads=table.integer("heads"),
        kv_heads=table.integer("kv_heads"),
        head_dim=table.integer("head_dim"),
        vocab=table.integer("vocab"),
        tied_embeddings=table.boolean("tied_embeddings"),
        norm_eps=table.number("norm_eps"),
        max_context=table.integer("max_context"),
        qkv_bias=table.boolean("qkv_bias"),
        qk_norm=table.boolean("qk_norm"),
        sliding_window=None if table.is_null("sliding_window") else table.integer("sliding_window"),
        sliding_layers=None if table.is_null("sliding_layers") else table.integers("sliding_layers"),
        rope=_read_rope(table.table("rope")),
        dtype=table.text("dtype"),
        bos_token=None if table.is_null("bos_token") else table.integer("bos_token"),
        eos_tokens=table.integers("eos_tokens"),
    )
    problem = _problem(spec)
    if problem is None:
        return spec
    # rope.* problems are reported at the line of the inner key.
    key, message = problem
    inner = table
    *outer, last = key.split(".")
    for part in outer:
        inner = inner.table(part)
    raise inner.error(last, message)


def _read_rope(table: strict_yaml.Table) -> Rope:
    table.only(("theta", "scaling"))
    theta = table.number("theta")
    if table.is_null("scaling"):
        return Rope(theta)
    inner = table.table("scaling")
    kind = inner.text("type")
    if kind not in SCALING_KEYS:
        raise inner.error("type", f"unknown rope scaling {kind!r} (known: {', '.join(SCALING_KEYS)})")
    inner.only(("type", *SCALING_KEYS[kind]))
    values: dict[str, float | int | bool] = {}
    for key in SCALING_KEYS[kind]:
        if key == "original_max_position":
            values[key] = inner.integer(key)
        elif key == "truncate":
            values[key] = inner.boolean(key)
        else:
            values[key] = inner.number(key)
    return Rope(theta, RopeScaling(kind, **values))  # type: ignore[arg-type]


def _dump_rope(rope: Rope) -> list[str]:
    lines = ["rope:", f"  theta: {_dump_value(rope.theta)}"]
    scaling = rope.scaling
    if scaling is None:
        return [*lines, "  scaling: null"]
    lines += ["  scaling:", f"    type: {scaling.type}"]
    return lines + [f"    {key}: {_dump_value(getattr(scaling, key))}" for key in SCALING_KEYS[scaling.type]]


def _dump_value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(str(v) for v in value) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", value) and value.lower() != "null" else _quote(value)
    return str(value)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _problem(spec: ModelSpec) -> tuple[str, str] | None:
    """The first fault as (key, message), or None."""
    for check in (_identity_problem, _size_problem, _family_problem, _window_problem, _rope_problem, _token_problem):
        problem = check(spec)
        if problem is not None:
            return problem
    return None


def _identity_problem(spec: ModelSpec) -> tuple[str, str] | None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", spec.name):
        return "name", f"{spec.name[:40]!r} must be 1 to 100 letters, digits, '.', '_' or '-'"
    if spec.family not in FAMILIES:
        return "family", f"unknown family {spec.family!r} (known: {', '.join(FAMILIES)})"
    if spec.dtype not in DTYPES:
        return "dtype", f"unknown dtype {spec.dtype!r} (known: {', '.join(DTYPES)})"
    return None


def _size_problem(spec: ModelSpec) -> tuple[str, str] | None:
    for key in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_context"):
        value = getattr(spec, key)
        limit = MAX_LAYERS if key == "layers" else MAX_SIZE
        if not 1 <= value <= limit:
            return key, f"{value} is outside 1 to {limit}"
    if spec.head_dim not in HEAD_DIMS:
        return "head_dim", f"{spec.head_dim} is not supported (one of {', '.join(map(str, HEAD_DIMS))})"
    if spec.heads % spec.kv_heads:
        return "kv_heads", f"{spec.kv_heads} does not divide heads ({spec.heads})"
    if not 0.0 < spec.norm_eps < 1.0:
        return "norm_eps", f"{spec.norm_eps} is outside 0 to 1"
    return None


def _family_problem(spec: ModelSpec) -> tuple[str, str] | None:
    if spec.qkv_bias != (spec.family == "qwen2"):
        return "qkv_bias", f"{_dump_value(spec.qkv_bias)} contradicts family {spec.family}"
    if spec.qk_norm != (spec.family == "qwen3"):
        return "qk_norm", f"{_dump_value(spec.qk_norm)} contradicts family {spec.family}"
    return None


def _window_problem(spec: ModelSpec) -> tuple[str, str] | None:
    if spec.sliding_window is None:
        if spec.sliding_layers is not None:
            return "sliding_layers", "given without sliding_window"
        return None
    if not 1 <= spec.sliding_window <= MAX_SIZE:
        return "sliding_window", f"{spec.sliding_window} is outside 1 to {MAX_SIZE}"
    layers = spec.sliding_layers
    if layers is None:
        return None
    if not layers:
        return "sliding_layers", "empty: no layer would use sliding_window (write sliding_window: null)"
    if list(layers) != sorted(set(layers)):
        return "sliding_layers", "must rise without repeats"
    if layers[0] < 0 or layers[-1] >= spec.layers:
        return "sliding_layers", f"layers go from 0 to {spec.layers - 1}"
    return None


def _rope_problem(spec: ModelSpec) -> tuple[str, str] | None:
    if not 1.0 < spec.rope.theta <= MAX_ROPE:
        return "rope.theta", f"{spec.rope.theta} must be above 1 and at most {MAX_ROPE:g}"
    scaling = spec.rope.scaling
    if scaling is None:
        return None
    if scaling.type not in SCALING_KEYS:
        return "rope.scaling.type", f"unknown rope scaling {scaling.type!r} (known: {', '.join(SCALING_KEYS)})"
    for key in SCALING_KEYS[scaling.type]:
        value = getattr(scaling, key)
        if value is None:
            return f"rope.scaling.{key}", f"needed by type {scaling.type}"
        if key != "truncate" and not 1 / MAX_ROPE <= value <= MAX_ROPE:
            return f"rope.scaling.{key}", f"{value} is outside {1 / MAX_ROPE:g} to {MAX_ROPE:g}"
    if scaling.factor < 1.0:
        return "rope.scaling.factor", f"{scaling.factor} must be at least 1"
    if scaling.type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if low is not None and high is not None and low >= high:
            return "rope.scaling.low_freq_factor", f"{low} must be below high_freq_factor ({high})"
    if scaling.type == "yarn":
        slow, fast = scaling.beta_slow, scaling.beta_fast
        if slow is not None and fast is not None and slow >= fast:
            return "rope.scaling.beta_slow", f"{slow} must be below beta_fast ({fast})"
    return None


def _token_problem(spec: ModelSpec) -> tuple[str, str] | None:
    if spec.bos_token is not None and not 0 <= spec.bos_token < spec.vocab:
        return "bos_token", f"{spec.bos_token} is outside the vocabulary (0 to {spec.vocab - 1})"
    for token in spec.eos_tokens:
        if not 0 <= token < spec.vocab:
            return "eos_tokens", f"{token} is outside the vocabulary (0 to {spec.vocab - 1})"
    if len(set(spec.eos_tokens)) != len(spec.eos_tokens):
        return "eos_tokens", "holds a token twice"
    return None
