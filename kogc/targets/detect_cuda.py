"""Which NVIDIA GPUs are here, and which profile describes them. A machine without a driver has none: no error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..profile import GpuProfile, list_profiles, load_profile

MEMORY_TOLERANCE = 0.1  # drivers keep some of a product's memory; two products of one chip differ by more than this


@dataclass(frozen=True)
class CudaDevice:
    """One GPU as the driver reports it."""

    index: int
    name: str
    capability: tuple[int, int]
    sms: int
    memory_bytes: int


def driver_version() -> str | None:
    """The CUDA version the installed driver supports ("13.0"); None without a driver."""
    driver = _driver()
    if driver is None:
        return None
    version: int = _value(driver.cuDriverGetVersion()) or 0
    return f"{version // 1000}.{version % 1000 // 10}"


def cuda_devices() -> list[CudaDevice]:
    """All visible GPUs, in the driver's order."""
    driver = _driver()
    if driver is None:
        return []
    count = _value(driver.cuDeviceGetCount()) or 0
    return [_device(driver, index) for index in range(count)]


def detect_cuda_profile() -> str | None:
    """The profile of the first GPU; None without a GPU or where no profile describes it."""
    devices = cuda_devices()
    return profile_of(devices[0]) if devices else None


def profile_of(device: CudaDevice) -> str | None:
    """The shipped profile with this device's compute capability, SM count and memory."""
    for name in list_profiles():
        profile = load_profile(name)
        if profile.target == "cuda" and matches(profile, device):
            return name
    return None


def matches(profile: GpuProfile, device: CudaDevice) -> bool:
    major, minor = device.capability
    same_chip = profile.arch.rstrip("af") == f"sm_{major}{minor}" and profile.sms == device.sms
    return same_chip and abs(profile.memory_bytes - device.memory_bytes) <= MEMORY_TOLERANCE * profile.memory_bytes


def _driver() -> Any | None:
    """The driver's bindings after cuInit; None where the library or every device is missing."""
    try:
        from cuda.bindings import driver

        status = driver.cuInit(0)[0]
    except Exception:  # the bindings raise their own types for a missing driver library
        return None
    return driver if status == driver.CUresult.CUDA_SUCCESS else None


def _value(answer: tuple[Any, ...]) -> Any | None:
    return answer[1] if int(answer[0]) == 0 else None


def _device(driver: Any, index: int) -> CudaDevice:
    handle = _value(driver.cuDeviceGet(index))
    attribute = driver.CUdevice_attribute

    def ask(which: Any) -> int:
        return int(_value(driver.cuDeviceGetAttribute(which, handle)) or 0)

    name = _value(driver.cuDeviceGetName(128, handle)) or b""
    return CudaDevice(
        index=index,
        name=name.split(b"\0")[0].decode(errors="replace"),
        capability=(
            ask(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            ask(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        ),
        sms=ask(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        memory_bytes=int(_value(driver.cuDeviceTotalMem(handle)) or 0),
    )
