"""An offer of a VMBus connection as a `VmbusDevice`: rings and buffers in the driver's own memory, shared by GPADL."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from ..errors import PeerError, RefusedError, RescindedError, UnavailableError, UsageError
from ..iommu.dma import DmaBuffer
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..ring.pair import RingPair
from ..vfio.device import Device
from ..vmbus.actions import OfferReceived
from ..wire.guids import CLASS_NAMES
from .connection import VmbusConnection
from .device import Channel, SharedBuffer, VmbusDevice


class OfferedChannel(Channel):
    """A channel over a DMA buffer that holds both rings."""

    def __init__(self, connection: VmbusConnection, relid: int, ring_pages: int, user_data: bytes) -> None:
        self.relid = relid
        self._connection = connection
        self._vector = connection.next_vector()
        self._gpadl = 0
        self._opened = False
        self._closed = False
        size = ring_pages * PAGE
        self._buffer = connection.space.buffer(2 * size, READ | WRITE, f"rings-{relid}")
        self._pair = RingPair.fresh(self._buffer.memory, 0, size, 2 * size, connection.doorbell(relid), f"channel {relid}")
        self.incoming = self._pair.incoming
        self.outgoing = self._pair.outgoing
        self.interrupt = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            connection.enable_vector(self._vector, self.interrupt)
            self._gpadl = connection.create_gpadl(relid, self._buffer.pfns)
            connection.open_channel(relid, self._gpadl, ring_pages, self._vector, user_data)
            self._opened = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(PeerError, UsageError):
            if self._opened:
                self._connection.close_channel(self.relid)
        with suppress(PeerError, UsageError):
            if self._gpadl:
                self._connection.teardown_gpadl(self._gpadl)
        with suppress(PeerError, UsageError, UnavailableError):
            self._connection.disable_vector(self._vector)
        self._pair.close()
        self._buffer.close()
        os.close(self.interrupt)


class OfferedBuffer(SharedBuffer):
    """A GPADL over a DMA buffer."""

    def __init__(self, connection: VmbusConnection, relid: int, size: int, access: int, name: str) -> None:
        self._connection = connection
        self._buffer = connection.space.buffer(size, access, name)
        try:
            self.handle = connection.create_gpadl(relid, self._buffer.pfns)
        except BaseException:
            self._buffer.close()
            raise
        self.address = self._buffer.mapping.address
        self.size = self._buffer.size
        self._closed = False

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(PeerError, UsageError):
            self._connection.teardown_gpadl(self.handle)
        self._buffer.close()


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
        channel = OfferedChannel(self.connection, self._relid, ring_pages, user_data)
        self._parts.append(channel)
        return channel

    def share(self, size: int, access: int, name: str) -> SharedBuffer:
        self._check()
        buffer = OfferedBuffer(self.connection, self._relid, size, access, name)
        self._parts.append(buffer)
        return buffer

    def dma_buffer(self, size: int, access: int, name: str) -> DmaBuffer:
        buffer = self.connection.space.buffer(size, access, name)
        self._parts.append(buffer)
        return buffer

    @property
    def rescinded(self) -> bool:
        self.connection.poll()
        return self._relid in self.connection.rescinded

    def close(self) -> None:
        while self._parts:  # channels first: they were opened before what their protocol shares was made
            self._parts.pop(0).close()
        with suppress(PeerError, UsageError):
            self.connection.release(self._relid)
        self._closed()

    def _check(self) -> None:
        if self._relid in self.connection.rescinded:
            raise RescindedError(f"{self.name} was taken away by its host")


def open_device(device: Device, class_guid: object = None) -> VmbusDevice:
    """Connect over `device` and take the first device offered (of the class, if one is given). Closing it closes all of that.

    Raises as VmbusConnection, and RefusedError when nothing of the class is offered.
    """
    connection = VmbusConnection(device)

    def close() -> None:
        connection.close()
        device.close()

    for offer in connection.offers.values():
        if offer.offer.sub_channel_index == 0 and class_guid in (None, offer.offer.class_guid):
            return OfferedDevice(connection, offer, close)
    close()
    raise RefusedError(f"{device.info.name} offers no device of class {CLASS_NAMES.get(class_guid, class_guid)}")  # type: ignore[call-overload]
