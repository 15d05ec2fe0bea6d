"""An offer of a VMBus connection as a `VmbusDevice`: rings and buffers in the driver's own memory, shared by GPADL."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar
from uuid import UUID

from ..errors import RefusedError, RescindedError, UsageError
from ..iommu.dma import DmaBuffer
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..ring.pair import RingPair
from ..vfio import eventfd
from ..vfio.device import Device
from ..vmbus.actions import OfferReceived
from ..wire.guids import CLASS_NAMES
from .connection import VmbusConnection, quietly
from .device import Channel, SharedBuffer, VmbusDevice

MAX_RING_PAGES = 4095
"""Two rings fit into one GPADL of 8190 pages."""


class OfferedChannel(Channel):
    """A channel over a DMA buffer that holds both rings."""

    def __init__(self, connection: VmbusConnection, relid: int, ring_pages: int, user_data: bytes) -> None:
        if not 2 <= ring_pages <= MAX_RING_PAGES:
            raise UsageError(f"rings of {ring_pages} pages: take 2 to {MAX_RING_PAGES}")
        self.relid = relid
        size = ring_pages * PAGE
        with ExitStack() as stack:
            buffer = connection.space.buffer(2 * size, READ | WRITE, f"rings-{relid}")
            stack.callback(quietly, buffer.close)
            self.doorbell = connection.doorbell(relid)
            pair = stack.enter_context(RingPair.fresh(buffer.memory, 0, size, 2 * size, self.doorbell, f"channel {relid}"))
            self.incoming = pair.incoming
            self.outgoing = pair.outgoing
            self.interrupt = eventfd.make()
            stack.callback(os.close, self.interrupt)
            vector = connection.next_vector()
            connection.enable_vector(vector, self.interrupt)
            stack.callback(quietly, connection.disable_vector, vector)
            gpadl = connection.create_gpadl(relid, buffer.pfns)
            stack.callback(quietly, connection.teardown_gpadl, gpadl)
            connection.open_channel(relid, gpadl, ring_pages, vector, user_data)
            stack.callback(quietly, connection.close_channel, relid)
            self._resources = stack.pop_all()
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self._resources.close()


class OfferedBuffer(SharedBuffer):
    """A GPADL over a DMA buffer."""

    def __init__(self, connection: VmbusConnection, relid: int, size: int, access: int, name: str) -> None:
        with ExitStack() as stack:
            buffer = connection.space.buffer(size, access, name)
            stack.callback(quietly, buffer.close)
            self.handle = connection.create_gpadl(relid, buffer.pfns)
            stack.callback(quietly, connection.teardown_gpadl, self.handle)
            self._resources = stack.pop_all()
        self.address = buffer.mapping.address
        self.size = buffer.size
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self._resources.close()


PartT = TypeVar("PartT", OfferedChannel, OfferedBuffer, DmaBuffer)


class OfferedDevice(VmbusDevice):
    """The device behind a primary channel's offer. `closed` is called last, when the device is closed."""

    def __init__(self, connection: VmbusConnection, offer: OfferReceived, closed: Callable[[], None]) -> None:
        self.connection = connection
        self.class_guid = offer.offer.class_guid
        self.instance_guid = offer.offer.instance_guid
        self.name = f"{connection.device.info.name} ({CLASS_NAMES.get(self.class_guid, self.class_guid)})"
        self.isolation = connection.device.info.isolation
        self._relid = offer.relid
        self._closed = closed
        self._parts: list[OfferedChannel | OfferedBuffer | DmaBuffer] = []

    def open(self, ring_pages: int, user_data: bytes = b"") -> Channel:
        self._check()
        return self._keep(OfferedChannel(self.connection, self._relid, ring_pages, user_data))

    def share(self, size: int, access: int, name: str) -> SharedBuffer:
        self._check()
        return self._keep(OfferedBuffer(self.connection, self._relid, size, access, name))

    def dma_buffer(self, size: int, access: int, name: str) -> DmaBuffer:
        return self._keep(self.connection.space.buffer(size, access, name))

    @property
    def rescinded(self) -> bool:
        self.connection.poll()
        return self._relid in self.connection.rescinded

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._closed)
            stack.callback(quietly, self.connection.release, self._relid)
            for part in reversed(self._parts):  # channels first: they were opened before what their protocol shares was made
                stack.callback(quietly, part.close)
            self._parts = []

    def _check(self) -> None:
        if self._relid in self.connection.rescinded:
            raise RescindedError(f"{self.name} was taken away by its host")

    def _keep(self, part: PartT) -> PartT:
        """Close it with the device, unless it was closed before."""
        self._parts = [other for other in self._parts if not other.closed]
        self._parts.append(part)
        return part


def open_offered(device: Device, class_guid: UUID | None = None) -> OfferedDevice:
    """Connect over `device`, a PCI function, and take the first device offered (of the class, if one is given). Closing it closes all that.

    `device` is closed at once when this raises: as VmbusConnection does, and RefusedError when nothing of the class is offered.
    """
    with ExitStack() as stack:
        stack.enter_context(device)
        connection = stack.enter_context(VmbusConnection(device))
        for relid, offer in connection.offers.items():
            wanted = class_guid in (None, offer.offer.class_guid) and relid not in connection.rescinded
            if wanted and offer.offer.sub_channel_index == 0:
                return OfferedDevice(connection, offer, stack.pop_all().close)
        kind = "" if class_guid is None else f" of class {CLASS_NAMES.get(class_guid, class_guid)}"
        raise RefusedError(f"{device.info.name} offers no device{kind}")
