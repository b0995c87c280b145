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
    fitting = fitting_profiles(features)
    return fitting[-1] if fitting else None


def fitting_profiles(features: Iterable[str]) -> list[str]:
    """The CPU profiles whose features these include, those that ask for most last."""
    have = set(features)
    return [p.name for p in sorted(_cpu_profiles(), key=lambda p: len(p.flags)) if have.issuperset(p.flags)]


def _cpu_profiles() -> list[GpuProfile]:
    profiles = (load_profile(name) for name in list_profiles())
    return [p for p in profiles if p.target == "cpu"]
