"""DMA buffers where there is no IOMMU: the device's addresses are the machine's own. Unsafe, and for whoever was told so."""

from __future__ import annotations

from ..errors import DmaError
from ..memory.mapping import PAGE
from ..memory.pinned import PinnedMemory
from .dma import DmaBuffer


class PhysicalBuffer(DmaBuffer):
    """`size` bytes (rounded up to pages) of pinned memory; `pfns` are physical page frames.

    Nothing keeps the device within it: `access` is a wish. Raises DmaError as PinnedMemory does.
    """

    def __init__(self, size: int, access: int, name: str) -> None:
        self.size = -(-size // PAGE) * PAGE
        self.access = access
        self.closed = False
        self._pinned = PinnedMemory(self.size, name)
        self.memory = self._pinned.memory
        self.mapping = self._pinned.mapping

    @property
    def iova(self) -> int:
        """Raises DmaError where the frames are no neighbours."""
        if not self._pinned.contiguous:
            raise DmaError(
                f"{self.size} bytes of neighbouring page frames are not to be had: reserve huge pages (sysctl vm.nr_hugepages=64)"
            )
        return self._pinned.frames[0] * PAGE

    @property
    def pfns(self) -> tuple[int, ...]:
        return self._pinned.frames

    @property
    def pinned(self) -> bool:
        """False where the kernel may still move the pages."""
        return self._pinned.pinned

    def close(self) -> None:
        self.closed = True
        self._pinned.close()
