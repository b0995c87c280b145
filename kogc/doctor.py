"""What this machine has of all that kogc can use. Looking never fails: what cannot be found is reported as missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .cache import cache_dir, default_cache

REQUIRED = (
    "click", "cuda-bindings", "jinja2", "numpy", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "pyyaml", "rich",
    "tokenizers",
)  # fmt: skip
OPTIONAL = ("huggingface_hub", "ziglang", "hip-python")
COMPILERS = ("c++", "g++", "clang++")
VERSION_SECONDS = 10


def examine() -> dict[str, Any]:
    """Plain data, ready for JSON; None and empty lists mean: not found. Sizes in bytes."""
    nvrtc = _attempt(nvrtc_version)
    cxx = _attempt(cxx_version)
    devices = cuda_report()
    hip = hip_report()
    cpu = cpu_report()
    builds = {"cuda": nvrtc, "hip": hip["compiler"], "cpu": cxx and cpu["profile"]}
    return {
        "kogc": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "nvrtc": nvrtc,
        "cuda": devices,
        "hip": hip,
        "compilers": cxx_compilers(),
        "cxx": cxx,
        "cpu": cpu,
        "cache": cache_report(),
        "hub_cache": hub_cache(),
        "builds": [target for target, compiler in builds.items() if compiler],
        "runs": [*(d["profile"] for d in (*devices["devices"], *hip["devices"]) if d["profile"]), *cpu["profiles"]],
    }


def missing_packages(report: dict[str, Any]) -> list[str]:
    return [name for name in REQUIRED if report["packages"][name] is None]


def nvrtc_version() -> str:
    """Version of the NVRTC library that would compile ("13.0")."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(str(status))
    return f"{major}.{minor}"


def cxx_version() -> str:
    """Name and version of the C++ compiler that a build would use."""
    from .targets.cpu import version

    return version()


def cuda_report() -> dict[str, Any]:
    """The driver's CUDA version, and each GPU with the profile that describes it."""
    from .targets.detect_cuda import cuda_devices, driver_version, profile_of

    devices = _attempt(cuda_devices) or []
    return {
        "driver": _attempt(driver_version),
        "devices": [{**asdict(device), "profile": profile_of(device)} for device in devices],
    }


def hip_version() -> str:
    """Name and version of the compiler that a build for AMD GPUs would use."""
    from .targets.hip import version

    return version()


def hip_report() -> dict[str, Any]:
    """What compiles for AMD GPUs, and each of them that is here with the profile that describes it."""
    from .targets.detect_hip import hip_devices, profile_of

    devices = _attempt(hip_devices) or []
    return {
        "compiler": _attempt(hip_version),
        "devices": [{**asdict(device), "profile": profile_of(device)} for device in devices],
    }


def cxx_compilers() -> list[dict[str, str]]:
    """C++ compilers on the path, and the ziglang wheel; each with the first line of its --version."""
    found = []
    for name in COMPILERS:
        path = shutil.which(name)
        version = path and _first_line([path, "--version"])
        if path and version:
            found.append({"name": name, "path": path, "version": version})
    if zig := _version("ziglang"):
        found.append({"name": "zig c++", "path": f"{sys.executable} -m ziglang c++", "version": zig})
    return found


def cpu_report() -> dict[str, Any]:
    """Cores that this process may use, CPU features that matter to profiles, and the profile that fits best."""
    from .targets.detect import detect_cpu_profile, fitting_profiles

    features = _attempt(_cpu_features) or []
    return {
        "machine": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "features": features,
        "profile": _attempt(detect_cpu_profile),
        "profiles": fitting_profiles(features),
    }


def cache_report() -> dict[str, Any]:
    entries, size = default_cache().size()
    place = cache_dir()
    above = next(p for p in (place, *place.absolute().parents) if p.exists())
    writable = above.is_dir() and os.access(above, os.W_OK)
    return {"dir": str(place), "entries": entries, "bytes": size, "writable": writable}


def hub_cache() -> str:
    """Where huggingface_hub keeps what it downloads, by its own rules."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return cache
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return str(Path(home).expanduser() / "hub")


def _attempt(look: Callable[[], Any]) -> Any:
    """The result of looking; None where looking fails in whatever way the library at hand fails."""
    try:
        return look()
    except Exception:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=VERSION_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _cpu_features() -> list[str]:
    from .targets.cpu_features import cpu_features

    return sorted(cpu_features())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
