"""A balloon, its host and its driver in one process; and a host end that says what a test tells it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from vfio_vmbus.channel.device import Channel
from vfio_vmbus.channel.offered import OfferedDevice, open_offered
from vfio_vmbus.drivers.balloon.driver import Balloon
from vfio_vmbus.drivers.balloon.pressure import Pressure
from vfio_vmbus.host.balloon import Balloon as BalloonVsp
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.vsp import ChannelContext
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.wire import dm
from vfio_vmbus.wire.guids import CLASS_BALLOON
from vfio_vmbus.wire.ring import Packet
from vfio_vmbus.wire.table import Side
from vfio_vmbus.wire.vmbus import ChannelOffer

PATIENCE = 30.0
PLENTY = Pressure(total=1 << 20, available=1 << 19, committed=1 << 18, swap=7)


@dataclass
class Pair:
    host: EmbeddedHost
    vsp: BalloonVsp
    device: OfferedDevice
    driver: Balloon

    def until(self, condition: Callable[[], Any]) -> None:
        """Serve until it holds."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it never came about"
            self.driver.serve(0.005)

    def ask(self, pages: int) -> None:
        """The host asks for pages, and the answer has come."""
        self.host.run(lambda: self.vsp.request(pages))
        self.until(lambda: not self.vsp.busy)

    def give_back(self, pages: int) -> None:
        self.host.run(lambda: self.vsp.give_back(pages))
        self.until(lambda: not self.vsp.busy)


@contextmanager
def balloon_pair(vsp: dict[str, Any] | None = None, **options: Any) -> Iterator[Pair]:
    """vsp: options of the host's end; the others are the driver's."""
    settings = {"limit": 1 << 16, "pressure": lambda: PLENTY, "report": 3600.0, **options}
    with EmbeddedHost() as host:
        balloon = host.add_balloon(**(vsp or {}))
        with open_offered(host.attach(balloon)) as device, Balloon(device, **settings) as driver:
            yield Pair(host, balloon, device, driver)


@contextmanager
def raw_guest(**options: Any) -> Iterator[tuple[EmbeddedHost, BalloonVsp, OfferedDevice, Channel]]:
    """An open channel on which a test says what it likes."""
    with EmbeddedHost() as host:
        balloon = host.add_balloon(**options)
        with open_offered(host.attach(balloon)) as device:
            yield host, balloon, device, device.open(4)


def wait_packet(channel: Channel) -> Packet | None:
    """The next packet; None when none comes within a while."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        packet = channel.incoming.receive()
        if packet is not None:
            return packet
        if not channel.incoming.unmask():
            channel.wait(0.1)
    return None


class ScriptedVsp:
    """A balloon's host end: answers from a script. `heard` is what the guest said."""

    def __init__(self, answer: Callable[[dm.DmMessage], list[bytes]]) -> None:
        self.offer = ChannelOffer(class_guid=CLASS_BALLOON, instance_guid=uuid4(), server_context_size=0)
        self.heard: list[dm.DmMessage] = []
        self._answer = answer
        self._context: ChannelContext | None = None

    def open(self, context: ChannelContext) -> None:
        self._context = context
        asyncio.get_running_loop().add_reader(context.doorbell, self._serve)
        self._serve()

    def close(self) -> None:
        if self._context is not None:
            asyncio.get_running_loop().remove_reader(self._context.doorbell)
            self._context = None

    def gpadl_gone(self, handle: int) -> None:
        pass

    def say(self, data: bytes, packet: Packet | None = None) -> None:
        assert self._context is not None
        assert self._context.pair.outgoing.send_packet(packet or Packet(payload=data))

    def _serve(self) -> None:
        context = self._context
        assert context is not None
        eventfd.take(context.doorbell)
        while True:
            packet = context.pair.incoming.receive()
            if packet is None:
                if not context.pair.incoming.unmask():
                    return
                continue
            message = dm.parse_message(packet.payload, sender=Side.GUEST)
            self.heard.append(message)
            for data in self._answer(message):
                self.say(data)


def polite(message: dm.DmMessage) -> list[bytes]:
    """What a good host answers."""
    yes = dm.Accepted.of(is_accepted=1)
    if isinstance(message, dm.VersionRequest):
        return [dm.encode_message(dm.VersionResponse(flags=yes))]
    if isinstance(message, dm.CapabilitiesReport):
        return [dm.encode_message(dm.CapabilitiesResponse(flags=yes))]
    return []
