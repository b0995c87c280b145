"""A GPU's driver API with errors as exceptions, in the words that CUDA and HIP share.

The two name most calls alike, after a prefix; a subclass brings the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ..errors import KogcError

Shape = tuple[int, int, int]  # of a launch: blocks, threads of each, bytes of shared memory of each


class GpuDriver(ABC):
    """The library, initialised; what is made through it is given back by `close`, the last first.

    api: the binding's module. good, not_ready: two of its statuses. Every method but `attempt` and those that return
    a status raises KogcError naming the call and its status.
    """

    library: str  # as messages name it
    prefix: str  # of its functions' names
    api: Any
    good: Any
    not_ready: Any

    def __init__(self) -> None:
        self._made: list[tuple[int, Callable[[], None]]] = []  # address (0: no memory), and how to give it back

    def __getattr__(self, name: str) -> Any:
        return getattr(self.api, name)

    def name_of(self, status: Any) -> str:
        return str(getattr(status, "name", status))

    def call(self, name: str, *args: Any) -> Any:
        """Call `name`; returns its one value, a tuple of several, or None."""
        status, *values = getattr(self.api, name)(*args)
        if status != self.good:
            raise KogcError(f"{self.library}: {name}: {self.name_of(status)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def attempt(self, name: str, *args: Any) -> None:
        """Call `name` while cleaning up: after a kernel died every call fails, and there is nothing left to undo."""
        getattr(self.api, name)(*args)

    # -- where they differ

    @abstractmethod
    def use(self) -> None:
        """Make the device this thread's own: a session may move between threads."""

    @abstractmethod
    def stream(self) -> Any:
        """A stream that does not wait for the default one."""

    @abstractmethod
    def event(self) -> Any:
        """An event that notes its time."""

    @abstractmethod
    def alloc(self, count: int) -> int:
        """Address of so many bytes of device memory."""

    @abstractmethod
    def share(self, count: int) -> tuple[int, int]:
        """Pinned memory that a kernel writes and the host reads meanwhile: its address here, and on the device."""

    @abstractmethod
    def clear(self, address: int, count: int, stream: Any = None) -> None:
        """Set bytes to 0, in a stream or at once."""

    @abstractmethod
    def to_device(self, address: int, data: NDArray[Any], stream: Any = None) -> None:
        """Copy a contiguous array to an address on the device, in a stream or at once.

        At once means that the array may go: a kernel of another stream can come before it has arrived.
        """

    @abstractmethod
    def to_host(self, out: NDArray[Any], address: int) -> None:
        """Fill a contiguous array from an address on the device."""

    @abstractmethod
    def blocks_of(self, function: Any, threads: int, shared: int) -> int:
        """How many blocks of a kernel a multiprocessor holds at once."""

    @abstractmethod
    def launch(self, function: Any, shape: Shape, stream: Any, *values: Any, together: bool = True) -> None:
        """Launch a kernel; `values` are ctypes objects, copied before this returns.

        together: its blocks wait for each other, so all must run at once.
        """

    # -- where they are alike

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""
        free, total = self.call(f"{self.prefix}MemGetInfo")
        return int(free), int(total)

    def load(self, image: bytes, name: str) -> Any:
        """A binary as a module; `name` is the binary's in an error."""
        status, module = getattr(self.api, f"{self.prefix}ModuleLoadData")(image)
        if status != self.good:
            raise KogcError(f"{name}: the driver does not load it ({self.name_of(status)}); rebuild the artifact")
        return self._keep(module, f"{self.prefix}ModuleUnload")

    def function(self, module: Any, symbol: bytes, name: str) -> Any:
        status, function = getattr(self.api, f"{self.prefix}ModuleGetFunction")(module, symbol)
        if status != self.good:
            raise KogcError(f"{name}: has no {symbol.decode()}; rebuild the artifact")
        return function

    def record(self, event: Any, stream: Any) -> None:
        self.call(f"{self.prefix}EventRecord", event, stream)

    def status(self, event: Any) -> Any:
        """Whether what was recorded before the event is done: `good`, `not_ready`, or how it failed."""
        return getattr(self.api, f"{self.prefix}EventQuery")(event)[0]

    def await_event(self, event: Any) -> None:
        self.call(f"{self.prefix}EventSynchronize", event)

    def await_stream(self, stream: Any) -> None:
        self.call(f"{self.prefix}StreamSynchronize", stream)

    def milliseconds(self, before: Any, after: Any) -> float:
        return float(self.call(f"{self.prefix}EventElapsedTime", before, after))

    def free(self, address: int) -> None:
        """Give memory back, of the device or pinned, before `close` does."""
        at = next(i for i, (made, _) in enumerate(self._made) if made == address)
        self._made.pop(at)[1]()

    def close(self) -> None:
        while self._made:
            self._made.pop()[1]()

    def _keep(self, handle: Any, undo: str, address: int = 0) -> Any:
        """Remember that `undo` takes the handle back."""
        self._made.append((address, lambda: self.attempt(undo, handle)))
        return handle
