"""The GPU profile: what one product is (data sheet) and what was measured on it, with how it was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import KogcError
from .plan.matvec import WARPS
from .resources import data_dir

if TYPE_CHECKING:
    from . import strict_yaml

TARGETS = ("cuda", "hip", "cpu")
# sm_90 without the `a` is Hopper by the path of the GPUs before it: a profile of one's own can ask for it.
BULK_ARCHS = ("sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a")
CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", *BULK_ARCHS)
HIP_ARCHS = ("gfx942", "gfx950", "gfx1201")
CPU_ARCHS = ("avx2", "avx512", "avx512-bf16")
ARCHS = {"cuda": CUDA_ARCHS, "hip": HIP_ARCHS, "cpu": CPU_ARCHS}


@dataclass(frozen=True)
class Measured:
    """A read bandwidth in bytes/s (None: not measured), how it was measured, and with how many blocks."""

    read_bandwidth: float | None
    how: str
    blocks: int


@dataclass(frozen=True)
class GpuProfile:
    """Facts of one product. Bytes and bytes/s throughout; 0 on a CPU means: ask the machine at hand.

    target: cuda, hip or cpu. arch: the compiler's name of the instruction set (sm_90a, sm_89; gfx942; avx2, avx512).
    sms: streaming multiprocessors (hip: compute units; cpu: 0, the machine's cores). smem_per_block: the opt-in maximum
    (hip: LDS of a workgroup). flags: CPU features the code needs, in the names /proc/cpuinfo uses (GPUs: empty).
    blocks: how many blocks a launch has unless the build says otherwise (cpu: 0, one a core).
    """

    name: str
    target: str
    product: str
    arch: str
    sms: int
    smem_per_block: int
    l2_bytes: int
    memory_bytes: int
    bandwidth_datasheet: float
    measured: Measured
    blocks: int
    flags: tuple[str, ...]

    @property
    def bulk_copies(self) -> bool:
        """Whether the GPU copies a stage of the ring with one instruction, rather than 16 bytes a lane."""
        return self.arch in BULK_ARCHS

    @property
    def lanes(self) -> int:
        """Threads that run in step: 64 on CDNA, 32 on all other GPUs."""
        return 64 if self.arch.startswith("gfx9") else 32

    @property
    def unit(self) -> str:
        """What runs a block, in words."""
        return "compute units" if self.target == "hip" else "SMs"

    @property
    def threads(self) -> int:
        """Threads of a block that multiply."""
        return WARPS * self.lanes

    @property
    def ceiling(self) -> float:
        """The best known read bandwidth in bytes/s: measured where it was, else the data sheet's; 0 if unknown."""
        measured = self.measured.read_bandwidth
        return self.bandwidth_datasheet if measured is None else measured


PROFILE_KEYS = (
    "name", "target", "product", "arch", "sms", "smem_per_block", "l2_bytes", "memory_bytes", "bandwidth_datasheet",
    "measured", "blocks", "flags",
)  # fmt: skip


def list_profiles() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(p.stem for p in data_dir("gpu_profiles").glob("*.yaml"))


def load_profile(name: str) -> GpuProfile:
    """A shipped profile by name, or one from a path that ends in .yaml; KogcError lists the known names."""
    from . import strict_yaml  # only here: the loader has profiles too, and needs no YAML

    if name.endswith((".yaml", ".yml")):
        return _from_table(strict_yaml.read(Path(name)))
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        path = data_dir("gpu_profiles") / f"{name}.yaml"
        if path.is_file():
            return _from_table(strict_yaml.read(path))
    raise KogcError(f"unknown GPU {name!r}: one of {', '.join(list_profiles())}")


def parse_profile(text: str, file: str = "profile.yaml") -> GpuProfile:
    """Read a profile from YAML text; `file` names it in errors."""
    from . import strict_yaml

    return _from_table(strict_yaml.parse(text, file))


def dump_profile(profile: GpuProfile, head: str) -> str:
    """The profile as YAML that load_profile reads; `head` is the comment above it."""
    rate = profile.measured.read_bandwidth
    lines = [f"# {head}", f"name: {profile.name}", f"target: {profile.target}", f"product: {_quoted(profile.product)}"]
    lines += [f"arch: {profile.arch}", f"sms: {profile.sms}", f"smem_per_block: {profile.smem_per_block}"]
    lines += [f"l2_bytes: {profile.l2_bytes}", f"memory_bytes: {profile.memory_bytes}"]
    lines += [f"bandwidth_datasheet: {profile.bandwidth_datasheet:.4g}", "measured:"]
    lines += [
        f"  read_bandwidth: {'null' if rate is None else f'{rate:.4g}'}",
        f"  how: {_quoted(profile.measured.how)}",
    ]
    lines += [
        f"  blocks: {profile.measured.blocks}",
        f"blocks: {profile.blocks}",
        f"flags: [{', '.join(profile.flags)}]",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _from_table(table: strict_yaml.Table) -> GpuProfile:
    table.only(PROFILE_KEYS)
    target = table.text("target")
    if target not in TARGETS:
        raise table.error("target", f"unknown target {target!r} (known: {', '.join(TARGETS)})")
    archs = ARCHS[target]
    arch = table.text("arch")
    if arch not in archs:
        raise table.error("arch", f"unknown arch {arch!r} of target {target} (known: {', '.join(archs)})")
    name = table.text("name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise table.error("name", f"{name[:40]!r} must be letters, digits, '.', '_' or '-'")
    # A GPU's sizes are facts that the plan depends on; a CPU's are read from the machine.
    least = 0 if target == "cpu" else 1
    profile = GpuProfile(
        name=name,
        target=target,
        product=table.text("product"),
        arch=arch,
        sms=_count(table, "sms", least),
        smem_per_block=_count(table, "smem_per_block", least),
        l2_bytes=_count(table, "l2_bytes", least),
        memory_bytes=_count(table, "memory_bytes", least),
        bandwidth_datasheet=_rate(table, "bandwidth_datasheet", least),
        measured=_read_measured(table.table("measured")),
        blocks=_count(table, "blocks", least),
        flags=table.words("flags"),
    )
    if target != "cpu" and profile.blocks > profile.sms:
        raise table.error("blocks", f"{profile.blocks} is more than sms ({profile.sms}): every block must be resident")
    return profile


def _read_measured(table: strict_yaml.Table) -> Measured:
    table.only(("read_bandwidth", "how", "blocks"))
    rate = None if table.is_null("read_bandwidth") else _rate(table, "read_bandwidth", 1)
    return Measured(rate, table.text("how"), _count(table, "blocks", 0))


def _count(table: strict_yaml.Table, key: str, least: int) -> int:
    value = table.integer(key)
    if value < least:
        raise table.error(key, f"{value} must be at least {least}")
    return value


def _rate(table: strict_yaml.Table, key: str, least: int) -> float:
    value = table.number(key)
    if value < least:
        raise table.error(key, f"{value} must be at least {least}")
    return value
