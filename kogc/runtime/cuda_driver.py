"""The CUDA driver, and the checks that need no memory: driver, device, architecture."""

from __future__ import annotations

import ctypes
import importlib
import re
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..errors import KogcError
from ..profile import GpuProfile
from .gpu_driver import GpuDriver, Shape


class Driver(GpuDriver):
    """The CUDA driver, initialised. KogcError where there is no binding, no driver or no GPU."""

    library, prefix = "CUDA", "cu"

    def __init__(self) -> None:
        super().__init__()
        try:
            self.api = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise KogcError(f"running on a GPU needs cuda-bindings: pip install cuda-bindings ({error})") from None
        self.good, self.not_ready = self.api.CUresult.CUDA_SUCCESS, self.api.CUresult.CUDA_ERROR_NOT_READY
        try:
            status = self.api.cuInit(0)[0]
        except RuntimeError:  # the binding found no libcuda
            raise KogcError("no NVIDIA driver on this machine (libcuda.so.1 was not found)") from None
        if status == self.api.CUresult.CUDA_ERROR_NO_DEVICE:
            raise KogcError("no NVIDIA GPU on this machine (or CUDA_VISIBLE_DEVICES hides it)")
        if status != self.good:
            raise KogcError(f"the CUDA driver did not start: {self.name_of(status)}")

    def open(self, device: Any) -> None:
        """Take the primary context of a device, which is shared with other libraries, for all that follows."""
        self._context = self.call("cuDevicePrimaryCtxRetain", device)
        self._keep(device, "cuDevicePrimaryCtxRelease")
        self.use()

    def use(self) -> None:
        self.call("cuCtxSetCurrent", self._context)

    def stream(self) -> Any:
        return self._keep(self.call("cuStreamCreate", self.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamDestroy")

    def event(self) -> Any:
        return self._keep(self.call("cuEventCreate", self.CUevent_flags.CU_EVENT_DEFAULT), "cuEventDestroy")

    def alloc(self, count: int) -> int:
        address = int(self.call("cuMemAlloc", count))
        self._keep(address, "cuMemFree", address)
        return address

    def share(self, count: int) -> tuple[int, int]:
        flags = self.CU_MEMHOSTALLOC_DEVICEMAP | self.CU_MEMHOSTALLOC_PORTABLE
        address = int(self.call("cuMemHostAlloc", count, flags))
        self._keep(address, "cuMemFreeHost", address)
        return address, int(self.call("cuMemHostGetDevicePointer", address, 0))

    def clear(self, address: int, count: int, stream: Any = None) -> None:
        if stream is None:
            self.call("cuMemsetD8", address, 0, count)
        else:
            self.call("cuMemsetD8Async", address, 0, count, stream)

    def to_device(self, address: int, data: NDArray[Any], stream: Any = None) -> None:
        if stream is None:
            self.call("cuMemcpyHtoD", address, data.ctypes.data, data.nbytes)
        else:
            self.call("cuMemcpyHtoDAsync", address, data.ctypes.data, data.nbytes, stream)

    def to_host(self, out: NDArray[Any], address: int) -> None:
        self.call("cuMemcpyDtoH", out.ctypes.data, address, out.nbytes)

    def blocks_of(self, function: Any, threads: int, shared: int) -> int:
        opt_in = self.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.call("cuFuncSetAttribute", function, opt_in, shared)
        return int(self.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, shared))

    def launch(self, function: Any, shape: Shape, stream: Any, *values: Any, together: bool = True) -> None:
        blocks, threads, shared = shape
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        how = (blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers))
        if together:
            self.call("cuLaunchCooperativeKernel", function, *how)
        else:
            self.call("cuLaunchKernel", function, *how, 0)

    def close(self) -> None:
        if self._made:
            self.attempt("cuCtxSetCurrent", self._context)
        super().close()

    @property
    def version(self) -> tuple[int, int]:
        """The CUDA version that the driver supports."""
        number = int(self.call("cuDriverGetVersion"))
        return number // 1000, number % 1000 // 10


@dataclass(frozen=True)
class Gpu:
    """What a device says of itself. capability: e.g. (9, 0)."""

    name: str
    capability: tuple[int, int]
    sms: int
    smem_per_block: int
    memory_bytes: int


def open_gpu(driver: Driver, ordinal: int) -> tuple[Any, Gpu]:
    """Handle and facts of one device; KogcError for an ordinal that is not there."""
    count = int(driver.call("cuDeviceGetCount"))
    if not 0 <= ordinal < count:
        raise KogcError(f"device {ordinal}: this machine has {count} GPU{'s' if count != 1 else ''}, numbered from 0")
    handle = driver.call("cuDeviceGet", ordinal)
    kinds = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        return int(driver.call("cuDeviceGetAttribute", getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))

    raw = driver.call("cuDeviceGetName", 256, handle)
    capability = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
    smem = attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
    memory = int(driver.call("cuDeviceTotalMem", handle))
    return handle, Gpu(raw.split(b"\0")[0].decode(), capability, attribute("MULTIPROCESSOR_COUNT"), smem, memory)


def check_gpu(gpu: Gpu, profile: GpuProfile) -> None:
    """KogcError that says what to rebuild unless the binary, made for `profile`, can run on `gpu`."""
    if _runs_on(profile, gpu):
        return
    major, minor = gpu.capability
    here = f"{gpu.name} ({gpu.sms} SMs, compute capability {major}.{minor})"
    built = f"built for {profile.name} ({profile.sms} SMs, {profile.arch})"
    raise KogcError(f"{built}; this GPU is {here}: {_advice(gpu)}")


def check_driver(version: tuple[int, int], tools: dict[str, str]) -> None:
    """KogcError where the driver is older than the compiler's major version: it cannot load the binary."""
    compiler = tools.get("nvrtc", "")
    major = int(number[0]) if (number := re.match(r"\d+", compiler)) else 12
    if version[0] < major:
        made_by = f"NVRTC {compiler}" if compiler else f"CUDA {major}"
        have = f"{version[0]}.{version[1]}"
        raise KogcError(f"the driver supports CUDA {have}, the binary was made by {made_by}: update the NVIDIA driver")


def _runs_on(profile: GpuProfile, gpu: Gpu) -> bool:
    major, minor = gpu.capability
    same_arch = profile.arch.rstrip("af") == f"sm_{major}{minor}"
    return same_arch and profile.sms == gpu.sms and profile.smem_per_block <= gpu.smem_per_block


def _advice(gpu: Gpu) -> str:
    """Which shipped profile fits the device. Where the profiles (the compiler's) are not installed, none is named."""
    try:
        from ..targets.detect_cuda import CudaDevice, profile_by_architecture, profile_of

        device = CudaDevice(0, gpu.name, gpu.capability, gpu.sms, gpu.memory_bytes)
        fitting = profile_of(device) or ("auto" if profile_by_architecture(device) else None)
    except (ImportError, KogcError):
        fitting = None
    if fitting:
        return f"rebuild with --gpu {fitting}"
    return "no shipped profile fits it: describe it in a YAML profile and rebuild with --gpu FILE.yaml"
