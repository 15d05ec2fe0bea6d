"""The driver's side of an IO address space: which IOVAs are free, and memory that the device may reach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Protocol, Self

from ..errors import ClosedError, DmaError
from ..memory.mapping import PAGE, Mapping
from ..memory.shared import SharedMemory

FIRST_IOVA = 1 << 32
"""Above 4 GiB, clear of the ranges that platforms keep for interrupts (0xfee00000)."""
LAST_IOVA = 1 << 38
"""Below the 39 bits that the least of today's IOMMUs translate."""


class Mapper(Protocol):
    """Who maps for the device: a VFIO device's `dma`."""

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None: ...
    def unmap(self, iova: int, size: int) -> None: ...


class DmaBuffer(ABC):
    """`size` bytes at `iova` for the device and at `mapping` for the driver. access: READ, WRITE or both, as the device sees it."""

    size: int
    access: int
    memory: SharedMemory
    mapping: Mapping
    closed: bool

    @property
    @abstractmethod
    def iova(self) -> int:
        """Where the device sees it, in one piece."""

    @property
    @abstractmethod
    def pfns(self) -> tuple[int, ...]:
        """The numbers of its pages, in order, as GPADLs and GPA lists want them."""

    @abstractmethod
    def close(self) -> None:
        """Take the memory back from the device, then let go of it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MappedBuffer(DmaBuffer):
    """Made by `DmaSpace.buffer`. If the device does not give the memory back, `close` raises, and the IOVAs stay taken. (A device that
    is closed has given back everything.)
    """

    def __init__(self, space: DmaSpace, iova: int, size: int, access: int, name: str) -> None:
        self._iova = iova
        self.size = size
        self.access = access
        self._space = space
        with ExitStack() as stack:
            self.memory = stack.enter_context(SharedMemory(size, name))
            self.mapping = stack.enter_context(self.memory.map())
            space.mapper.map(iova, self.memory.fd, 0, size, access)
            stack.callback(self._unmap)
            self._resources = stack.pop_all()
        self.closed = False

    @property
    def iova(self) -> int:
        return self._iova

    @property
    def pfns(self) -> tuple[int, ...]:
        return tuple(range(self.iova // PAGE, (self.iova + self.size) // PAGE))

    def close(self) -> None:
        self.closed = True
        self._resources.close()

    def _unmap(self) -> None:
        with suppress(ClosedError):
            self._space.mapper.unmap(self.iova, self.size)
        self._space.forget(self)


class DmaSpace:
    """Hands out IOVAs, first fit, with an unmapped page behind each buffer so that overruns fault.

    iova_ranges: (start, end) of what the device's IOMMU translates, where that is known: a `Dma`'s. IOVAs above 4 GiB are taken first.
    """

    def __init__(self, mapper: Mapper, iova_ranges: Sequence[tuple[int, int]] = ()) -> None:
        self.mapper = mapper
        self._windows = _windows(iova_ranges)
        self._buffers: dict[int, MappedBuffer] = {}

    def buffer(self, size: int, access: int, name: str = "dma", *, whole: bool = True) -> DmaBuffer:
        """A zeroed buffer of `size` bytes (rounded up to pages). whole: in one piece, as all are here.

        Raises UsageError for a size that is not positive, DmaError when no IOVAs are left or the device refuses.
        """
        size = -(-size // PAGE) * PAGE
        made = MappedBuffer(self, self._free_iova(size + PAGE), size, access, name)
        self._buffers[made.iova] = made
        return made

    def forget(self, buffer: MappedBuffer) -> None:
        self._buffers.pop(buffer.iova, None)

    def close(self) -> None:
        """Close every buffer that is left; all of them, even if some raise."""
        with ExitStack() as stack:
            for buffer in self._buffers.values():
                stack.callback(buffer.close)

    def _free_iova(self, size: int) -> int:
        taken = [(iova, iova + self._buffers[iova].size + PAGE) for iova in sorted(self._buffers)]
        for start, end in self._windows:
            at = start
            for first, behind in taken:
                if first - at >= size:
                    break
                at = max(at, behind)
            if at + size <= end:
                return at
        windows = ", ".join(f"[{start:#x}, {end:#x})" for start, end in self._windows)
        raise DmaError(f"no {size} bytes of IOVA space left in {windows or 'nothing: the device has no IOVAs'}")


def _windows(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where IOVAs are taken from, in this order. Not the first page: an address of zero is nearly always a mistake."""
    if not ranges:
        return [(FIRST_IOVA, LAST_IOVA)]
    whole = [(-(-max(start, PAGE) // PAGE) * PAGE, end // PAGE * PAGE) for start, end in ranges]
    high = [(max(start, FIRST_IOVA), end) for start, end in whole]
    low = [(start, min(end, FIRST_IOVA)) for start, end in whole]
    return [(start, end) for start, end in [*high, *low] if start < end]
