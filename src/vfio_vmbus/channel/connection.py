"""A VMBus connection over a VFIO device with the PCI personality: the admin ring, and the guest end of the control plane on it.

`VmbusConnection(device)` finds the registers, lays out the admin ring in its own memory, negotiates the version and asks for offers;
`offers` holds what was offered. Synchronous: each call that needs an answer waits for it, up to `timeout` seconds.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TypeVar

from ..errors import (
    ClosedError,
    ProtocolError,
    RefusedError,
    RescindedError,
    UnavailableError,
    UsageError,
    VfioVmbusError,
    WaitTimeout,
)
from ..iommu.physical import buffers_for
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..ring.pair import RingPair
from ..vfio import eventfd
from ..vfio import registers as reg
from ..vfio.device import BAR0_REGION, MSIX_IRQ, Device, Irq
from ..vmbus import actions as act
from ..vmbus.gpadl import whole_pages
from ..vmbus.guest import GuestConnection
from ..wire.ring import PACKET_INBAND
from ..wire.vmbus import SUPPORTED_VERSIONS, version_text

EventT = TypeVar("EventT", bound=act.GuestEvent)

_ADMIN_PAGES = 8
"""Pages of each admin ring."""
_BUDGET = 256
"""Messages taken before the clock is looked at: a host that never stops talking does not hold up anybody for good."""
_NAP_SECONDS, _POLL_SECONDS = 0.0002, 0.002
_GONE = (VfioVmbusError, OSError)
"""What a device or host that is no more may answer to somebody who cleans up."""


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
        self.space = buffers_for(device.dma)
        self.offers: dict[int, act.OfferReceived] = {}
        self.rescinded: set[int] = set()
        self._bar0 = device.region(BAR0_REGION)
        self._irqs = _interrupts(device)
        self._guest = GuestConnection()
        self._events: list[act.GuestEvent] = []
        self._vectors: set[int] = set()
        self._pair: RingPair | None = None
        self._timed_out = False
        self._resources = ExitStack()
        try:
            self._check_registers()
            self._start_admin()
            self._connect(max_version, min_version)
        except BaseException:
            self._abandon()
            raise

    @property
    def version(self) -> int:
        """The version agreed, major << 16 | minor."""
        return self._guest.version or 0

    def poll(self) -> None:
        """Take in what the host sent meanwhile (rescinds, new offers), without waiting.

        Raises PeerError when it broke the protocol, RefusedError when it has stopped the connection, ClosedError when the device is gone.
        """
        self._take_messages()
        self._check_alive()

    def next_vector(self) -> int:
        """An interrupt vector that no channel has. Raises UnavailableError when all are in use."""
        free = next((vector for vector in range(self._own_vectors, self._vector_count) if vector not in self._vectors), None)
        if free is None:
            raise UnavailableError(
                f"no interrupt vector left for a channel: the device has {self._vector_count}, {self._own_vectors} of them for itself"
            )
        return free

    def enable_vector(self, vector: int, eventfd: int) -> None:
        self._irqs.enable(vector, eventfd)
        self._vectors.add(vector)

    def disable_vector(self, vector: int) -> None:
        self._vectors.discard(vector)
        self._irqs.disable(vector)

    def doorbell(self, relid: int) -> int:
        """The eventfd that tells the host to look at a channel's ring. Raises ProtocolError for a relid beyond the doorbells."""
        if relid >= self._doorbells:
            raise ProtocolError(f"channel {relid} has no doorbell: the device has {self._doorbells}")
        return self._bar0.doorbell(reg.REG_DOORBELLS + 4 * relid)

    def create_gpadl(self, relid: int, pfns: Iterable[int]) -> int:
        """Share pages (IOVA / 4096, in order) with a channel's host: the GPADL's handle.

        Raises RefusedError when it says no, RescindedError when the channel is gone.
        """
        handle, sends = self._guest.create_gpadl(relid, [whole_pages(tuple(pfns))])
        self._send(sends, self.timeout)
        answer = self._await(act.GpadlReady, lambda event: event.handle == handle, f"GPADL {handle:#x} to be created", relid)
        if answer.status and relid in self.rescinded:
            raise RescindedError(f"channel {relid} was rescinded by the host")
        if answer.status:
            raise RefusedError(f"the host refused GPADL {handle:#x} of channel {relid}", answer.status)
        return handle

    def teardown_gpadl(self, handle: int) -> None:
        """Take a GPADL back. When this returns the host does not use its memory. A host that was silent before is not waited for again."""
        self._check_alive()
        self._send(self._guest.teardown_gpadl(handle), self._patience)
        gone = f"GPADL {handle:#x} to be torn down"
        self._await(act.GpadlGone, lambda event: event.handle == handle, gone, seconds=self._patience)

    def open_channel(self, relid: int, gpadl: int, downstream_pages: int, vector: int, user_data: bytes) -> None:
        """Open a channel over the rings in a GPADL. Raises RefusedError when the host says no, RescindedError when it takes it away."""
        self._send(self._guest.open_channel(relid, gpadl, downstream_pages, vector, user_data=user_data), self.timeout)
        answer = self._await(act.ChannelOpened, lambda event: event.relid == relid, f"channel {relid} to open", relid)
        if answer.status:
            raise RefusedError(f"the host refused to open channel {relid}", answer.status)

    def close_channel(self, relid: int) -> None:
        """Close a channel; its rings are free once their GPADL is torn down."""
        self._send(self._guest.close_channel(relid), self._patience)

    def release(self, relid: int) -> None:
        """Give a rescinded channel's number back, when nothing of it is left."""
        if relid in self.rescinded:
            self._send(self._guest.release_relid(relid), self._patience)
            self.rescinded.discard(relid)
            self.offers.pop(relid, None)

    def close(self) -> None:
        """End the connection and free its memory, whether the host still answers or not."""
        if self._pair is None:
            return
        try:
            with suppress(*_GONE):
                self._check_alive()
                self._send(self._guest.unload(), self._patience)
                self._await(act.Unloaded, lambda event: True, "the connection to end", seconds=self._patience)
        finally:
            self._abandon()

    def __enter__(self) -> VmbusConnection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _patience(self) -> float:
        """Seconds that a host gets to help clean up."""
        return 0.0 if self._timed_out else self.timeout

    def _check_registers(self) -> None:
        magic, layout = self._bar0.read32(reg.REG_MAGIC), self._bar0.read32(reg.REG_LAYOUT)
        if magic != reg.MAGIC:
            raise UnavailableError(f"{self.device.info.name} is no VMBus function: BAR 0 begins with {magic:#010x}")
        if layout != reg.LAYOUT:
            raise UnavailableError(f"{self.device.info.name} has register layout {layout}, this driver knows {reg.LAYOUT}")
        self._doorbells = self._bar0.read32(reg.REG_CHANNELS)
        self._vector_count = min(self._bar0.read32(reg.REG_VECTORS), self._irqs.count)
        self._own_vectors = int(self._vector_count > 1)  # where there is but one, a channel gets it, and the admin ring is polled

    def _start_admin(self) -> None:
        """Start the admin ring. What is made on the way is given back in reverse order, the device's reset first."""
        clean_up = self._resources.callback
        self._interrupt = eventfd.make()
        clean_up(os.close, self._interrupt)
        clean_up(quietly, self.space.close)
        buffer = self.space.buffer(2 * _ADMIN_PAGES * PAGE, READ | WRITE, "admin-ring", whole=True)
        pair = RingPair.fresh(buffer.memory, 0, _ADMIN_PAGES * PAGE, buffer.size, self.doorbell(0), "admin ring")
        clean_up(pair.close)
        if self._own_vectors:
            self.enable_vector(0, self._interrupt)
            clean_up(quietly, self.disable_vector, 0)
        clean_up(quietly, self._bar0.write32, reg.REG_CONTROL, reg.CONTROL_RESET)
        self._bar0.write64(reg.REG_ADMIN_IOVA, buffer.iova)
        self._bar0.write32(reg.REG_ADMIN_UPSTREAM, _ADMIN_PAGES)
        self._bar0.write32(reg.REG_ADMIN_DOWNSTREAM, _ADMIN_PAGES)
        self._bar0.write32(reg.REG_CONTROL, reg.CONTROL_START)
        self._pair = pair
        self._check_alive()

    def _connect(self, max_version: int, min_version: int) -> None:
        self._send(self._guest.connect(max_version, min_version), self.timeout)
        asked = f"{version_text(min_version)} to {version_text(max_version)}"
        answer = self._await((act.Connected, act.ConnectionRefused), lambda event: True, f"version {asked} to be accepted")
        if isinstance(answer, act.ConnectionRefused):
            raise RefusedError(f"the host speaks no VMBus version from {asked}", answer.connection_state)
        self._send(self._guest.request_offers(), self.timeout)
        self._await(act.AllOffersDelivered, lambda event: True, "the list of offers")

    def _abandon(self) -> None:
        """Let go of everything, without a word to the host."""
        self._pair = None
        self._guest.reset()
        self._resources.close()

    @property
    def _admin(self) -> RingPair:
        if self._pair is None:
            raise ClosedError(f"the VMBus connection over {self.device.info.name} is closed")
        return self._pair

    def _check_alive(self) -> None:
        """Raise RefusedError when the function has failed."""
        if self._bar0.read32(reg.REG_STATUS) & reg.STATUS_FAILED:
            self._timed_out = True  # nothing will come any more, so nothing is waited for in cleaning up
            error = self._bar0.read32(reg.REG_ERROR)
            raise RefusedError(f"the host stopped the connection: {reg.ERRORS.get(error, 'for no known reason')}", error)

    def _out_of_time(self, awaited: str, seconds: float) -> WaitTimeout:
        self._check_alive()
        self._timed_out = True
        return WaitTimeout(awaited, seconds)

    def _send(self, sends: Iterable[act.GuestEvent], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for item in sends:
            if not isinstance(item, act.Send):
                raise UsageError(f"{item} is not a message")
            while not self._admin.outgoing.send(item.data):
                if time.monotonic() > deadline:
                    raise self._out_of_time("room in the admin ring", seconds)
                if not self._take_messages():  # a host whose own messages find no room takes none
                    time.sleep(_NAP_SECONDS)

    def _take_messages(self) -> bool:
        """Feed what came to the state machine, up to a number of messages. True when anything came."""
        for taken in range(_BUDGET):
            packet = self._admin.incoming.receive()
            if packet is None:
                return taken > 0
            if packet.packet_type != PACKET_INBAND:
                raise ProtocolError(f"packet type {packet.packet_type} in the admin ring, need {PACKET_INBAND} (in-band)")
            for event in self._guest.receive(packet.payload):
                self._note(event)
        return True

    def _note(self, event: act.GuestEvent) -> None:
        match event:
            case act.Send():
                self._send([event], self.timeout)
            case act.OfferReceived(relid=relid):
                self.offers[relid] = event
            case act.Rescinded(relid=relid):
                self.rescinded.add(relid)
            case _:
                self._events.append(event)

    def _await(
        self,
        kind: type[EventT] | tuple[type[EventT], ...],
        match: Callable[[EventT], bool],
        awaited: str,
        relid: int | None = None,
        seconds: float | None = None,
    ) -> EventT:
        """The event that is awaited, for `timeout` seconds unless told otherwise.

        Raises WaitTimeout, RefusedError when the host stops the connection, RescindedError when channel `relid` goes meanwhile and
        nothing more will come.
        """
        seconds = self.timeout if seconds is None else seconds
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self._interrupt, select.POLLIN)
        while True:
            busy = self._take_messages()
            for event in self._events:
                if isinstance(event, kind) and match(event):
                    self._events.remove(event)
                    self._timed_out = False
                    return event
            if relid in self.rescinded and kind is act.ChannelOpened:
                raise RescindedError(f"channel {relid} was rescinded by the host")
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._out_of_time(awaited, seconds)
            if not busy and not self._admin.incoming.unmask():
                poller.poll(min(left, 0.5 if self._own_vectors else _POLL_SECONDS) * 1000)
                if eventfd.take(self._interrupt) or not self._own_vectors:
                    self._check_alive()


def _interrupts(device: Device) -> Irq:
    """Raises UnavailableError."""
    try:
        return device.irq(MSIX_IRQ)
    except UsageError as error:
        raise UnavailableError(
            f"{device.info.name} has no MSI-X here, which a VMBus function interrupts by ({error}): bind it to vfio-pci, or to igb_uio"
        ) from error


def quietly(call: Callable[..., object], *arguments: object) -> None:
    """Clean up what may be gone already."""
    with suppress(*_GONE):
        call(*arguments)
