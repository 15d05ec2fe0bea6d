"""A device whose channel, rings and buffers somebody else has opened, as a `VmbusDevice`: the `vmbus` personality of a VFIO device.

docs/vmbus-personality.md. What the other side says of sizes is checked before anything is mapped; what lies in the memory is for
rings and drivers to check, as always.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ..errors import ProtocolError, RefusedError, RescindedError, UnavailableError, UsageError
from ..iommu.dma import DmaBuffer
from ..iommu.physical import buffers_for
from ..iommu.translation import WRITE
from ..memory.mapping import PAGE
from ..ring.pair import RingPair
from ..vfio import eventfd
from ..vfio.device import Device, Region
from ..wire import opened as wire
from ..wire.guids import CLASS_NAMES
from ..wire.table import Side
from .connection import quietly
from .device import Channel, SharedBuffer, VmbusDevice

MAX_RING_PAGES = 4095
"""As of rings that a guest opens itself."""
MAX_BUFFER = 1 << 26
"""Bytes of a buffer that is believed: twice what any card's protocol allows."""
_PRIMARY = 0


class OpenedChannel(Channel):
    """A channel over rings in the device's memory. `closed` is called when it is closed, before its rings are unmapped."""

    def __init__(self, device: Device, number: int, rings: wire.OpenedRings, closed: Callable[[], None]) -> None:
        self.relid = number
        upstream, downstream = _ring_size(number, rings.upstream), _ring_size(number, rings.downstream)
        with _promised(f"channel {number}"), ExitStack() as stack:
            region = device.region(rings.region)
            if upstream + downstream != region.size:
                raise ProtocolError(f"channel {number}: rings of {upstream} and {downstream} bytes in {region.size} bytes")
            registers = device.region(wire.REGION_REGISTERS)
            irq = device.irq(wire.IRQ_CHANNELS)
            self.interrupt = eventfd.make()
            stack.callback(os.close, self.interrupt)
            irq.enable(number, self.interrupt)
            stack.callback(quietly, irq.disable, number)
            self.doorbell = registers.doorbell(wire.DOORBELLS_AT + 4 * number)
            halves = [
                stack.enter_context(region.map(offset, size, wrap_from=PAGE))
                for offset, size in ((0, upstream), (upstream, downstream))
            ]
            pair = RingPair.over(halves[0], halves[1], Side.GUEST, self.doorbell, f"channel {number}")
            self.incoming = pair.incoming
            self.outgoing = pair.outgoing
            stack.callback(closed)
            self._resources = stack.pop_all()

    def close(self) -> None:
        self._resources.close()


class OpenedBuffer(SharedBuffer):
    """A region of the device's memory that it knows by the handle in another one. `closed` is called when it is closed."""

    def __init__(self, device: Device, region: Region, handle: int, closed: Callable[[], None]) -> None:
        if not 0 < region.size <= MAX_BUFFER or region.size % PAGE:
            raise ProtocolError(f"a buffer of {region.size} bytes: need a multiple of {PAGE} up to {MAX_BUFFER}")
        if handle == 0:
            raise ProtocolError("a buffer whose GPADL handle is 0")
        self.handle = handle
        with _promised("a buffer"):
            self._mapping = region.map(0, region.size)
        self.address = self._mapping.address
        self.size = region.size
        self._closed = closed

    def close(self) -> None:
        if not self._mapping.closed:
            self._mapping.close()
            self._closed()


class OpenedDevice(VmbusDevice):
    """The device that `device` shows as regions. `closed` is called last, when this is closed; `device` is the caller's otherwise.

    Its channel is open all the time. `open` and a channel's `close` reset it, so that each time begins with empty rings and zeroed
    buffers. It has one receive buffer (for the host to write) and one send buffer, whose sizes are its server's choice.
    Raises UnavailableError for a device that is no such thing, ProtocolError for one that contradicts itself.
    """

    def __init__(self, device: Device, closed: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self.space = buffers_for(device.dma)
        try:
            self._registers = device.region(wire.REGION_REGISTERS)
        except UsageError as error:
            raise UnavailableError(f"{device.info.name} shows no opened VMBus device: {error}") from error
        info = self._read_info()
        self.class_guid = info.class_guid
        self.instance_guid = info.instance_guid
        self.name = f"{device.info.name} ({CLASS_NAMES.get(self.class_guid, self.class_guid)})"
        self.isolation = device.info.isolation
        self._rings = wire.OpenedRings.unpack(self._registers.read(wire.CHANNELS_AT, wire.OpenedRings.SIZE))
        self._closed = closed
        self._channel: OpenedChannel | None = None
        self._buffers: dict[int, OpenedBuffer] = {}

    def open(self, ring_pages: int, user_data: bytes = b"") -> Channel:
        """As of VmbusDevice; `ring_pages` is not asked for, as the rings are there, and user data cannot be given any more.

        Raises RescindedError, RefusedError when the channel does not open, UsageError while it is in use here already.
        """
        if self._channel is not None:
            raise UsageError(f"{self.name}: its channel is in use")
        if user_data:
            raise UsageError(f"{self.name}: {len(user_data)} bytes for the channel's opening: it is open already")
        self._reset()
        status = self._status()
        if status & wire.STATUS_GONE:
            raise RescindedError(f"{self.name} was taken away by its host")
        if not status & wire.STATUS_OPEN:
            raise RefusedError(f"the host did not open the channel of {self.name}")
        self._channel = OpenedChannel(self.device, _PRIMARY, self._rings, self._leave)
        return self._channel

    def share(self, size: int, access: int, name: str) -> SharedBuffer:
        """The receive buffer where `access` has WRITE, else the send buffer, whole, whatever `size` is asked for.

        Raises RefusedError when the device has none, or it is in use.
        """
        if size <= 0:
            raise UsageError(f"{name} of {size} bytes: take one at least")
        number, handle_number = (
            (wire.REGION_RECEIVE, wire.REGION_RECEIVE_GPADL) if access & WRITE else (wire.REGION_SEND, wire.REGION_SEND_GPADL)
        )
        if number in self._buffers:
            raise RefusedError(f"{self.name} has one buffer for {name}, and it is in use")
        try:
            region, handle = self.device.region(number), self.device.region(handle_number).read32(0)
        except UsageError as error:
            raise RefusedError(f"{self.name} has no buffer for {name}: {error}") from error
        self._buffers[number] = OpenedBuffer(self.device, region, handle, lambda: self._forget(number))
        return self._buffers[number]

    def dma_buffer(self, size: int, access: int, name: str) -> DmaBuffer:
        return self.space.buffer(size, access, name)

    @property
    def rescinded(self) -> bool:
        """As of VmbusDevice. Raises RefusedError when the host has closed the channel."""
        status = self._status()
        if status & wire.STATUS_FAILED:
            raise RefusedError(f"the host closed the channel of {self.name}")
        return bool(status & wire.STATUS_GONE)

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._closed)
            stack.callback(quietly, self.space.close)
            for buffer in list(self._buffers.values()):
                stack.callback(buffer.close)
            if self._channel is not None:
                stack.callback(self._channel.close)

    def _read_info(self) -> wire.OpenedInfo:
        if self._registers.size < wire.DOORBELLS_AT + 4:
            raise UnavailableError(f"{self.device.info.name} shows no opened VMBus device: region 7 is too short")
        info = wire.OpenedInfo.unpack(self._registers.read(0, wire.OpenedInfo.SIZE))
        if info.magic != wire.MAGIC:
            raise UnavailableError(f"{self.device.info.name} is no opened VMBus device: region 7 begins with {info.magic:#010x}")
        if info.layout != wire.LAYOUT:
            raise UnavailableError(f"{self.device.info.name} has layout {info.layout}, this driver knows {wire.LAYOUT}")
        if info.channels < 1:
            raise ProtocolError(f"{self.device.info.name} has no channel")
        return info

    def _status(self) -> int:
        return self._registers.read32(wire.STATUS_AT)

    def _reset(self) -> None:
        if self.device.info.resettable:
            self.device.reset()

    def _leave(self) -> None:
        """The channel is being closed: the host must let go of it."""
        self._channel = None
        quietly(self._reset)

    def _forget(self, number: int) -> None:
        self._buffers.pop(number, None)


@contextmanager
def _promised(what: str) -> Iterator[None]:
    """What the device says it has must be there: where it is not, that is the device's mistake."""
    try:
        yield
    except UsageError as error:
        raise ProtocolError(f"{what} is not as the device says: {error}") from error


def _ring_size(number: int, pages: int) -> int:
    if not 2 <= pages <= MAX_RING_PAGES:
        raise ProtocolError(f"channel {number} has a ring of {pages} pages, need 2 to {MAX_RING_PAGES}")
    return pages * PAGE
