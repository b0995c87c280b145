"""Render a plan into the one source of its monokernel: its constants, and the headers it stands on."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import jinja2

from .plan.exchange import rows_listed
from .plan.matvec import MatVec
from .plan.plan import Plan
from .plan.shared_memory import PARTIAL_UNITS, SAMPLING_BYTES
from .profile import GpuProfile
from .resources import data_dir

PASSES = (  # left out where a block's memory does not hold a pass of many tokens
    "cuda/pass_layout.cuh", "cuda/pass_stream.cuh", "cuda/pass_product.cuh", "cuda/merge.cuh",
    "cuda/pass_attention.cuh", "cuda/pass.cuh",
)  # fmt: skip
SAMPLES = (  # left out where there are no passes, or a block's memory does not hold 16 columns of activations
    "cuda/sample_layout.cuh", "cuda/sample_stream.cuh", "cuda/sample_product.cuh", "cuda/sample_attention.cuh",
    "cuda/sample_choice.cuh", "cuda/sample_residual.cuh", "cuda/samples.cuh",
)  # fmt: skip
# Where a header of the generated source is found, in the order of inclusion; `{target}` is the target's directory.
HEADERS = {
    "cuda": (
        "common/args.h", "cuda/machine.cuh", "cuda/bulk_copies.cuh", "common/spin.h", "common/numbers.h",
        "common/fp8.h", "common/exchange.h", "common/partition.h", "common/cache.h", "common/words.h", "common/trace.h",
        "cuda/stream.cuh", "cuda/matvec.cuh", "common/residual.h", "cuda/tiles.cuh", "cuda/attention.cuh",
        "common/attention.h", "common/splits.h", "common/random.h", "common/choice.h", "common/logprobs.h",
        "common/threshold.h", "common/shortlist.h", "common/sampling.h", "common/decoder.h", "cuda/kernels.cuh",
        *PASSES, *SAMPLES,
    ),
    "hip": (
        "hip/machine.h", "common/args.h", "common/spin.h", "common/numbers.h", "common/fp8.h", "hip/matrix.h",
        "common/exchange.h", "common/partition.h", "common/cache.h", "common/words.h", "common/trace.h",
        "hip/stream.h", "hip/matvec.h", "common/residual.h", "hip/attention.h",
        "common/attention.h", "common/splits.h", "common/random.h", "common/choice.h", "common/logprobs.h",
        "common/threshold.h", "common/shortlist.h", "common/sampling.h", "common/decoder.h", "hip/kernels.h",
    ),
    "cpu": (
        "common/args.h", "cpu/machine.hpp", "common/spin.h", "common/numbers.h", "common/fp8.h",
        "common/exchange.h", "common/partition.h", "common/cache.h", "common/words.h", "common/trace.h",
        "cpu/stream.hpp", "cpu/matvec.hpp", "common/residual.h", "cpu/attention.hpp",
        "common/attention.h", "common/splits.h", "common/random.h", "common/choice.h", "common/logprobs.h",
        "common/threshold.h", "common/shortlist.h", "common/sampling.h", "common/decoder.h", "cpu/kernels.hpp",
    ),
}  # fmt: skip
ASYNC_COPIES = "cuda/async_copies.cuh"  # instead of bulk_copies.cuh, on GPUs that have none
SUFFIX = {"cuda": "cu", "hip": "hip", "cpu": "cpp"}


@dataclass(frozen=True)
class Rendered:
    """A monokernel's source text and the headers it includes, by the name it includes them under."""

    name: str
    source: str
    headers: dict[str, str]


def headers_of(profile: GpuProfile, passes: bool = True, samples: bool = True) -> tuple[str, ...]:
    """The headers of a profile's sources, in the order of inclusion; with those of passes and samples, if wanted."""
    left_out = (() if passes else PASSES) + (() if samples else SAMPLES)
    files = tuple(f for f in HEADERS[profile.target] if f not in left_out)
    return files if profile.bulk_copies else tuple(f.replace("cuda/bulk_copies.cuh", ASYNC_COPIES) for f in files)


def render(plan: Plan, templates: Path | None = None) -> Rendered:
    """The source of `plan`, from a directory of templates (those that ship); the same plan gives the same text."""
    templates = templates or data_dir("templates")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    files = headers_of(plan.profile, plan.passes is not None, plan.samples is not None)
    source = environment.get_template("monokernel.jinja").render(
        plan=plan,
        headers=files,
        model=_model_constants(plan),
        window=_window_expression(plan),
        gather_splits=min(plan.knobs.gather_splits, plan.splits),
        partial_units=PARTIAL_UNITS,
        sampling_bytes=SAMPLING_BYTES,
        rows_listed=rows_listed(plan.blocks),
        phases=[(_struct(p), p) for p in plan.phases],
        passes=plan.passes,
        cpu_passes=plan.cpu_passes,
        pass_phases=[(_struct(p.phase), p) for p in plan.passes.products] if plan.passes else [],
        samples=plan.samples,
        sample_phases=[(_struct(p.phase), p) for p in plan.samples.products] if plan.samples else [],
        samples_rows_listed=rows_listed(plan.samples.choosers) if plan.samples else 0,
    )
    headers = {name: (templates / name).read_text() for name in files}
    return Rendered(f"{plan.spec.name}_{plan.profile.name}.{SUFFIX[plan.target]}", source, headers)


def _struct(phase: MatVec) -> str:
    return "".join(word.capitalize() for word in phase.name.split("_"))


def _model_constants(plan: Plan) -> list[tuple[str, tuple[str, str]]]:
    s = plan.spec
    integers = {
        "LAYERS": s.layers, "HIDDEN": s.hidden, "FFN": s.ffn, "VOCAB": s.vocab, "HEADS": s.heads,
        "KV_HEADS": s.kv_heads, "GROUP": s.group, "HEAD_DIM": s.head_dim, "Q_ROWS": s.q_rows,
    }  # fmt: skip
    flags = {"FP16": s.dtype == "fp16", "QKV_BIAS": s.qkv_bias, "QK_NORM": s.qk_norm}
    floats = {"NORM_EPS": s.norm_eps, "INVERSE_SQRT_HEAD_DIM": 1 / sqrt(s.head_dim)}
    return [
        *((name, ("int", str(value))) for name, value in integers.items()),
        *((name, ("bool", str(value).lower())) for name, value in flags.items()),
        *((name, ("float", f"{value!r}f")) for name, value in floats.items()),
    ]


def _window_expression(plan: Plan) -> str:
    """A C expression for the sliding window of `layer`, 0 for full attention."""
    s = plan.spec
    windowed = [layer for layer in range(s.layers) if plan.window(layer)]
    if not windowed:
        return "0"
    if len(windowed) == s.layers:
        return str(s.sliding_window)
    test = "0"
    for first in reversed(range(0, s.layers, 64)):  # 64 layers to a word of bits
        word = sum(1 << (layer - first) for layer in windowed if first <= layer < first + 64)
        test = f"layer < {first + 64} ? {word}ull >> (layer - {first}) & 1 : {test}"
    return f"({test}) ? {s.sliding_window} : 0"
