"""DMA buffers where there is no IOMMU: the device's addresses are the machine's own. Unsafe, and for whoever was told so."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

from ..errors import DmaError
from ..memory.mapping import PAGE
from ..memory.pinned import PinnedMemory
from ..memory.shared import HUGE_PAGE
from .dma import DmaBuffer, DmaSpace, Mapper


class PhysicalBuffer(DmaBuffer):
    """`size` bytes (rounded up to pages) of pinned memory; `pfns` are physical page frames. whole: they are to be neighbours; where small
    pages are scattered, whole huge ones are taken, if they are to be had, and `memory` and `mapping` are longer.

    Nothing keeps the device within it: `access` is a wish. Raises DmaError as PinnedMemory does.
    """

    def __init__(self, size: int, access: int, name: str, *, whole: bool = False) -> None:
        self.size = -(-size // PAGE) * PAGE
        self.access = access
        self.closed = False
        self._pinned = _in_one_piece(self.size, name) if whole else PinnedMemory(self.size, name)
        self.memory = self._pinned.memory
        self.mapping = self._pinned.mapping

    @property
    def iova(self) -> int:
        """Raises DmaError where the frames are no neighbours."""
        first = self.pfns[0]
        if self.pfns != tuple(range(first, first + self.size // PAGE)):
            raise DmaError(
                f"{self.size} bytes of neighbouring page frames are not to be had: reserve huge pages (sysctl vm.nr_hugepages=64)"
            )
        return first * PAGE

    @property
    def pfns(self) -> tuple[int, ...]:
        return self._pinned.frames[: self.size // PAGE]

    @property
    def pinned(self) -> bool:
        """False where the kernel may still move the pages."""
        return self._pinned.pinned

    def close(self) -> None:
        self.closed = True
        self._pinned.close()


class PhysicalSpace:
    """Buffers for a device that nothing confines: as `DmaSpace`, with the addresses that the memory has. Stop the device before they are
    closed: nobody takes them back from it."""

    def __init__(self) -> None:
        self._buffers: list[PhysicalBuffer] = []

    def buffer(self, size: int, access: int, name: str = "dma", *, whole: bool = False) -> DmaBuffer:
        """A zeroed buffer of `size` bytes (rounded up to pages), with an `iova`, if that is to be had, where it is `whole`.

        Raises UsageError for a size that is not positive, DmaError.
        """
        made = PhysicalBuffer(size, access, name, whole=whole)
        self._buffers = [other for other in self._buffers if not other.closed]
        self._buffers.append(made)
        return made

    def close(self) -> None:
        """Close every buffer that is left."""
        with ExitStack() as stack:
            for buffer in self._buffers:
                stack.callback(buffer.close)
            self._buffers = []


class DeviceDma(Mapper, Protocol):
    """What a device says of its addresses: `vfio.device.Dma`."""

    iova_ranges: tuple[tuple[int, int], ...]
    physical: bool


def buffers_for(dma: DeviceDma) -> DmaSpace | PhysicalSpace:
    """Where a device's buffers come from."""
    return PhysicalSpace() if dma.physical else DmaSpace(dma, dma.iova_ranges)


def _in_one_piece(size: int, name: str) -> PinnedMemory:
    """Memory of this size whose frames are neighbours, if that is to be had by taking huge pages; if not, where it is."""
    small = PinnedMemory(size, name)
    if small.contiguous or size % HUGE_PAGE == 0:
        return small
    large = PinnedMemory(-(-size // HUGE_PAGE) * HUGE_PAGE, name)
    taken, left = (large, small) if large.contiguous else (small, large)
    left.close()
    return taken
