"""`AddressSpace`: IOVAs of one or more devices, and what memory is behind them. `Maps` is the part that needs no kernel.

The kernel pins what is mapped, so that a device goes on reaching it whatever becomes of the file. Ours are the checks that the kernel
leaves to its caller, and errors that say more than EINVAL.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right, insort
from contextlib import ExitStack
from threading import RLock
from types import TracebackType
from typing import TypeVar

from ...errors import ClosedError, DmaError
from ...memory.mapping import Piece
from ...memory.shared import require_sealed, side_by_side
from ...wire.vfio import DMA_READ, DMA_WRITE
from ..device import Dma

_LIMIT = 1 << 64

Self = TypeVar("Self", bound="Maps")


class Maps(Dma):
    """What devices may reach. All methods may be called from any thread.

    `page_size`: the least that can be mapped, in bytes. `iova_ranges`: (start, end) of what may be mapped, the
    end not being one of them; empty before the first device is in it.
    """

    def __init__(self) -> None:
        self.page_size = 4096
        self._lock = RLock()
        self._starts: list[int] = []
        self._held: dict[int, tuple[int, ExitStack]] = {}
        self._resources = ExitStack()
        self._open = True

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        with self._lock:
            self._check_open()
            self._check_range(iova, size)
            if offset < 0 or offset % self.page_size:
                raise DmaError(f"file offset {offset:#x} is not a multiple of {self.page_size}")
            if access not in (DMA_READ, DMA_WRITE, DMA_READ | DMA_WRITE):
                raise DmaError(f"access {access:#x}: take READ ({DMA_READ}), WRITE ({DMA_WRITE}) or both")
            there = require_sealed(fd)
            if offset + size > there:
                raise DmaError(f"{size} bytes at {offset} are outside memory of {there} bytes")
            if self.iova_ranges and not any(start <= iova and iova + size <= end for start, end in self.iova_ranges):
                allowed = ", ".join(f"[{start:#x}, {end:#x})" for start, end in self.iova_ranges)
                raise DmaError(f"[{iova:#x}, {iova + size:#x}) is outside of what the IOMMU translates: {allowed}")
            for at in self._within(iova, size):
                raise DmaError(f"[{iova:#x}, {iova + size:#x}) overlaps the map [{at:#x}, {at + self._held[at][0]:#x})")
            with ExitStack() as stack:
                self._map(iova, Piece(fd, offset, size, bool(access & DMA_WRITE)), access, stack)
                self._held[iova] = (size, stack.pop_all())
            insort(self._starts, iova)

    def unmap(self, iova: int, size: int) -> None:
        with self._lock:
            self._check_open()
            self._check_range(iova, size)
            inside = self._within(iova, size)
            for at in inside:
                end = at + self._held[at][0]
                if at < iova or end > iova + size:
                    raise DmaError(f"[{iova:#x}, {iova + size:#x}) would split the map [{at:#x}, {end:#x})")
            if inside:
                self._unmap(iova, size)
            for at in inside:
                self._forget(at)

    def close(self) -> None:
        """Take everything back from the devices, which are to be closed before."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            with ExitStack() as stack:
                for at in [*self._starts]:
                    stack.callback(self._forget, at)
                stack.push(self._resources)  # runs first: when it is done, no device reaches the memory any more

    @abstractmethod
    def _map(self, iova: int, piece: Piece, access: int, stack: ExitStack) -> None:
        """Ask the kernel; what is to be given back after the unmap goes to `stack`."""

    @abstractmethod
    def _unmap(self, iova: int, size: int) -> None:
        """Ask the kernel."""

    def _in_memory(self, piece: Piece, stack: ExitStack) -> int:
        """The address of a file's piece in this process, for those who map by address."""
        return stack.enter_context(side_by_side([piece], populate=False)).address

    def _within(self, iova: int, size: int) -> list[int]:
        """Where the maps that have something in the range begin."""
        first = max(bisect_right(self._starts, iova) - 1, 0)
        return [at for at in self._starts[first : bisect_right(self._starts, iova + size - 1)] if at + self._held[at][0] > iova]

    def _forget(self, at: int) -> None:
        _, held = self._held.pop(at)
        self._starts.remove(at)
        held.close()

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError("this IO address space is closed")

    def _check_range(self, iova: int, size: int) -> None:
        if size <= 0 or iova < 0 or iova + size > _LIMIT or (iova | size) % self.page_size:
            raise DmaError(f"{size} bytes at IOVA {iova:#x}: take whole pages of {self.page_size} bytes below {_LIMIT:#x}")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AddressSpace(Maps):
    """Maps that the kernel knows of. One belongs to each KernelDevice, unless several are opened with one of theirs."""

    @abstractmethod
    def device(self, address: str) -> int:
        """A new descriptor of a device, which is in this address space from now on. Raises UnavailableError."""
