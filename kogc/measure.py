"""Measure a GPU's read ceiling, for a profile of its own: the loader's kernel that reads and computes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .build import BuildOptions, build
from .errors import KogcError
from .profile import GpuProfile, Measured, load_profile
from .session import load

MODEL = "llama-3.2-1b"  # its kernel brings the one that reads; any number of blocks has work in it
CONTEXT = 128
FEWER = (0, 1, 2, 4, 8, 12)  # blocks than the GPU has SMs
WAYS = {
    True: "cp.async.bulk ring into shared memory",
    False: "cp.async ring into shared memory",
    "hip": "non-temporal loads into registers",
}
MARGIN = 1.005  # as many blocks as the profile has, unless others read so much faster

Report = Callable[[int, float], None]


def measure_profile(gpu: str, report: Report = lambda blocks, rate: None) -> tuple[GpuProfile, dict[int, float]]:
    """The profile of the first GPU with its ceiling measured, and bytes/s by number of blocks.

    `gpu`: a profile's name or file, or `auto`. KogcError without a GPU, or where the profile is not this GPU's.
    """
    profile = _profile(gpu)
    rates = {}
    for blocks in sorted({profile.blocks, *(profile.sms - fewer for fewer in FEWER)} - {0}):
        if 0 < blocks <= profile.sms:
            rates[blocks] = read_ceiling(gpu, blocks)
            report(blocks, rates[blocks])
    best = max(rates, key=lambda blocks: rates[blocks])
    if rates[best] <= rates[profile.blocks] * MARGIN:
        best = profile.blocks
    way = WAYS[profile.target if profile.target == "hip" else profile.bulk_copies]
    how = f"{way}, {best} blocks, array far larger than L2"
    return replace(profile, measured=Measured(rates[best], how, best), blocks=best), rates


def read_ceiling(gpu: str, blocks: int) -> float:
    """Bytes/s that this many blocks read."""
    with tempfile.TemporaryDirectory(prefix="kogc-profile-") as directory:
        out = Path(directory) / "artifact"
        build(MODEL, gpu, out, BuildOptions(CONTEXT, blocks, dummy_weights=True))
        with load(out) as session:
            return session.runtime.read_bandwidth()


def _profile(gpu: str) -> GpuProfile:
    from .runtime.cuda_driver import Driver, check_gpu, open_gpu
    from .targets import detect_profile

    profile = detect_profile()[0] if gpu == "auto" else load_profile(gpu)
    if profile.target == "hip":
        return profile  # the loader checks the GPU
    _, here = open_gpu(Driver(), 0)  # says why where there is none
    if profile.target != "cuda":
        raise KogcError(f"{profile.name} is no GPU profile: --measure reads a GPU's memory ({here.name} is here)")
    check_gpu(here, profile)
    return profile
