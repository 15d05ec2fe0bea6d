"""A PCI function of this process as a VFIO device: what a socket or the kernel carries elsewhere is a call here.

The function lives on its host's loop; `run` carries a call there and brings the answer back (ClosedError when that loop has ended).
Memory is mapped anew for the function (it never sees the driver's pointers), and goes through its domain like anybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

from ..errors import ClosedError, UsageError
from ..wire.vfio import PCI_IRQS, PCI_REGIONS
from .device import BAR0_REGION, MSIX_IRQ, REGION_READ, REGION_WRITE, Device, DeviceInfo, Dma, Irq, Region
from .function import PciFunction
from .registers import REG_DOORBELLS

T = TypeVar("T")
Run = Callable[[Callable[[], Any]], Any]


class _Window(Region):
    flags = REGION_READ | REGION_WRITE

    def __init__(self, function: PciFunction, index: int, run: Run) -> None:
        self.index = index
        self._function = function
        self._window = function.windows[index]
        self._run = run
        self.size = self._window.size

    def read(self, offset: int, size: int) -> bytes:
        return self._run(lambda: self._window.read(offset, size))

    def write(self, offset: int, data: bytes) -> None:
        self._run(lambda: self._window.write(offset, bytes(data)))

    def doorbell(self, offset: int) -> int:
        if self.index != BAR0_REGION or offset < REG_DOORBELLS or offset % 4:
            raise UsageError(f"no doorbell register at {offset:#x} of region {self.index}")
        return self._run(lambda: self._function.doorbell((offset - REG_DOORBELLS) // 4))


class _Msix(Irq):
    index = MSIX_IRQ

    def __init__(self, function: PciFunction, run: Run) -> None:
        self._function = function
        self._run = run
        self.count = len(function.vectors.fds)

    def enable(self, vector: int, eventfd: int) -> None:
        self._run(lambda: self._function.vectors.lead_to(vector, eventfd))

    def disable(self, vector: int) -> None:
        self._run(lambda: self._function.vectors.lead_to(vector, None))


class _Maps(Dma):
    def __init__(self, function: PciFunction, run: Run) -> None:
        self._function = function
        self._run = run

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        self._run(lambda: self._function.domain.map(iova, fd, offset, size, access))

    def unmap(self, iova: int, size: int) -> None:
        self._run(lambda: self._function.domain.unmap(iova, size))


class InProcessDevice(Device):
    """The device over a PciFunction. `released` is called once, on the function's loop, after it was given back."""

    def __init__(self, function: PciFunction, run: Run, released: Callable[[], None]) -> None:
        self.function = function
        self._call = run
        self._released = released
        self._open = True
        self._closing = Lock()
        self.info = DeviceInfo(function.name, regions=PCI_REGIONS, irqs=PCI_IRQS, resettable=True, isolation="software IOMMU")
        self.dma = _Maps(function, self._run)
        self._regions = {index: _Window(function, index, self._run) for index in function.windows}
        self._msix = _Msix(function, self._run)

    def region(self, index: int) -> Region:
        if index not in self._regions:
            raise UsageError(f"region {index}: this device has {', '.join(map(str, self._regions))}")
        return self._regions[index]

    def irq(self, index: int) -> Irq:
        if index != MSIX_IRQ:
            raise UsageError(f"interrupt index {index}: this device has {MSIX_IRQ} (MSI-X) only")
        return self._msix

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
