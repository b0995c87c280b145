"""The CUDA runtime: checks the device and the driver, and copies the weights on a stream of their own."""

from __future__ import annotations

from pathlib import Path

from . import Program
from .cuda_driver import Driver, check_driver, check_gpu, open_gpu
from .samples import SamplesRuntime
from .upload import Uploader


class CudaRuntime(SamplesRuntime):
    """See Runtime. `device` counts the visible GPUs from 0; the primary context is shared with other libraries."""

    def __init__(self, program: Program, device: int = 0) -> None:
        self._cuda = Driver()
        handle, gpu = open_gpu(self._cuda, device)
        check_gpu(gpu, program.plan.profile)
        check_driver(self._cuda.version, program.tools)
        self._cuda.open(handle)
        super().__init__(program, self._cuda, gpu.name, gpu.sms)

    def _copy_weights(self, source: Path) -> None:
        uploader = Uploader(self._cuda)
        try:
            uploader.copy_file(self._weights, source, self.program.weights_bytes)
            uploader.finish()
        finally:
            uploader.close()
