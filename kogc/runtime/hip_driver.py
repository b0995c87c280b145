"""The HIP runtime through hip-python with errors as exceptions, and the checks that need no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import KogcError
from ..plan.plan import Plan


class Hip:
    """The library, initialised. KogcError where there is no binding, no ROCm or no GPU."""

    def __init__(self) -> None:
        try:
            from hip import hip  # not hip.hip: some versions have it as an attribute, some as a module
        except ImportError as error:
            raise KogcError(f"running on an AMD GPU needs hip-python: pip install 'kogc[hip]' ({error})") from None
        self.api: Any = hip
        try:
            (status,) = self.api.hipInit(0)
        except RuntimeError:  # the binding found no libamdhip64
            raise KogcError("no ROCm on this machine (libamdhip64.so was not found)") from None
        if status in (self.api.hipError_t.hipErrorNoDevice, self.api.hipError_t.hipErrorInvalidDevice):
            raise KogcError("no AMD GPU on this machine (or HIP_VISIBLE_DEVICES hides it)")
        if status != self.api.hipError_t.hipSuccess:
            raise KogcError(f"HIP did not start: {self.name_of(status)}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.api, name)

    def name_of(self, status: Any) -> str:
        return str(getattr(status, "name", status))

    def call(self, name: str, *args: Any) -> Any:
        """Call `name`; returns its one value, a tuple of several, or None. KogcError names the call and its status."""
        status, *values = getattr(self.api, name)(*args)
        if status != self.api.hipError_t.hipSuccess:
            raise KogcError(f"HIP: {name}: {self.name_of(status)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def attempt(self, name: str, *args: Any) -> None:
        """Call `name` while cleaning up: after a kernel died every call fails, and there is nothing left to undo."""
        getattr(self.api, name)(*args)


@dataclass(frozen=True)
class HipGpu:
    """What a device says of itself. units: compute units, or pairs of them on RDNA. lds: bytes of a workgroup."""

    index: int
    name: str
    arch: str
    units: int
    lds: int
    memory_bytes: int


def hip_gpus(hip: Hip) -> list[HipGpu]:
    """All visible devices, in HIP's order."""
    return [_gpu(hip, index) for index in range(int(hip.call("hipGetDeviceCount")))]


def open_gpu(hip: Hip, index: int) -> HipGpu:
    """One device's facts; KogcError for an index that is not there."""
    count = int(hip.call("hipGetDeviceCount"))
    if not 0 <= index < count:
        raise KogcError(f"device {index}: this machine has {count} GPU{'s' if count != 1 else ''}, numbered from 0")
    return _gpu(hip, index)


def check_gpu(gpu: HipGpu, plan: Plan) -> None:
    """KogcError that says what to rebuild unless the plan's binary can run on `gpu`.

    How many compute units there are is no question here: whether all blocks fit is asked of the kernel itself.
    """
    need = plan.memory.bytes
    if gpu.arch == plan.profile.arch and gpu.lds >= need:
        return
    here = f"{gpu.name} ({gpu.arch}, {gpu.lds} bytes of LDS a block)"
    built = f"built for {plan.profile.name} ({plan.profile.arch}, needs {need})"
    raise KogcError(f"{built}; this GPU is {here}: {_advice(gpu)}")


def _gpu(hip: Hip, index: int) -> HipGpu:
    facts = hip.call("hipGetDeviceProperties", index)
    return HipGpu(
        index=index,
        name=_text(facts.name),
        arch=_text(facts.gcnArchName).partition(":")[0],
        units=int(facts.multiProcessorCount),
        lds=int(facts.sharedMemPerBlock),
        memory_bytes=int(facts.totalGlobalMem),
    )


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _advice(gpu: HipGpu) -> str:
    """Which shipped profile fits the device. Where the profiles (the compiler's) are not installed, none is named."""
    try:
        from ..targets.detect_hip import profile_of

        fitting = profile_of(gpu)
    except (ImportError, KogcError):
        fitting = None
    if fitting:
        return f"rebuild with --gpu {fitting}"
    return "no shipped profile fits it: describe it in a YAML profile and rebuild with --gpu FILE.yaml"
