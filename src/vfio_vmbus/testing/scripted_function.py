"""A VMBus host behind a PCI function that says what it is told to: the peer for tests of drivers against hosts that lie.

    with ScriptedFunction(script) as host:
        connection = VmbusConnection(host.device)

It answers as an honest host does, with channels that lead nowhere, except where `script(host, message)` returns True: then the script has
dealt with the message itself, by `say`, `host.machine`, `later` or by doing nothing at all.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TypeVar
from uuid import UUID

from ..errors import ProtocolError
from ..memory.mapping import Piece
from ..ring.pair import RingPair
from ..vfio import eventfd
from ..vfio import registers as reg
from ..vfio.function import PciFunction
from ..vfio.inprocess import InProcessDevice
from ..vmbus import actions as act
from ..vmbus.host import HostConnection
from ..vmbus.limits import HostLimits
from ..wire import vmbus as wire
from ..wire.guids import CLASS_NETWORK
from ..wire.ring import PACKET_INBAND, RING_WRITE_INDEX
from ..wire.table import Side

T = TypeVar("T")
Script = Callable[["ScriptedFunction", wire.Message], bool]


def honest(host: ScriptedFunction, message: wire.Message) -> bool:
    """The script of a host that does nothing but what is right."""
    return False


def card(number: int = 1, sub_channel: int = 0) -> wire.ChannelOffer:
    """The offer of a network card."""
    return wire.ChannelOffer(class_guid=CLASS_NETWORK, instance_guid=UUID(int=number), sub_channel_index=sub_channel)


class ScriptedFunction:
    """One function with its device, served by a thread of its own until `close`.

    heard: the client's messages. errors: what it did wrong. machine: the honest host's end of the control plane. All of the host's
    methods may be called from any thread; scripts run on the host's.
    """

    def __init__(
        self,
        script: Script = honest,
        *,
        offers: Iterable[wire.ChannelOffer] = (card(),),
        max_version: int = wire.SUPPORTED_VERSIONS[0],
        min_version: int = wire.SUPPORTED_VERSIONS[-1],
        channels: int = reg.CHANNELS,
        vectors: int = reg.VECTORS,
    ) -> None:
        self.script = script
        self.heard: list[wire.Message] = []
        self.errors: list[Exception] = []
        self.listening = True
        """Set it to False to leave the client's messages in the ring."""
        self.lock = threading.RLock()
        self.machine = HostConnection(HostLimits(target_vps=vectors), max_version=max_version, min_version=min_version)
        self.relids = [self.machine.offer(offer)[0] for offer in offers]
        self.function = PciFunction("scripted", channels=channels, vectors=vectors)
        self.function.backend = self
        self.device = self.next_device()
        self.pair: RingPair | None = None
        """The admin ring, this end of it."""
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._every_turn: list[Callable[[], None]] = []
        self._wake = eventfd.make()
        self._doorbell = self.function.doorbell(0)
        self._end = False
        self._thread = threading.Thread(target=self._main, name="scripted-host", daemon=True)
        self._thread.start()

    def next_device(self) -> InProcessDevice:
        """The function as its next client gets it, after the last one closed its `device`."""
        return InProcessDevice(self.function, self._locked, lambda: None)

    # What a script can do.

    def say(self, *messages: wire.Message | bytes, packet_type: int = PACKET_INBAND) -> int:
        """Send messages, or any bytes instead; how many. What finds no room, or no ring, is lost."""
        sent = 0
        with self.lock:
            for message in messages:
                data = message if isinstance(message, bytes) else message.pack()
                if self.pair is not None and self.pair.outgoing.send(data, packet_type=packet_type):
                    sent += 1
        return sent

    def carry_out(self, actions: list[act.HostAction]) -> None:
        """Do what `machine` asks, as if all of it went well, and send its messages."""
        todo = list(actions)
        while todo:
            match todo.pop(0):
                case act.Send(data=data):
                    self.say(data)
                case act.GpadlCreate(handle=handle):
                    todo = self.machine.gpadl_created(handle) + todo
                case act.GpadlTeardown(handle=handle):
                    todo = self.machine.gpadl_torn_down(handle) + todo
                case act.ChannelOpen(relid=relid):
                    todo = self.machine.channel_opened(relid) + todo
                case act.ChannelClose(relid=relid):
                    todo = self.machine.channel_closed(relid) + todo

    def answer(self, message: wire.Message) -> None:
        """What an honest host does with a message."""
        with self.lock:
            self.carry_out(self.machine.receive(message.pack()))

    def rescind(self, relid: int) -> None:
        """Take an offer back, honestly."""
        with self.lock:
            self.carry_out(self.machine.rescind(relid))

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it on the host's thread, then."""
        with self.lock:
            self._later.append((time.monotonic() + seconds, call))
        eventfd.ring(self._wake)

    def every_turn(self, call: Callable[[], None]) -> None:
        """Call it again and again from now on, without a rest: for floods."""
        with self.lock:
            self._every_turn.append(call)
        eventfd.ring(self._wake)

    def break_ring(self, value: int = 0xFFFF_FFFF) -> None:
        """Put an impossible write index into the ring towards the client, and signal it."""
        with self.lock:
            if self.pair is not None:
                self.pair.outgoing.mapping.write(RING_WRITE_INDEX, value.to_bytes(4, "little"))
            eventfd.ring(self.function.vectors.fds[0])

    def fail(self, error: int = reg.ERROR_PROTOCOL) -> None:
        """Stop the client, as a host does that cannot go on."""
        with self.lock:
            self.function.fail(error)

    # The function's backend.

    def start(self, pieces: list[Piece], downstream: int) -> None:
        self.pair = RingPair(pieces, downstream, Side.HOST, self.function.vectors.fds[0], "scripted admin ring")
        eventfd.ring(self._wake)

    def revoke(self, iova: int, size: int) -> None:
        """Nothing of the client's is mapped but the admin ring."""

    def stop(self) -> None:
        self.carry_out(self.machine.reset())
        if self.pair is not None:
            self.pair.close()
            self.pair = None
        self._every_turn.clear()

    # Its thread.

    def close(self) -> None:
        """End the thread and the function."""
        if self._thread.is_alive():
            self._end = True
            eventfd.ring(self._wake)
            self._thread.join()
            self.function.close()
            os.close(self._wake)

    def __enter__(self) -> ScriptedFunction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _locked(self, call: Callable[[], T]) -> T:
        with self.lock:
            return call()

    def _main(self) -> None:
        poller = select.poll()
        for fd in (self._wake, self._doorbell):
            poller.register(fd, select.POLLIN)
        while not self._end:
            with self.lock:
                due = min((when for when, _ in self._later), default=time.monotonic() + 3600)
                idle = not self._every_turn
            poller.poll(max(0.0, due - time.monotonic()) * 1000 if idle else 0)
            for fd in (self._wake, self._doorbell):
                eventfd.take(fd)
            with self.lock:
                self._turn()
            time.sleep(0)  # let others have the lock

    def _turn(self) -> None:
        now = time.monotonic()
        ready = [call for when, call in self._later if when <= now]
        self._later = [item for item in self._later if item[0] > now]
        for call in (*ready, *self._every_turn):
            call()
        try:
            while self.listening and self.pair is not None and (packet := self.pair.incoming.receive()) is not None:
                self._hear(packet.payload)
        except ProtocolError as error:
            self.errors.append(error)
            self.function.fail(reg.ERROR_PROTOCOL)

    def _hear(self, data: bytes) -> None:
        message = wire.parse_message(data, sender=Side.GUEST, version=self.machine.version)
        self.heard.append(message)
        if not self.script(self, message):
            self.answer(message)
