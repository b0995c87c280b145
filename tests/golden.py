"""The reference sources under generated/: `make golden` writes them again, tests/test_golden.py compares them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kogc.importer import spec_from_dir
from kogc.plan.plan import Options, make_plan
from kogc.profile import load_profile
from kogc.render import SUFFIX, Rendered, render
from kogc.spec import load_spec

TOP = Path(__file__).resolve().parent.parent
GENERATED = TOP / "generated"
DEMO = TOP / "examples" / "demo" / "checkpoint"
# (spec, profile, blocks): a CPU has no number of blocks of its own.
PAIRS = (
    ("demo", "cpu-avx2", 4), ("llama-3.2-1b", "h200-sxm", None), ("qwen3-0.6b", "h200-sxm", None),
    ("llama-3.2-1b", "mi300x", None),
)  # fmt: skip


def golden(model: str, gpu: str, blocks: int | None) -> Rendered:
    """The rendered source of one pair."""
    spec = replace(spec_from_dir(DEMO)[0], name="demo") if model == "demo" else load_spec(model)
    return render(make_plan(spec, load_profile(gpu), Options(blocks=blocks)))


def file_of(model: str, gpu: str) -> Path:
    return GENERATED / f"{model}.{gpu}.{SUFFIX[load_profile(gpu).target]}"


def main() -> None:
    GENERATED.mkdir(exist_ok=True)
    for model, gpu, blocks in PAIRS:
        file_of(model, gpu).write_text(golden(model, gpu, blocks).source, encoding="utf-8")


if __name__ == "__main__":
    main()
