"""`Device`: a device as VFIO shows it. Regions, interrupts, DMA and reset; nothing of VMBus.

Every way to a device implements this: in the same process (`inprocess`), over a socket, through the kernel. Drivers cannot tell which.
Source: Linux include/uapi/linux/vfio.h (names and numbers of regions and interrupts of a vfio-pci device).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType

from ..errors import UsageError
from ..memory.mapping import Mapping

BAR0_REGION = 0
CONFIG_REGION = 7
MSIX_IRQ = 2

REGION_READ = 1
REGION_WRITE = 2
REGION_MMAP = 4

IRQ_EVENTFD = 1
IRQ_MASKABLE = 2
IRQ_AUTOMASKED = 4
IRQ_NORESIZE = 8


@dataclass(frozen=True)
class DeviceInfo:
    """name: for people. isolation: what keeps the driver inside its own memory ("software IOMMU", ...), "" if nothing does.

    pci: is it a PCI device, whose regions and interrupts have the numbers of vfio-pci?
    """

    name: str
    regions: int
    irqs: int
    resettable: bool
    isolation: str
    pci: bool = True


class Region(ABC):
    """`size` bytes of a device's registers or memory. `flags`: REGION_READ, REGION_WRITE, REGION_MMAP.

    areas: (offset, size) of the parts that `map` takes, in bytes.
    """

    index: int
    size: int
    flags: int
    areas: tuple[tuple[int, int], ...] = ()

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset`. Raises UsageError outside the region or for an access the device does not have."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at `offset`. Raises as `read`."""

    @abstractmethod
    def doorbell(self, offset: int) -> int:
        """An eventfd that stands for a write to the 32-bit register at `offset` (ioeventfd). It stays the device's: do not close it."""

    def map(self, offset: int, size: int, *, wrap_from: int | None = None) -> Mapping:
        """Map whole pages of one of `areas` into this process; the caller closes it. wrap_from: as for `Mapping`, for rings.

        Raises UsageError outside of the areas, DmaError for memory that could be taken away again or cannot be mapped like this.
        """
        raise UsageError(f"{size:#x} bytes at {offset:#x} of region {self.index} cannot be mapped")

    def read32(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 4), "little")

    def write32(self, offset: int, value: int) -> None:
        self.write(offset, value.to_bytes(4, "little"))

    def write64(self, offset: int, value: int) -> None:
        self.write(offset, value.to_bytes(8, "little"))


class Irq(ABC):
    """`count` vectors of one kind of interrupt. `flags`: IRQ_EVENTFD, IRQ_MASKABLE, ..."""

    index: int
    count: int
    flags: int = IRQ_EVENTFD

    @abstractmethod
    def enable(self, vector: int, eventfd: int) -> None:
        """Signal `eventfd` for each interrupt of `vector` from now on. Raises UsageError for a vector that is not there."""

    @abstractmethod
    def disable(self, vector: int) -> None:
        """Signal nobody."""

    def mask(self, vector: int) -> None:
        """Hold interrupts of `vector` back. Raises UsageError unless IRQ_MASKABLE is among `flags`."""
        raise UsageError(f"vector {vector} of interrupt index {self.index} cannot be masked")

    def unmask(self, vector: int) -> None:
        """Let them come again, at once where one was held back. Raises as `mask`."""
        raise UsageError(f"vector {vector} of interrupt index {self.index} cannot be masked")


class Dma(ABC):
    """The device's IO address space.

    iova_ranges: (start, end) of what may be mapped, `end` not being one of them; empty where all may. physical: nothing translates, an
    IOVA is a physical address of this machine: `iommu.physical.PhysicalBuffer` has such, and `buffers_for` takes note.
    """

    iova_ranges: tuple[tuple[int, int], ...] = ()
    physical: bool = False

    @abstractmethod
    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        """Let the device reach `size` bytes of the sealed memfd `fd` from `offset` on at `iova`. access: READ (1), WRITE (2) or both,
        as the device sees it. Raises DmaError."""

    @abstractmethod
    def unmap(self, iova: int, size: int) -> None:
        """Take [iova, iova + size) back; when this returns the device does not touch that memory any more. Raises DmaError."""


class Device(ABC):
    """A device that this process drives. Close it when done; a with statement does. After that everything but `close` raises ClosedError.

    Whoever implements it proves it by `testing.conformance`.
    """

    info: DeviceInfo
    dma: Dma

    @abstractmethod
    def region(self, index: int) -> Region:
        """Raises UsageError for a region that is not there."""

    @abstractmethod
    def irq(self, index: int) -> Irq:
        """Raises UsageError for a kind of interrupt that is not there."""

    @abstractmethod
    def reset(self) -> None:
        """Back to the state after power-on. DMA maps stay."""

    @abstractmethod
    def close(self) -> None:
        """Give the device back: it is reset, all maps and interrupts are gone."""

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
