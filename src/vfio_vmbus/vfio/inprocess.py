"""A function of this process as a VFIO device: what a socket or the kernel carries elsewhere is a call here.

The function lives on its host's loop; `run` carries a call there and brings the answer back (ClosedError when that loop has ended).
Memory is mapped anew for the function (it never sees the driver's pointers), and goes through its domain like anybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

from ..errors import ClosedError, UsageError
from ..memory.mapping import Mapping
from .device import REGION_MMAP, REGION_READ, REGION_WRITE, Device, DeviceInfo, Dma, Irq, Region
from .function import Function

T = TypeVar("T")
Run = Callable[[Callable[[], Any]], Any]


class _Window(Region):
    def __init__(self, function: Function, index: int, run: Run) -> None:
        self.index = index
        self._function = function
        self._window = function.windows[index]
        self._run = run
        self.size = self._window.size
        self.flags = REGION_READ | REGION_WRITE
        if self._window.memory is not None:
            self.flags |= REGION_MMAP
            self.areas = ((0, self.size),)

    def read(self, offset: int, size: int) -> bytes:
        return self._run(lambda: self._window.read(offset, size))

    def write(self, offset: int, data: bytes) -> None:
        self._run(lambda: self._window.write(offset, bytes(data)))

    def doorbell(self, offset: int) -> int:
        return self._run(lambda: self._function.doorbell_at(self.index, offset))

    def map(self, offset: int, size: int, *, wrap_from: int | None = None) -> Mapping:
        memory = self._window.memory
        if memory is None:
            return super().map(offset, size)
        return self._run(lambda: memory().map(offset, size, wrap_from=wrap_from))


class _Vectors(Irq):
    def __init__(self, function: Function, run: Run) -> None:
        self.index = function.irq
        self._function = function
        self._run = run
        self.count = len(function.vectors.fds)

    def enable(self, vector: int, eventfd: int) -> None:
        self._run(lambda: self._function.vectors.lead_to(vector, eventfd))

    def disable(self, vector: int) -> None:
        self._run(lambda: self._function.vectors.lead_to(vector, None))


class _Maps(Dma):
    def __init__(self, function: Function, run: Run) -> None:
        self._function = function
        self._run = run

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        self._run(lambda: self._function.domain.map(iova, fd, offset, size, access))

    def unmap(self, iova: int, size: int) -> None:
        self._run(lambda: self._function.domain.unmap(iova, size))


class InProcessDevice(Device):
    """The device over a function. `released` is called once, on the function's loop, after it was given back."""

    def __init__(self, function: Function, run: Run, released: Callable[[], None]) -> None:
        self.function = function
        self._call = run
        self._released = released
        self._open = True
        self._closing = Lock()
        self.info = DeviceInfo(
            function.name,
            regions=function.regions,
            irqs=function.irqs,
            resettable=True,
            isolation="software IOMMU",
            pci=function.pci,
        )
        self.dma = _Maps(function, self._run)
        self._regions = {index: _Window(function, index, self._run) for index in function.windows}
        self._irq = _Vectors(function, self._run)

    def region(self, index: int) -> Region:
        if index not in self._regions:
            raise UsageError(f"region {index}: this device has {', '.join(map(str, self._regions))}")
        return self._regions[index]

    def irq(self, index: int) -> Irq:
        if index != self._irq.index:
            raise UsageError(f"interrupt index {index}: this device has {self._irq.index} only")
        return self._irq

    def reset(self) -> None:
        self._run(self.function.reset)

    def close(self) -> None:
        with self._closing:
            if not self._open:
                return
            self._open = False
        with suppress(ClosedError):  # a host that has gone has taken everything back
            self._call(self._give_back)

    def _give_back(self) -> None:
        try:
            self.function.release()
        finally:
            self._released()

    def _run(self, call: Callable[[], T]) -> T:
        if not self._open:
            raise ClosedError(f"{self.function.name} is closed")
        return self._call(call)
