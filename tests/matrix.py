"""docs/targets.md: every shipped model compiled for every GPU profile. `make matrix` writes it again (minutes)."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kogc.build import prepare
from kogc.errors import KogcError
from kogc.plan.plan import Plan
from kogc.profile import GpuProfile, list_profiles, load_profile
from kogc.render import render
from kogc.spec import list_specs
from kogc.targets import cuda, hip
from kogc.targets.code_object import read_kernels

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "targets.md"
RAN_ON_HARDWARE = ("h200-sxm",)
KERNEL = "kogc_generate"


@dataclass(frozen=True)
class Cell:
    """One model on one profile. refused: why there is no plan; the rest is zero then. spills: bytes.

    On AMD GPUs stages are loads of 16 bytes under way on each lane; scalars and resident are of them alone. passes:
    tokens of a pass over a prompt, 0 where prompts go token by token.
    """

    model: str
    gpu: str
    refused: str = ""
    registers: int = 0
    spills: int = 0
    shared_memory: int = 0
    stages: int = 0
    stage_bytes: int = 0
    blocks: int = 0
    scalars: int = 0
    resident: int = 0
    passes: int = 0
    pass_registers: int = 0

    @property
    def short(self) -> str:
        if self.refused:
            return "refused"
        if self.scalars:
            return f"{self.registers} v, {self.scalars} s, {self.stages} loads, {self.shared_memory / 1024:.0f} K"
        spills = f", spills {self.spills} B" if self.spills else ""
        memory = f"{self.stages} x {self.stage_bytes >> 10} K of {self.shared_memory / 1024:.0f} K"
        passes = f", {self.passes} tokens {self.pass_registers} r" if self.passes else ""
        return f"{self.registers} r, {memory}{passes}{spills}"


def profiles_of(target: str) -> list[GpuProfile]:
    return [p for p in map(load_profile, list_profiles()) if p.target == target]


def cuda_profiles() -> list[GpuProfile]:
    return profiles_of("cuda")


def hip_profiles() -> list[GpuProfile]:
    return profiles_of("hip")


def measure(plan: Plan) -> Cell:
    """Compile a plan, and what its kernel uses."""
    if plan.target == "hip":
        return _measure_code_object(plan)
    _, log = cuda.compile_logged(render(plan), plan)
    used = cuda.resource_usage(log)
    kernel, memory = used[KERNEL], plan.memory
    spills = max(max(u.get("stack", 0), u.get("spill_stores", 0)) for u in used.values())
    sizes = memory.bytes, memory.stages, plan.knobs.stage_bytes, plan.blocks
    passes = (plan.passes.tokens, used["kogc_prompt"]["registers"]) if plan.passes else (0, 0)
    return Cell(plan.spec.name, plan.profile.name, "", kernel["registers"], spills, *sizes, 0, 0, *passes)


def _measure_code_object(plan: Plan) -> Cell:
    kernel = read_kernels(hip.compile_binary(render(plan), plan))[KERNEL]  # refuses what spills
    where, lds = (plan.spec.name, plan.profile.name), plan.memory.bytes
    resident = kernel.blocks_resident(lds, plan.profile.smem_per_block)
    sizes = lds, plan.knobs.in_flight, plan.knobs.stage_bytes, plan.blocks
    return Cell(*where, "", kernel.vgprs, 0, *sizes, kernel.sgprs, resident)


def cell(pair: tuple[str, str]) -> Cell:
    model, gpu = pair
    try:
        return measure(prepare(model, gpu).plan)
    except KogcError as error:
        return Cell(model, gpu, str(error))


def document(cells: Iterable[Cell]) -> str:
    """The tables as Markdown."""
    of = {(c.model, c.gpu): c for c in cells}
    profiles, models = cuda_profiles(), list_specs()
    summary = [_summary(p, [of[m, p.name] for m in models]) for p in profiles]
    head = ("profile", "arch", "copies", "SMs", "shared memory a block", "compiled", "registers", "spills", "ran on")
    refused = [f"- {c.model} on {c.gpu}: {c.refused}" for c in of.values() if c.refused]
    parts = [
        HEADER.format(compiler=cuda.version().replace("nvrtc", "NVRTC")),
        _table(head, summary),
        DETAILS,
        _table(("model", *(p.name for p in profiles)), [(m, *(of[m, p.name].short for p in profiles)) for m in models]),
        *_amd(of, models),
        *(["Refused, with the line that the user gets:\n", "\n".join(refused)] if refused else []),
    ]
    return "\n".join(parts).rstrip() + "\n"


AMD_COLUMNS = (
    "profile", "arch", "products", "CUs", "LDS a block", "compiled", "VGPRs", "SGPRs", "spills", "blocks a CU",
    "ran on",
)  # fmt: skip


def _amd(of: dict[tuple[str, str], Cell], models: list[str]) -> list[str]:
    profiles = hip_profiles()
    summary = [_amd_summary(p, [of[m, p.name] for m in models]) for p in profiles]
    detail = [(m, *(of[m, p.name].short for p in profiles)) for m in models]
    head = AMD.format(compiler=hip.version())
    return [head, _table(AMD_COLUMNS, summary), AMD_DETAILS, _table(("model", *(p.name for p in profiles)), detail)]


def _amd_summary(profile: GpuProfile, cells: list[Cell]) -> tuple[str, ...]:
    good = [c for c in cells if not c.refused]

    def span(values: list[int], unit: str = "") -> str:
        return f"{min(values)} to {max(values)}{unit}" if values else "-"

    return (
        profile.name,
        f"`{profile.arch}`",
        "MFMA" if profile.lanes == 64 else "WMMA",
        str(profile.sms),
        span([c.shared_memory >> 10 for c in good], " KiB"),
        f"{len(good)} of {len(cells)}",
        span([c.registers for c in good]),
        span([c.scalars for c in good]),
        "none",
        str(min((c.resident for c in good), default=0)),
        "nothing: only compiled",
    )


def _summary(profile: GpuProfile, cells: list[Cell]) -> tuple[str, ...]:
    good = [c for c in cells if not c.refused]
    registers = [c.registers for c in good]
    return (
        profile.name,
        f"`{profile.arch}`",
        "bulk" if profile.bulk_copies else "16 bytes a lane",
        str(profile.sms),
        f"{profile.smem_per_block >> 10} KiB",
        f"{len(good)} of {len(cells)}",
        f"{min(registers)} to {max(registers)}" if registers else "-",
        str(sum(1 for c in good if c.spills)) if any(c.spills for c in good) else "none",
        "hardware" if profile.name in RAN_ON_HARDWARE else "nothing: only compiled",
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


HEADER = """# Targets

Written by `make matrix` ({compiler}); `kogc gpus` lists the profiles. **Only h200-sxm has run on hardware.** For all
other GPUs the table says that the kernels compile, with which registers and how much shared memory, not that they are
right or fast there: their profiles hold data-sheet facts, and their settings are derived from what was measured on an
H200. The copies of 16 bytes a lane run on the emulator, with bugs planted in them too, and ran on an H200 that a
profile of its own called `sm_90`: llama-3.2-1b at 74.6 % of the read ceiling, logits compared with the reference.
"""
DETAILS = """
Each cell: registers a thread, stages of the ring and their size, of the shared memory a block; tokens of a pass over
a prompt, and registers of that kernel. GPUs before Hopper have no bulk copies: all lanes of four producer warps copy
there (`templates/cuda/async_copies.cuh`); the order of phases, the partition and the exchanges are the same. Where few
stages of 16 KiB fit beside a model's vectors they are of 8 KiB, and where the ring does not hold a chunk of keys and
values (128 positions), attention takes it stage by stage.
"""


AMD = """
## AMD

**No AMD GPU has run these kernels.** They are compiled by {compiler}, without ROCm; the very source runs on the
emulator with waves of 64 and of 32 lanes, where it is compared with Transformers and where planted bugs are found; and
the loader was tested on a stand-in for hip-python. Speed and what the hardware's memory model allows beyond what the
compiler documents are unknown, and every setting is derived from data sheets.

CDNA3 and CDNA4 multiply with MFMA, RDNA4 with WMMA. There is no ring in LDS: each wave loads the weights that it
multiplies itself, 16 bytes a lane, non-temporal, into registers, across phases, layers and tokens
(`templates/hip/stream.h`). Blocks exchange vectors by relaxed atomics of agent scope, without fences; a block is one
workgroup of eight waves, and blocks are numbered XCD by XCD. The launch is a plain one; the loader asks the runtime
whether all blocks fit at once. `blocks a CU` is computed from registers and LDS.
"""
AMD_DETAILS = """
Each cell: vector registers of a lane, scalar registers of a wave, loads of 16 bytes that each lane has under way, LDS
of a block.
"""


def main() -> None:
    profiles = [*cuda_profiles(), *hip_profiles()]
    pairs = [(model, profile.name) for profile in profiles for model in list_specs()]
    with ProcessPoolExecutor(2) as pool:
        DOCUMENT.write_text(document(pool.map(cell, pairs)), encoding="utf-8")


if __name__ == "__main__":
    main()
