"""hip-python's functions that the loader calls, on host memory; kernels run on the emulated machine, at once."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from emulator import STATUS, Emulated, EmulatorError

SUCCESS, NOT_READY, BAD_IMAGE = "hipSuccess", "hipErrorNotReady", "hipErrorInvalidImage"
NO_DEVICE, BAD_DEVICE = "hipErrorNoDevice", "hipErrorInvalidDevice"  # what different versions say where there is none


class FakeHip:
    """One AMD GPU. `kernel`: what its launches run; `log`: what was called, in order."""

    hipError_t = SimpleNamespace(
        hipSuccess=SUCCESS, hipErrorNotReady=NOT_READY, hipErrorNoDevice=NO_DEVICE, hipErrorInvalidDevice=BAD_DEVICE
    )  # fmt: skip
    hipMemcpyKind = SimpleNamespace(hipMemcpyHostToDevice=1, hipMemcpyDeviceToHost=2)
    hipStreamNonBlocking, hipHostMallocMapped, hipHostMallocCoherent = 1, 2, 1 << 30

    def __init__(self, arch: str, units: int, kernel: Emulated | None = None) -> None:
        self.kernel = kernel
        self.log: list[str] = []
        self.memory: dict[int, np.ndarray] = {}
        self.free, self.blocks_a_unit, self.devices = 192 << 30, 1, 1
        self.facts = SimpleNamespace(
            name="AMD Toy", gcnArchName=f"{arch}:sramecc+:xnack-", multiProcessorCount=units,
            sharedMemPerBlock=65536, totalGlobalMem=192 << 30,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        """Calls that only succeed."""
        if name in ("hipInit", "hipSetDevice", "hipStreamDestroy", "hipStreamSynchronize", "hipModuleUnload",
                    "hipEventRecord", "hipEventSynchronize", "hipEventQuery", "hipEventDestroy"):  # fmt: skip
            return lambda *args: self._note(name)
        raise AttributeError(name)

    def _note(self, name: str, *values: Any) -> tuple[Any, ...]:
        self.log.append(name)
        return (SUCCESS, *values)

    def hipGetDeviceCount(self) -> tuple[Any, ...]:
        return SUCCESS, self.devices

    def hipGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        return SUCCESS, self.facts

    def hipMemGetInfo(self) -> tuple[Any, ...]:
        return SUCCESS, self.free, 192 << 30

    def hipStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._note("hipStreamCreateWithFlags", 7)

    def hipEventCreate(self) -> tuple[Any, ...]:
        return self._note("hipEventCreate", 8)

    def hipEventElapsedTime(self, before: int, after: int) -> tuple[Any, ...]:
        return SUCCESS, 2.0

    def _allocate(self, name: str, count: int) -> tuple[Any, ...]:
        memory = np.full(count + 4096, 0xA5, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % 4096
        self.memory[address] = memory
        return self._note(name, address)

    def hipMalloc(self, count: int) -> tuple[Any, ...]:
        return self._allocate("hipMalloc", count)

    def hipHostMalloc(self, count: int, flags: int) -> tuple[Any, ...]:
        assert flags == self.hipHostMallocMapped | self.hipHostMallocCoherent
        return self._allocate("hipHostMalloc", count)

    def hipHostGetDevicePointer(self, address: int, flags: int) -> tuple[Any, ...]:
        return SUCCESS, address

    def hipFree(self, address: int) -> tuple[Any, ...]:
        del self.memory[address]
        return self._note("hipFree")

    hipHostFree = hipFree

    def hipMemset(self, address: int, value: int, count: int, stream: int = 0) -> tuple[Any, ...]:
        ctypes.memset(address, value, count)
        return self._note("hipMemset")

    hipMemsetAsync = hipMemset

    def hipMemcpy(self, to: int, source: int, count: int, kind: int) -> tuple[Any, ...]:
        ctypes.memmove(to, source, count)
        return self._note("hipMemcpy")

    def hipMemcpyAsync(self, to: int, source: int, count: int, kind: int, stream: int) -> tuple[Any, ...]:
        return self.hipMemcpy(to, source, count, kind)

    def hipModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        return (SUCCESS, 9) if image.startswith(b"\x7fELF") else (BAD_IMAGE, None)

    def hipModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        return SUCCESS, name.decode()

    def hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(
        self, function: str, threads: int, lds: int
    ) -> tuple[Any, ...]:
        return SUCCESS, self.blocks_a_unit

    def hipModuleLaunchKernel(self, function: str, *rest: Any) -> tuple[Any, ...]:
        blocks, _, _, threads, _, _, lds, _stream, pointers, extra = rest
        assert self.kernel
        assert extra is None
        message = ctypes.create_string_buffer(200)
        run = self.kernel.library
        u64, u32 = ctypes.c_uint64.from_address, ctypes.c_uint32.from_address
        if function == "kogc_fill":
            to, count, seed, amplitude, fp16 = pointers
            number = ctypes.c_float.from_address(amplitude)
            status = run.kogc_emulate_fill(u64(to), u64(count), u32(seed), number, u32(fp16), message)
        elif function == "kogc_read_ceiling":
            source, count, sink = (u64(p) for p in pointers)
            status = run.kogc_emulate_read(source, count, sink, blocks, threads, lds, message)
        else:
            status = run.kogc_emulate(ctypes.c_void_p(pointers[0]), blocks, threads, lds, ctypes.c_uint64(1), message)
        if status not in (0, 1):  # a stall is what the kernel itself reports
            raise EmulatorError(f"{STATUS[status]}: {message.value.decode()}")
        return self._note(function)
