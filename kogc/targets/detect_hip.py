"""Which AMD GPUs are here, and which profile describes them. A machine without ROCm has none: no error."""

from __future__ import annotations

from ..errors import KogcError
from ..profile import GpuProfile, list_profiles, load_profile
from ..runtime.hip_driver import Hip, HipGpu, hip_gpus

MEMORY_TOLERANCE = 0.1  # of what a product has: drivers keep some


def hip_devices() -> list[HipGpu]:
    """All visible GPUs, in HIP's order."""
    try:
        return hip_gpus(Hip())
    except KogcError:
        return []


def profile_of(gpu: HipGpu) -> str | None:
    """The shipped profile with this device's architecture, compute units and memory; its name decides between two."""
    fitting = [profile for profile in _hip_profiles() if matches(profile, gpu)]
    return min(fitting, key=lambda profile: profile.product != gpu.name).name if fitting else None


def matches(profile: GpuProfile, gpu: HipGpu) -> bool:
    units = (profile.sms, profile.sms // 2) if profile.lanes == 32 else (profile.sms,)  # RDNA counts pairs
    near = abs(profile.memory_bytes - gpu.memory_bytes) <= MEMORY_TOLERANCE * profile.memory_bytes
    return profile.arch == gpu.arch and gpu.units in units and near


def _hip_profiles() -> list[GpuProfile]:
    profiles = (load_profile(name) for name in list_profiles())
    return [p for p in profiles if p.target == "hip"]
