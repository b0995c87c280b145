"""Which CPU profile describes this machine best."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import KogcError
from ..profile import GpuProfile, list_profiles, load_profile
from .cpu_features import cpu_features


def detect_cpu_profile() -> str:
    """The CPU profile with the most features that this machine has all of; KogcError on a machine below AVX2."""
    found = best_profile(cpu_features())
    if found is None:
        raise KogcError("no profile fits this machine's CPU: the cpu target needs x86-64 with AVX2, FMA and F16C")
    return found


def best_profile(features: Iterable[str]) -> str | None:
    """The profile for a processor with these features; None where it lacks some of every profile's."""
    have = set(features)
    fitting = [p for p in _cpu_profiles() if have.issuperset(p.flags)]
    return max(fitting, key=lambda p: len(p.flags)).name if fitting else None


def _cpu_profiles() -> list[GpuProfile]:
    profiles = (load_profile(name) for name in list_profiles())
    return [p for p in profiles if p.target == "cpu"]
