"""Which NVIDIA GPUs are here, and which profile describes them. A machine without a driver has none: no error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..profile import GpuProfile, Measured, list_profiles, load_profile

MEMORY_TOLERANCE = 0.1  # drivers keep some of a product's memory; two products of one chip differ by more than this


@dataclass(frozen=True)
class CudaDevice:
    """One GPU as the driver reports it; 0 where it does not say. bandwidth: bytes/s by its clock and bus width."""

    index: int
    name: str
    capability: tuple[int, int]
    sms: int
    memory_bytes: int
    l2_bytes: int = 0
    smem_per_block: int = 0
    bandwidth: float = 0.0


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
    """The shipped profile of the first GPU; None without a GPU or where no profile describes it."""
    devices = cuda_devices()
    return profile_of(devices[0]) if devices else None


def profile_of(device: CudaDevice) -> str | None:
    """The shipped profile with this device's compute capability, SM count and memory; its name decides between two."""
    fitting = [profile for profile in _of_architecture(device) if matches(profile, device)]
    return min(fitting, key=lambda profile: profile.product != device.name).name if fitting else None


def profile_by_architecture(device: CudaDevice) -> tuple[GpuProfile, str] | None:
    """A profile made for a GPU that none describes, from the nearest of its architecture, and a remark that says so.

    None where no profile has this compute capability.
    """
    like = min(_of_architecture(device), key=lambda profile: abs(profile.sms - device.sms), default=None)
    if like is None:
        return None
    own = replace(
        like,
        name=f"{like.arch}-{device.sms}sms",
        product=device.name,
        sms=device.sms,
        blocks=max(1, like.blocks * device.sms // like.sms),
        smem_per_block=device.smem_per_block or like.smem_per_block,
        l2_bytes=device.l2_bytes or like.l2_bytes,
        memory_bytes=device.memory_bytes,
        bandwidth_datasheet=device.bandwidth or like.bandwidth_datasheet * device.sms / like.sms,
        measured=Measured(None, "not measured", 0),
    )
    size = f"{device.sms} SMs and {device.memory_bytes / 1e9:.1f} GB"
    return (
        own,
        f"{device.name} has no profile: taking that of {like.name} by architecture ({like.arch}), with its own {size}",
    )


def _of_architecture(device: CudaDevice) -> list[GpuProfile]:
    """The shipped profiles whose binaries run on this device's compute capability."""
    arch = f"sm_{device.capability[0]}{device.capability[1]}"
    profiles = (load_profile(name) for name in list_profiles())
    return [p for p in profiles if p.target == "cuda" and p.arch.rstrip("af") == arch]


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
        l2_bytes=ask(attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
        smem_per_block=ask(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        # kHz, twice a clock, and bits
        bandwidth=2e3
        * ask(attribute.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)
        * ask(attribute.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)
        / 8,
    )
