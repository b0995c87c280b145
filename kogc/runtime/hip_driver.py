"""HIP, and the checks that need no memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..errors import KogcError
from ..plan.plan import Plan
from .gpu_driver import GpuDriver, Shape


class Hip(GpuDriver):
    """HIP through hip-python, initialised. KogcError where there is no binding, no ROCm or no GPU."""

    library, prefix = "HIP", "hip"

    def __init__(self) -> None:
        super().__init__()
        try:
            from hip import hip  # not hip.hip: some versions have it as an attribute, some as a module
        except ImportError as error:
            raise KogcError(f"running on an AMD GPU needs hip-python: pip install 'kogc[hip]' ({error})") from None
        self.api = hip
        self.good, self.not_ready = hip.hipError_t.hipSuccess, hip.hipError_t.hipErrorNotReady
        try:
            (status,) = self.api.hipInit(0)
        except RuntimeError:  # the binding found no libamdhip64
            raise KogcError("no ROCm on this machine (libamdhip64.so was not found)") from None
        if status in (self.api.hipError_t.hipErrorNoDevice, self.api.hipError_t.hipErrorInvalidDevice):
            raise KogcError("no AMD GPU on this machine (or HIP_VISIBLE_DEVICES hides it)")
        if status != self.good:
            raise KogcError(f"HIP did not start: {self.name_of(status)}")

    def open(self, index: int) -> None:
        """Take a device for all that follows."""
        self._index = index
        self.use()

    def use(self) -> None:
        self.call("hipSetDevice", self._index)

    def stream(self) -> Any:
        return self._keep(self.call("hipStreamCreateWithFlags", self.hipStreamNonBlocking), "hipStreamDestroy")

    def event(self) -> Any:
        return self._keep(self.call("hipEventCreate"), "hipEventDestroy")

    def alloc(self, count: int) -> int:
        memory = self.call("hipMalloc", count)
        self._keep(memory, "hipFree", int(memory))
        return int(memory)

    def share(self, count: int) -> tuple[int, int]:
        flags = self.hipHostMallocMapped | self.hipHostMallocCoherent
        memory = self.call("hipHostMalloc", count, flags)
        self._keep(memory, "hipHostFree", int(memory))
        return int(memory), int(self.call("hipHostGetDevicePointer", memory, 0))

    def clear(self, address: int, count: int, stream: Any = None) -> None:
        if stream is None:
            self.call("hipMemset", address, 0, count)
        else:
            self.call("hipMemsetAsync", address, 0, count, stream)

    def to_device(self, address: int, data: NDArray[Any], stream: Any = None) -> None:
        how = address, int(data.ctypes.data), data.nbytes, self.hipMemcpyKind.hipMemcpyHostToDevice
        if stream is None:
            self.call("hipMemcpy", *how)
        else:
            self.call("hipMemcpyAsync", *how, stream)

    def to_host(self, out: NDArray[Any], address: int) -> None:
        self.call("hipMemcpy", int(out.ctypes.data), address, out.nbytes, self.hipMemcpyKind.hipMemcpyDeviceToHost)

    def blocks_of(self, function: Any, threads: int, shared: int) -> int:
        return int(self.call("hipModuleOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, shared))

    def launch(self, function: Any, shape: Shape, stream: Any, *values: Any, together: bool = True) -> None:
        # A plain launch does not see to it that all blocks are there at once; the runtime has asked before.
        blocks, threads, lds = shape
        how = (blocks, 1, 1, threads, 1, 1, lds, stream)
        self.call("hipModuleLaunchKernel", function, *how, [ctypes.addressof(v) for v in values], None)


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
