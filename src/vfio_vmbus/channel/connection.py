"""A VMBus connection over a VFIO device with the PCI personality: the admin ring, and the guest end of the control plane on it.

`VmbusConnection(device)` finds the registers, lays out the admin ring in its own memory, negotiates the version and asks for offers;
`devices()` gives what was offered. Synchronous: each call that needs an answer waits for it, up to `timeout` seconds.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

from ..errors import RefusedError, UnavailableError, UsageError, VfioVmbusError, WaitTimeout
from ..iommu.dma import DmaBuffer, DmaSpace
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..ring.pair import RingPair
from ..vfio import registers as reg
from ..vfio.device import BAR0_REGION, MSIX_IRQ, Device
from ..vmbus import actions as act
from ..vmbus.gpadl import whole_pages
from ..vmbus.guest import GuestConnection
from ..wire.vmbus import SUPPORTED_VERSIONS, version_text

EventT = TypeVar("EventT", bound=act.GuestEvent)

_ADMIN_PAGES = 8
"""Pages of each admin ring."""


class VmbusConnection:
    """The guest end of VMBus over `device`, which stays the caller's.

    max_version, min_version: major << 16 | minor. Raises UnavailableError for a device that is no VMBus function, RefusedError when
    no version is in common, WaitTimeout when the host does not answer.
    """

    def __init__(
        self,
        device: Device,
        *,
        timeout: float = 5.0,
        max_version: int = SUPPORTED_VERSIONS[0],
        min_version: int = SUPPORTED_VERSIONS[-1],
    ) -> None:
        self.device = device
        self.timeout = timeout
        self.space = DmaSpace(device.dma)
        self.offers: dict[int, act.OfferReceived] = {}
        self.rescinded: set[int] = set()
        self._bar0 = device.region(BAR0_REGION)
        self._guest = GuestConnection()
        self._events: list[act.GuestEvent] = []
        self._interrupt = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._vector = 0
        self._pair: RingPair | None = None
        self._closed = False
        try:
            self._check_registers()
            self._pair = self._start_admin()
            self._connect(max_version, min_version)
        except BaseException:
            self._abandon()
            raise

    @property
    def version(self) -> int:
        """The version agreed, major << 16 | minor."""
        return self._guest.version or 0

    def poll(self) -> None:
        """Take in what the host sent meanwhile (rescinds, new offers), without waiting. Raises PeerError when it broke the protocol."""
        self._take_messages()

    def next_vector(self) -> int:
        """An interrupt vector for another channel, starting over when all are used: then they share."""
        vectors = self._bar0.read32(reg.REG_VECTORS)
        if vectors < 2:
            raise UnavailableError("the device has no interrupt vector for channels")
        self._vector = self._vector % (vectors - 1) + 1
        return self._vector

    def enable_vector(self, vector: int, eventfd: int) -> None:
        self.device.irq(MSIX_IRQ).enable(vector, eventfd)

    def disable_vector(self, vector: int) -> None:
        self.device.irq(MSIX_IRQ).disable(vector)

    def doorbell(self, relid: int) -> int:
        """The eventfd that tells the host to look at a channel's ring. Raises UsageError for a relid beyond the doorbells."""
        return self._bar0.doorbell(reg.REG_DOORBELLS + 4 * relid)

    def create_gpadl(self, relid: int, pfns: Iterable[int]) -> int:
        """Share pages (IOVA / 4096, in order) with a channel's host: the GPADL's handle. Raises RefusedError when it says no."""
        handle, sends = self._guest.create_gpadl(relid, [whole_pages(tuple(pfns))])
        self._send(sends)
        answer = self._await(act.GpadlReady, lambda event: event.handle == handle, f"GPADL {handle:#x} to be created", relid)
        if answer.status:
            raise RefusedError(f"the host refused GPADL {handle:#x} of channel {relid}", answer.status)
        return handle

    def teardown_gpadl(self, handle: int) -> None:
        """Take a GPADL back. When this returns the host does not use its memory."""
        self._send(self._guest.teardown_gpadl(handle))
        self._await(act.GpadlGone, lambda event: event.handle == handle, f"GPADL {handle:#x} to be torn down")

    def open_channel(self, relid: int, gpadl: int, downstream_pages: int, vector: int, user_data: bytes) -> None:
        """Open a channel over the rings in a GPADL. Raises RefusedError when the host says no."""
        self._send(self._guest.open_channel(relid, gpadl, downstream_pages, vector, user_data=user_data))
        answer = self._await(act.ChannelOpened, lambda event: event.relid == relid, f"channel {relid} to open", relid)
        if answer.status:
            raise RefusedError(f"the host refused to open channel {relid}", answer.status)

    def close_channel(self, relid: int) -> None:
        """Close a channel; its rings are free once their GPADL is torn down."""
        self._send(self._guest.close_channel(relid))

    def release(self, relid: int) -> None:
        """Give a rescinded channel's number back, when nothing of it is left."""
        if relid in self.rescinded:
            self._send(self._guest.release_relid(relid))
            self.rescinded.discard(relid)
            self.offers.pop(relid, None)

    def close(self) -> None:
        """End the connection and free its memory, whether the host still answers or not."""
        if self._closed:
            return
        with suppress(VfioVmbusError):
            self._send(self._guest.unload())
            self._await(act.Unloaded, lambda event: True, "the connection to end")
        self._abandon()

    def __enter__(self) -> VmbusConnection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_registers(self) -> None:
        magic, layout = self._bar0.read32(reg.REG_MAGIC), self._bar0.read32(reg.REG_LAYOUT)
        if magic != reg.MAGIC:
            raise UnavailableError(f"{self.device.info.name} is no VMBus function: BAR 0 begins with {magic:#010x}")
        if layout != reg.LAYOUT:
            raise UnavailableError(f"{self.device.info.name} has register layout {layout}, this driver knows {reg.LAYOUT}")

    def _start_admin(self) -> RingPair:
        buffer: DmaBuffer = self.space.buffer(2 * _ADMIN_PAGES * PAGE, READ | WRITE, "admin-ring")
        pair = RingPair.fresh(buffer.memory, 0, _ADMIN_PAGES * PAGE, buffer.size, self.doorbell(0), "admin ring")
        self.enable_vector(0, self._interrupt)
        self._bar0.write64(reg.REG_ADMIN_IOVA, buffer.iova)
        self._bar0.write32(reg.REG_ADMIN_UPSTREAM, _ADMIN_PAGES)
        self._bar0.write32(reg.REG_ADMIN_DOWNSTREAM, _ADMIN_PAGES)
        self._bar0.write32(reg.REG_CONTROL, reg.CONTROL_START)
        self._pair = pair
        self._check_alive()
        return pair

    def _connect(self, max_version: int, min_version: int) -> None:
        self._send(self._guest.connect(max_version, min_version))
        asked = f"{version_text(min_version)} to {version_text(max_version)}"
        answer = self._await((act.Connected, act.ConnectionRefused), lambda event: True, f"version {asked} to be accepted")
        if isinstance(answer, act.ConnectionRefused):
            raise RefusedError(f"the host speaks no VMBus version from {asked}", answer.connection_state)
        self._send(self._guest.request_offers())
        self._await(act.AllOffersDelivered, lambda event: True, "the list of offers")

    def _abandon(self) -> None:
        self._closed = True
        with suppress(VfioVmbusError):
            self._bar0.write32(reg.REG_CONTROL, reg.CONTROL_RESET)
            self.device.irq(MSIX_IRQ).disable(0)
        self._guest.reset()
        if self._pair is not None:
            self._pair.close()
        with suppress(VfioVmbusError):
            self.space.close()
        if self._interrupt >= 0:
            os.close(self._interrupt)
            self._interrupt = -1

    def _check_alive(self) -> None:
        if self._closed:
            raise UsageError("the connection is closed")
        if self._bar0.read32(reg.REG_STATUS) & reg.STATUS_FAILED:
            error = self._bar0.read32(reg.REG_ERROR)
            raise RefusedError(f"the host stopped the connection: {reg.ERRORS.get(error, 'for no known reason')}", error)

    def _send(self, sends: Iterable[act.GuestEvent]) -> None:
        deadline = time.monotonic() + self.timeout
        for item in sends:
            if not isinstance(item, act.Send):
                raise UsageError(f"{item} is not a message")
            while self._pair is None or not self._pair.outgoing.send(item.data):
                if time.monotonic() > deadline:
                    self._check_alive()
                    raise WaitTimeout("room in the admin ring", self.timeout)
                time.sleep(0.0002)

    def _take_messages(self) -> bool:
        """Feed what came to the state machine. True when anything came."""
        if self._pair is None:
            return False
        some = False
        while (packet := self._pair.incoming.receive()) is not None:
            some = True
            for event in self._guest.receive(packet.payload):
                self._note(event)
        return some

    def _note(self, event: act.GuestEvent) -> None:
        match event:
            case act.Send():
                self._send([event])
            case act.OfferReceived(relid=relid):
                self.offers[relid] = event
            case act.Rescinded(relid=relid):
                self.rescinded.add(relid)
                self._events.append(event)
            case _:
                self._events.append(event)

    def _await(
        self,
        kind: type[EventT] | tuple[type[EventT], ...],
        match: Callable[[EventT], bool],
        awaited: str,
        relid: int | None = None,
    ) -> EventT:
        """The event that is awaited. Raises WaitTimeout, or RefusedError when the channel is rescinded meanwhile."""
        deadline = time.monotonic() + self.timeout
        poller = select.poll()
        poller.register(self._interrupt, select.POLLIN)
        while True:
            self._take_messages()
            for event in self._events:
                if isinstance(event, kind) and match(event):
                    self._events.remove(event)
                    return event
            if relid in self.rescinded and kind is act.ChannelOpened:
                raise RefusedError(f"channel {relid} was rescinded")
            left = deadline - time.monotonic()
            if left <= 0:
                self._check_alive()
                raise WaitTimeout(awaited, self.timeout)
            if self._pair is not None and not self._pair.incoming.unmask():
                poller.poll(min(left, 0.5) * 1000)
                with suppress(BlockingIOError):
                    os.eventfd_read(self._interrupt)
                    self._check_alive()
