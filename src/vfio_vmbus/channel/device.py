"""`VmbusDevice`, `Channel`, `SharedBuffer`: all that a VSC knows of the machine it runs on."""

from __future__ import annotations

import select
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self
from uuid import UUID

from ..iommu.dma import DmaBuffer
from ..iommu.translation import READ, WRITE
from ..ring.ends import IncomingRing, OutgoingRing
from ..vfio import eventfd

__all__ = ["READ", "WRITE", "Channel", "DmaBuffer", "SharedBuffer", "VmbusDevice"]


class SharedBuffer(ABC):
    """Memory that the host knows by a GPADL handle. `address`, `size`: for the driver."""

    handle: int
    address: int
    size: int

    @abstractmethod
    def close(self) -> None:
        """Tear the GPADL down and free the memory. The driver has made the host stop using it before (in its protocol's own way)."""


class Channel(ABC):
    """An open channel. One thread at a time uses each ring; `interrupt` is the eventfd that the host signals, `doorbell` the one
    that signals the host."""

    relid: int
    incoming: IncomingRing
    outgoing: OutgoingRing
    interrupt: int
    doorbell: int

    def wait(self, seconds: float) -> bool:
        """Sleep until the host signals; False when `seconds` passed. Unmask the incoming ring and look once more before."""
        poller = select.poll()
        poller.register(self.interrupt, select.POLLIN)
        return bool(poller.poll(max(0, int(seconds * 1000 + 0.999)))) and eventfd.take(self.interrupt)

    @abstractmethod
    def close(self) -> None:
        """Close the channel and free its rings. Whoever runs kernels on them stops them first."""


class VmbusDevice(ABC):
    """A device on the bus: class and instance, channels, shared buffers, memory for DMA. A with statement closes it."""

    class_guid: UUID
    instance_guid: UUID
    name: str
    isolation: str
    """What keeps the driver inside its own memory, "" if nothing does."""

    @abstractmethod
    def open(self, ring_pages: int, user_data: bytes = b"") -> Channel:
        """Open the primary channel with two rings of `ring_pages` pages each, their control pages included. That is a wish: where the
        rings are there already, they are as they are.

        Raises RefusedError when the host says no, WaitTimeout when it says nothing, RescindedError when the device is gone.
        """

    @abstractmethod
    def share(self, size: int, access: int, name: str) -> SharedBuffer:
        """Make a GPADL over `size` fresh bytes. access: READ, WRITE or both, as the host sees it. Raises as `open`.

        Where buffers are there already it is the one of that direction, whose `size` may be more, or less.
        """

    @abstractmethod
    def dma_buffer(self, size: int, access: int, name: str) -> DmaBuffer:
        """Memory for GPA-direct packets. Raises DmaError."""

    @property
    @abstractmethod
    def rescinded(self) -> bool:
        """Has the host taken the device away?"""

    @abstractmethod
    def close(self) -> None:
        """Close channels, buffers and the way to the device."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
