"""What a vfio-user server shows: `ServedDevice`, and a function as one.

Methods raise UsageError, DmaError, or RefusedError whose status is an errno; descriptors that they are given stay the caller's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...errors import RefusedError, UsageError
from ...iommu.domain import IOVA_LIMIT, Domain
from ...memory.shared import is_sealed
from ...wire.vfio import IRQ_EVENTFD
from .. import eventfd
from ..function import Function, Window

DOORBELL_SIZE = 4


@dataclass(frozen=True)
class IoFd:
    """Writes of `size` bytes at `offset` of a region may be replaced by ringing the eventfd `fd`, which stays the device's."""

    offset: int
    size: int
    fd: int


@dataclass(frozen=True)
class ServedMap:
    """Clients may map these areas, (offset, size) in bytes, of a region: `fd`, the device's, from `base` on is the region's first byte."""

    fd: int
    base: int
    areas: tuple[tuple[int, int], ...]


class ServedDevice(Protocol):
    """A device to be served. regions, irqs: how many indexes there are; those that are nothing have size 0, or count 0.

    pci: is it a PCI function?
    """

    regions: int
    irqs: int
    pci: bool
    max_maps: int

    @property
    def fault_count(self) -> int:
        """Accesses to the client's memory that were refused, since the device was made."""

    def region_size(self, region: int) -> int:
        """Bytes of a region."""

    def region_map(self, region: int) -> ServedMap | None:
        """How clients may map a region, if they may."""

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read a region."""

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write a region."""

    def io_fds(self, region: int, most: int) -> list[IoFd]:
        """The first `most` places of a region that have a descriptor."""

    def irq_count(self, index: int) -> int:
        """Vectors of a kind of interrupt."""

    def irq_flags(self, index: int) -> int:
        """vfio.IRQ_* of a kind of interrupt that has vectors."""

    def mask(self, index: int, vector: int, masked: bool) -> None:
        """Hold a vector back, or let it come again, at once where one was held back. Only where `irq_flags` says IRQ_MASKABLE."""

    def lead_to(self, index: int, start: int, fds: list[int | None]) -> None:
        """Let vectors from `start` on signal these eventfds (None: nobody), all of them or, if one cannot be, none."""

    def fire(self, index: int, vector: int) -> None:
        """Signal a vector, as the device would."""

    def map(self, iova: int, size: int, access: int, fd: int | None, offset: int) -> None:
        """Map a file, or (fd is None) memory that the client reads and writes for the device when asked."""

    def unmap(self, iova: int, size: int) -> None:
        """Take back all maps within; a map is never split."""

    def unmap_all(self) -> None:
        """Take back all maps."""

    def reset(self) -> None:
        """Back to the state after power-on; maps and interrupts stay."""

    def release(self) -> None:
        """The client has gone: reset, and nothing of it is kept."""


def map_for_client(domain: Domain, iova: int, size: int, access: int, fd: int | None, offset: int) -> None:
    """`ServedDevice.map` into a domain: sealed memory is mapped, other files are read and written, and for what is in no file the client
    is asked (`memory`). Raises RefusedError (ENOSPC, EEXIST), DmaError."""
    if not domain.has_room(size):
        raise RefusedError(
            f"{size:#x} bytes more exceed the limits of {domain.max_maps} maps, {domain.max_bytes} bytes", errno.ENOSPC
        )
    if domain.overlaps(iova, size):
        raise RefusedError(f"[{iova:#x}, {iova + size:#x}) overlaps another map", errno.EEXIST)
    if fd is not None and is_sealed(fd):
        domain.map(iova, fd, offset, size, access)
    else:
        domain.map_unmapped(iova, size, access, fd, offset)


class FunctionDevice:
    """A function as a served device. released: called when its client has gone; by default the function is released."""

    def __init__(self, function: Function, released: Callable[[], None] | None = None) -> None:
        self.function = function
        self.release = released or function.release
        self.regions = function.regions
        self.irqs = function.irqs
        self.pci = function.pci
        self.max_maps = function.domain.max_maps

    @property
    def fault_count(self) -> int:
        return self.function.domain.fault_count

    def region_size(self, region: int) -> int:
        window = self.function.windows.get(region)
        return window.size if window else 0

    def region_map(self, region: int) -> ServedMap | None:
        window = self.function.windows.get(region)
        if window is None or window.memory is None:
            return None
        return ServedMap(window.memory().fd, 0, ((0, window.size),))

    def read(self, region: int, offset: int, size: int) -> bytes:
        return self._window(region).read(offset, size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self._window(region).write(offset, data)

    def io_fds(self, region: int, most: int) -> list[IoFd]:
        places = self.function.doorbells(region)[:most]
        return [IoFd(offset, DOORBELL_SIZE, self.function.doorbell_at(region, offset)) for offset in places]

    def irq_count(self, index: int) -> int:
        return len(self.function.vectors.fds) if index == self.function.irq else 0

    def irq_flags(self, index: int) -> int:
        return IRQ_EVENTFD

    def mask(self, index: int, vector: int, masked: bool) -> None:
        raise UsageError(f"vector {vector} of interrupt index {index} cannot be masked")

    def lead_to(self, index: int, start: int, fds: list[int | None]) -> None:
        for vector, fd in enumerate(fds, start):
            self._check_vector(index, vector)
            if fd is not None and not eventfd.is_eventfd(fd):
                raise UsageError(f"the descriptor for vector {vector} is not an eventfd")
        for vector, fd in enumerate(fds, start):
            self.function.vectors.lead_to(vector, fd)

    def fire(self, index: int, vector: int) -> None:
        self._check_vector(index, vector)
        eventfd.ring(self.function.vectors.fds[vector])

    def map(self, iova: int, size: int, access: int, fd: int | None, offset: int) -> None:
        map_for_client(self.function.domain, iova, size, access, fd, offset)

    def unmap(self, iova: int, size: int) -> None:
        self.function.domain.unmap(iova, size)

    def unmap_all(self) -> None:
        self.function.domain.unmap(0, IOVA_LIMIT)

    def reset(self) -> None:
        self.function.reset()

    def _window(self, region: int) -> Window:
        window = self.function.windows.get(region)
        if window is None:
            raise UsageError(f"region {region} is empty")
        return window

    def _check_vector(self, index: int, vector: int) -> None:
        if not 0 <= vector < self.irq_count(index):
            raise UsageError(f"vector {vector} of interrupt index {index}: there are {self.irq_count(index)}")
