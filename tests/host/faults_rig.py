"""A device that takes and says what it is told to, behind a host with faults, and a client without manners before it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import uuid4

from raw_client import RawClient, eventually

from vfio_vmbus.errors import ProtocolError, RingError
from vfio_vmbus.host.connection import Connection
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.faults.fate import Desk
from vfio_vmbus.host.faults.plan import FaultPlan, Flow
from vfio_vmbus.host.vsp import ChannelContext
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.device import MSIX_IRQ
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.guids import CLASS_GUIDS
from vfio_vmbus.wire.ring import PACKET_COMPLETION, Packet


class Talker:
    """A device. It completes what wants completion, with the same payload, and keeps all that it gets."""

    name = "talker"

    def __init__(self) -> None:
        self.offer = wire.ChannelOffer(class_guid=CLASS_GUIDS["heartbeat"], instance_guid=uuid4())
        self.context: ChannelContext | None = None
        self.got: list[Packet] = []

    def open(self, context: ChannelContext) -> None:
        self.context = context
        asyncio.get_running_loop().add_reader(context.doorbell, context.guarded(self._take))

    def _take(self) -> None:
        assert self.context is not None
        eventfd.take(self.context.doorbell)
        pair = self.context.pair
        while True:
            packet = pair.incoming.receive()
            if packet is not None:
                self.got.append(packet)
                if packet.completion_requested:
                    pair.outgoing.send(packet.payload, packet_type=PACKET_COMPLETION, transaction_id=packet.transaction_id)
            elif not pair.incoming.unmask():
                return

    def say(self, packets: Sequence[Packet]) -> int:
        """How many there was room for. On the host's loop."""
        assert self.context is not None
        send = self.context.pair.outgoing.send_packet
        return next((index for index, packet in enumerate(packets) if not send(packet)), len(packets))

    def close(self) -> None:
        if self.context is not None:
            asyncio.get_running_loop().remove_reader(self.context.doorbell)
            self.context = None

    def gpadl_gone(self, handle: int) -> None:
        pass


@dataclass
class Talk:
    """Host, device, and a client with an open channel: `pair` is its end, `interrupt` its eventfd."""

    host: EmbeddedHost
    device: Talker
    client: RawClient
    pair: RingPair
    interrupt: int
    heard: list[Packet] = field(default_factory=list)

    def tell(self, packets: Sequence[Packet]) -> None:
        """From the device to the client, all in one turn."""
        assert self.host.run(lambda: self.device.say(packets)) == len(packets)

    def ask(self, packets: Sequence[Packet]) -> None:
        """From the client to the device."""
        for packet in packets:
            eventually(lambda packet=packet: self.pair.outgoing.send_packet(packet), "room")

    def listen(self) -> list[Packet]:
        """What came to the client so far."""
        while True:
            try:
                packet = self.pair.incoming.receive()
            except RingError:
                raise
            except ProtocolError:
                continue  # its lists do not add up
            if packet is None:
                return self.heard
            self.heard.append(packet)

    def until(self, condition: Callable[[], object], what: str) -> None:
        eventually(lambda: self.listen() is None or condition(), what)

    def settled(self) -> None:
        """Whatever the relay had to do is done: what it does in a turn it does before a client that asks later is answered."""
        for _ in range(3):
            self.host.run(lambda: None)
        self.listen()

    def hits(self, flow: Flow) -> int:
        return sum(count.hits for count in self.host.fault_counts() if count.flow == flow.value)


@contextmanager
def talk(*texts: str, seed: int = 0, pages: int = 8) -> Iterator[Talk]:
    with EmbeddedHost(poll="interrupt", faults=FaultPlan.parse(texts, seed)) as host:
        device = Talker()
        with RawClient(host.attach(device)) as client:
            client.connect()
            rings = client.memory(pages)
            gpadl = client.share(rings.pfns).gpadl
            interrupt = eventfd.make()
            try:
                client.device.irq(MSIX_IRQ).enable(1, interrupt)
                half = pages // 2
                bell = client.bar.doorbell(reg.REG_DOORBELLS + 4)
                with RingPair.fresh(rings.memory, 0, half * PAGE, pages * PAGE, bell, "ours") as pair:
                    assert pair.incoming.unmask() is False
                    assert client.open(gpadl, half) == wire.STATUS_SUCCESS
                    yield Talk(host, device, client, pair, interrupt)
            finally:
                os.close(interrupt)


def chosen(text: str, flow: Flow, count: int, *, seed: int = 0, device: str = "talker") -> list[int]:
    """Which of `count` events an order hits."""
    (stream,) = Desk(FaultPlan.parse([text], seed)).streams(device, flow)
    found = []
    for number in range(count):
        if stream.due():
            stream.hit()
            found.append(number)
    return found


def connection(rig: Talk) -> Connection:
    end = rig.host.connection_of(rig.device)
    assert isinstance(end, Connection)
    return end
