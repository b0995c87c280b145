"""The targets. A target module offers three functions:

version() -> str                            name and version of the compiler ("nvrtc 13.0"); KogcError without one
options(plan) -> list[str]                  compiler options that change the binary
compile_binary(rendered, plan) -> bytes     the binary of a rendered kernel
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from ..cache import Cache, content_key, default_cache
from ..errors import KogcError

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..profile import GpuProfile
    from ..render import Rendered

T = TypeVar("T")

TARGETS = ("cuda", "hip", "cpu")


def entry_points(plan: Plan) -> dict[str, str]:
    """The symbols of a plan's binary that a loader calls, by their purpose."""
    purposes = ["generate", "fill", *(["prompt"] if plan.passes else []), *(["samples"] if plan.samples else [])]
    return {purpose: f"kogc_{purpose}" for purpose in purposes}


def compile_binary(rendered: Rendered, plan: Plan, cache: Cache | None = None) -> bytes:
    """A rendered kernel as a cubin (cuda), a code object (hip) or a shared library (cpu), from the cache if there."""
    target = _target(plan.target)
    kept = default_cache() if cache is None else cache
    headers = [text for item in sorted(rendered.headers.items()) for text in item]
    key = content_key([plan.target, target.version(), *target.options(plan), rendered.source, *headers])

    def work() -> bytes:
        binary: bytes = target.compile_binary(rendered, plan)
        return binary

    # NVRTC is one long call into C, in which Ctrl-C would wait; the host compiler is a process, which Ctrl-C ends.
    return kept.get_or_make(key, lambda: _interruptible(work) if plan.target == "cuda" else work())


def compiler(plan: Plan) -> tuple[str, str]:
    """Name and version of the compiler that compile_binary would use."""
    name, _, version = str(_target(plan.target).version()).rpartition(" ")
    return name, version


def detect_profile() -> tuple[GpuProfile, str | None]:
    """The profile of this machine (`--gpu auto`), and a remark where a GPU was found that no profile describes."""
    from ..profile import load_profile
    from .detect import detect_cpu_profile
    from .detect_cuda import cuda_devices, profile_by_architecture, profile_of
    from .detect_hip import hip_devices
    from .detect_hip import profile_of as hip_profile_of

    note = None
    if devices := cuda_devices():
        if found := profile_of(devices[0]):
            return load_profile(found), None
        if made := profile_by_architecture(devices[0]):
            return made
        note = f"{devices[0].name} matches no GPU profile; building for the CPU"
    elif gpus := hip_devices():
        if found := hip_profile_of(gpus[0]):
            return load_profile(found), None
        note = f"{gpus[0].name} ({gpus[0].arch}) matches no GPU profile; building for the CPU"
    return load_profile(detect_cpu_profile()), note


def _target(name: str) -> ModuleType:
    if name not in TARGETS:
        raise KogcError(f"unknown target {name!r}: one of {', '.join(TARGETS)}")
    return importlib.import_module(f".{name}", __name__)


def _interruptible(work: Callable[[], T]) -> T:
    """Run `work` in a thread, so that the main thread hears Ctrl-C at once (the thread is then left behind)."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]
