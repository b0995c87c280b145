"""The targets. A target module offers two functions:

compile(rendered, plan, cache) -> bytes   the binary of a rendered kernel, from the cache where it is there already
compiler(plan) -> (name, version)         what would compile it; KogcError where there is no compiler
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from ..cache import Cache, default_cache
from ..errors import KogcError

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..render import Rendered

T = TypeVar("T")

TARGETS = ("cuda", "cpu")
ENTRY_POINTS = {"generate": "kogc_generate", "fill": "kogc_fill"}
THREADS = {"cuda": 288, "cpu": 1}  # of a block; cuda: 8 consumer warps and the producer


def compile_binary(rendered: Rendered, plan: Plan, cache: Cache | None = None) -> bytes:
    """Compile a rendered kernel for the plan's target: a cubin (cuda) or a shared library (cpu)."""
    module = _target(plan.target)
    kept = default_cache() if cache is None else cache

    def work() -> bytes:
        binary: bytes = module.compile(rendered, plan, kept)
        return binary

    # NVRTC is one long call into C, in which Ctrl-C would wait; the host compiler is a process, which Ctrl-C ends.
    return _interruptible(work) if plan.target == "cuda" else work()


def compiler(plan: Plan) -> tuple[str, str]:
    """Name and version of the compiler that compile_binary would use."""
    name, version = _target(plan.target).compiler(plan)
    return str(name), str(version)


def detect_profile() -> tuple[str, str | None]:
    """The profile of this machine (`--gpu auto`), and a remark where a GPU was found that no profile describes."""
    from .detect import detect_cpu_profile
    from .detect_cuda import cuda_devices, detect_cuda_profile

    if found := detect_cuda_profile():
        return found, None
    devices = cuda_devices()
    note = f"{devices[0].name} matches no GPU profile; building for the CPU" if devices else None
    return detect_cpu_profile(), note


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
