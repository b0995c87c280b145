"""The HIP runtime: checks the device, and copies the weights.

It has never run on an AMD GPU: what is tested is that it calls hip-python as it is documented, on a stand-in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import KogcError
from . import Program
from .gpu import GpuRuntime
from .hip_driver import Hip, check_gpu, open_gpu

UPLOAD_BYTES = 64 << 20  # of the weights file at a time


class HipRuntime(GpuRuntime):
    """See Runtime. `device` counts the visible GPUs from 0."""

    def __init__(self, program: Program, device: int = 0) -> None:
        driver = Hip()
        gpu = open_gpu(driver, device)
        check_gpu(gpu, program.plan)
        driver.open(gpu.index)
        super().__init__(program, driver, gpu.name, gpu.units)

    def _copy_weights(self, source: Path) -> None:
        size = self.program.weights_bytes
        try:
            file = np.memmap(source, np.uint8, "r", shape=(size,))
        except (OSError, ValueError) as error:
            raise KogcError(f"{source}: {error}; rebuild the artifact") from None
        for start in range(0, size, UPLOAD_BYTES):
            self._driver.to_device(self._weights + start, file[start : start + UPLOAD_BYTES])
