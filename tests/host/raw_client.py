"""A client of a PCI function that knows no manners: whatever it is told to say goes into the admin ring as it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TypeVar

from vfio_vmbus.errors import ClosedError
from vfio_vmbus.iommu.dma import DmaBuffer, DmaSpace
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.device import BAR0_REGION, MSIX_IRQ, Device
from vfio_vmbus.vmbus.gpadl import gpadl_messages, whole_pages
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.ring import PACKET_INBAND, Packet
from vfio_vmbus.wire.table import Side

RW = READ | WRITE
DEADLINE = 60.0
MessageT = TypeVar("MessageT", bound=wire.Message)


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.0005)


class RawClient:
    """The guest's side of an admin ring of `pages` pages each way. `heard`: the host's messages that nobody has asked for yet."""

    def __init__(self, device: Device, pages: int = 8) -> None:
        self.device = device
        self.bar = device.region(BAR0_REGION)
        self.space = DmaSpace(device.dma)
        self.interrupt = eventfd.make()
        self.heard: list[wire.Message] = []
        self.version: int | None = None
        self._handle = 0
        self.buffer = self.space.buffer(2 * pages * PAGE, RW, "raw-admin")
        self._pages = pages
        device.irq(MSIX_IRQ).enable(0, self.interrupt)
        self.start()

    def start(self) -> None:
        """Lay the ring out afresh, and start it."""
        self.pair = RingPair.fresh(
            self.buffer.memory, 0, self._pages * PAGE, self.buffer.size, self.bar.doorbell(reg.REG_DOORBELLS), "raw"
        )
        self.version = None
        self.heard.clear()
        self.bar.write64(reg.REG_ADMIN_IOVA, self.buffer.iova)
        self.bar.write64(reg.REG_ADMIN_UPSTREAM, self._pages | self._pages << 32)
        self.bar.write32(reg.REG_CONTROL, reg.CONTROL_START)
        assert self.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)

    def restart(self) -> None:
        """After a failure: reset the function and start once more."""
        self.device.reset()
        self.pair.close()
        self.start()

    @property
    def status(self) -> tuple[int, int]:
        return self.bar.read32(reg.REG_STATUS), self.bar.read32(reg.REG_ERROR)

    def failed(self, error: int = reg.ERROR_PROTOCOL) -> None:
        """Wait for the function to show this failure."""
        eventually(lambda: self.status[0] & reg.STATUS_FAILED, "the function fails")
        assert self.status == (reg.STATUS_FAILED, error)

    def say(self, *messages: wire.Message | bytes) -> None:
        """Send messages, or bytes that are none, one after the other."""
        for message in messages:
            data = message if isinstance(message, bytes) else message.pack()
            self.post(Packet(packet_type=PACKET_INBAND, transaction_id=0, payload=data))

    def post(self, packet: Packet) -> None:
        """Send any packet. Nobody takes it any more once the function has failed."""
        eventually(
            lambda: self.pair.outgoing.send_packet(packet) or self.status[0] != reg.STATUS_RUNNING, "room in the admin ring"
        )

    def listen(self) -> list[wire.Message]:
        """What came, added to `heard`."""
        while (packet := self.pair.incoming.receive()) is not None:
            self.heard.append(wire.parse_message(packet.payload, sender=Side.HOST, version=self.version))
        return self.heard

    def hear(self, kind: type[MessageT]) -> MessageT:
        """Wait for the next message of a kind, and take it out of `heard`."""
        eventually(lambda: any(isinstance(message, kind) for message in self.listen()), f"a {kind.__name__}")
        found = next(message for message in self.heard if isinstance(message, kind))
        self.heard.remove(found)
        return found

    def connect(self, version: int = wire.SUPPORTED_VERSIONS[0]) -> RawClient:
        """Agree on a version and get all offers."""
        info = wire.TargetInfo.of(sint=wire.MESSAGE_SINT) if version >= wire.VERSION_WIN10_V5 else wire.TargetInfo(0)
        self.say(wire.InitiateContact(version_requested=version, target_info=info))
        assert self.hear(wire.VersionResponse).version_supported == 1
        self.version = version
        self.say(wire.RequestOffers())
        self.hear(wire.AllOffersDelivered)
        return self

    def memory(self, pages: int, access: int = RW, name: str = "raw") -> DmaBuffer:
        return self.space.buffer(pages * PAGE, access, name)

    def share(self, pfns: Sequence[int], relid: int = 1, handle: int | None = None) -> wire.GpadlCreated:
        """Make a GPADL: what the host says to it."""
        if handle is None:
            self._handle += 1
            handle = self._handle
        self.say(*gpadl_messages(relid, handle, [whole_pages(pfns)]))
        return self.hear(wire.GpadlCreated)

    def rings(self, buffer: DmaBuffer, downstream: int, relid: int) -> RingPair:
        """Our end of fresh rings in all of a buffer, with a channel's doorbell."""
        bell = self.bar.doorbell(reg.REG_DOORBELLS + 4 * relid)
        return RingPair.fresh(buffer.memory, 0, downstream, buffer.size, bell, "raw")

    def unshare(self, handle: int, relid: int = 1) -> None:
        self.say(wire.GpadlTeardown(child_relid=relid, gpadl=handle))
        assert self.hear(wire.GpadlTorndown).gpadl == handle

    def open(self, gpadl: int, downstream: int, relid: int = 1, vector: int = 1) -> int:
        """Open a channel: the host's status."""
        self.say(
            wire.OpenChannel(child_relid=relid, open_id=9, ring_gpadl=gpadl, target_vp=vector, downstream_page_offset=downstream)
        )
        return self.hear(wire.OpenChannelResult).status

    def ping(self) -> None:
        """Have the host map a page and let go of it: it serves us."""
        with self.memory(1) as page:
            created = self.share(page.pfns)
            assert created.status == wire.STATUS_SUCCESS
            self.unshare(created.gpadl)

    def close(self) -> None:
        """Give everything back, rings and memory last."""
        with ExitStack() as stack:
            stack.callback(self.device.close)
            stack.callback(os.close, self.interrupt)
            stack.callback(self.space.close)
            stack.callback(self.pair.close)
            with suppress(ClosedError):
                self.device.reset()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
