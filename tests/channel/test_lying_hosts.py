"""A driver survives its host: whatever that says, or does not say, ends in a typed error, with nothing left and the device usable."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from vfio_vmbus.channel import connection as connection_module
from vfio_vmbus.channel.connection import VmbusConnection
from vfio_vmbus.channel.device import READ, WRITE
from vfio_vmbus.channel.offered import OfferedDevice
from vfio_vmbus.errors import PeerError, ProtocolError, RefusedError, RescindedError, RingError, VfioVmbusError, WaitTimeout
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.testing.scripted_function import Script, ScriptedFunction, card, honest
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.ring import PACKET_COMPLETION

RW = READ | WRITE
TIMEOUT = 60.0
"""Seconds that a host has to answer. For one that will not, they pass quickly: see `Clock`."""


class Clock:
    """The driver's clock. `hurry`: from now on its seconds are milliseconds, and somebody who sleeps is woken to notice that."""

    def __init__(self) -> None:
        self.sleep = time.sleep
        self._rate = 1
        self._base = self._since = time.monotonic()

    def monotonic(self) -> float:
        return self._base + (time.monotonic() - self._since) * self._rate

    def hurry(self, host: ScriptedFunction) -> None:
        self._base, self._since, self._rate = self.monotonic(), time.monotonic(), 1000
        self._wake(host)

    def _wake(self, host: ScriptedFunction) -> None:
        if self._rate > 1:
            eventfd.ring(host.function.vectors.fds[0])
            host.later(0.002, lambda: self._wake(host))

    def rest(self) -> None:
        self._base, self._since, self._rate = self.monotonic(), time.monotonic(), 1


clock = Clock()


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(connection_module, "time", clock)
    yield
    clock.rest()


Say = Callable[[ScriptedFunction, wire.Message], object]


@pytest.fixture
def host() -> Iterator[ScriptedFunction]:
    with nothing_left(objects=False), ScriptedFunction() as host:
        for number in range(4):
            host.function.doorbell(number)
        yield host


def instead(kind: type[wire.Message], say: Say) -> Script:
    """Do that with messages of one kind, and what is honest with all others."""

    def script(host: ScriptedFunction, message: wire.Message) -> bool:
        if not isinstance(message, kind):
            return False
        say(host, message)
        return True

    return script


def after(kind: type[wire.Message], say: Say) -> Script:
    """Answer honestly, then do that."""

    def script(host: ScriptedFunction, message: wire.Message) -> bool:
        if isinstance(message, kind):
            host.answer(message)
            say(host, message)
            return True
        return False

    return script


def says(*messages: wire.Message | bytes) -> Say:
    return lambda host, message: host.say(*messages)


def nothing(host: ScriptedFunction, message: wire.Message) -> None:
    """Heard, and that is all."""
    clock.hurry(host)


def offer(relid: int, number: int = 1, sub_channel: int = 0) -> wire.OfferChannel:
    return wire.OfferChannel(
        offer=card(number, sub_channel), child_relid=relid, interrupt=wire.InterruptFlags.of(dedicated=1), connection_id=relid
    )


def created(host: ScriptedFunction, message: wire.Message, **wrong: int) -> None:
    assert isinstance(message, wire.GpadlHeader)
    host.say(replace(wire.GpadlCreated(child_relid=message.child_relid, gpadl=message.gpadl, status=0), **wrong))


def opened(host: ScriptedFunction, message: wire.Message, **wrong: int) -> None:
    assert isinstance(message, wire.OpenChannel)
    host.say(replace(wire.OpenChannelResult(child_relid=message.child_relid, open_id=message.open_id, status=0), **wrong))


def drive(host: ScriptedFunction) -> None:
    """All that a driver does with a connection."""
    with VmbusConnection(host.device, timeout=TIMEOUT) as connection:
        if not connection.offers:
            return
        device = OfferedDevice(connection, next(iter(connection.offers.values())), lambda: None)
        try:
            device.open(4)
            device.share(3 * PAGE, RW, "shared").close()
            connection.poll()
        finally:
            device.close()


def accepted() -> bytes:
    return wire.VersionResponse(
        version_supported=1, connection_state=0, message_connection_id=wire.MESSAGE_CONNECTION_ID_4
    ).pack()


CONTACT, OFFERS, HEADER, OPEN, TEARDOWN = (
    wire.InitiateContact,
    wire.RequestOffers,
    wire.GpadlHeader,
    wire.OpenChannel,
    wire.GpadlTeardown,
)

LIES: dict[str, tuple[Script, type[PeerError], str]] = {
    "garbage": (instead(CONTACT, says(b"\xff" * 40)), ProtocolError, "number 0xffffffff"),
    "zeroes": (instead(CONTACT, says(bytes(16))), ProtocolError, "number 0x0"),
    "half a message": (instead(CONTACT, says(accepted()[:8])), ProtocolError, "bytes"),
    "four bytes": (instead(CONTACT, says(accepted()[:4])), ProtocolError, "bytes"),
    "an empty packet": (instead(CONTACT, says(b"")), ProtocolError, "bytes"),
    "a long message": (instead(CONTACT, says(accepted() + bytes(400))), ProtocolError, "bytes"),
    "a guest's message": (instead(CONTACT, lambda host, message: host.say(message)), ProtocolError, "InitiateContact"),
    "another answer": (instead(CONTACT, says(wire.AllOffersDelivered())), ProtocolError, "not allowed"),
    "two answers": (instead(CONTACT, says(accepted(), accepted())), ProtocolError, "not allowed"),
    "a completion packet": (
        instead(CONTACT, lambda host, message: host.say(accepted(), packet_type=PACKET_COMPLETION)),
        ProtocolError,
        "packet type 11",
    ),
    "a failed set-up": (
        instead(CONTACT, says(wire.VersionResponse(version_supported=1, connection_state=2, message_connection_id=0))),
        RefusedError,
        "0x2",
    ),
    "no version": (instead(CONTACT, says(wire.VersionResponse(version_supported=0))), RefusedError, "no VMBus version"),
    "no answer": (instead(CONTACT, nothing), WaitTimeout, r"60 s for version 2\.4 to 5\.3 to be accepted"),
    "no end of offers": (
        instead(OFFERS, lambda host, message: (host.say(offer(1)), clock.hurry(host))),
        WaitTimeout,
        "the list of offers",
    ),
    "channel 0": (instead(OFFERS, says(offer(0))), ProtocolError, r"channel 0, limit 1\.\."),
    "a channel beyond all": (instead(OFFERS, says(offer(wire.MAX_RELID + 1))), ProtocolError, "limit 1"),
    "a channel twice": (instead(OFFERS, says(offer(1), offer(1, 2))), ProtocolError, "offered and not released"),
    "a device twice": (instead(OFFERS, says(offer(1), offer(2))), ProtocolError, "a second time"),
    "a subchannel alone": (instead(OFFERS, says(offer(1, 1, 1))), ProtocolError, "without its primary"),
    "a channel without a doorbell": (
        instead(OFFERS, says(offer(1000), wire.AllOffersDelivered())),
        ProtocolError,
        "no doorbell",
    ),
    "a rescind of nothing": (instead(OFFERS, says(wire.RescindChannelOffer(child_relid=9))), ProtocolError, "no channel 9"),
    "two rescinds": (
        after(OPEN, says(wire.RescindChannelOffer(child_relid=1), wire.RescindChannelOffer(child_relid=1))),
        ProtocolError,
        "a second time",
    ),
    "two ends of offers": (after(OFFERS, says(wire.AllOffersDelivered())), ProtocolError, "not allowed while running"),
    "an end that nobody asked for": (after(OFFERS, says(wire.UnloadResponse())), ProtocolError, "not allowed"),
    "an opening that nobody asked for": (
        after(OFFERS, says(wire.OpenChannelResult(child_relid=1, open_id=1, status=0))),
        ProtocolError,
        "need opening",
    ),
    "a modification that nobody asked for": (
        after(OFFERS, says(wire.ModifyChannelResponse(child_relid=1, status=0))),
        ProtocolError,
        "not being modified",
    ),
    "a GPADL that nobody asked for": (
        after(OFFERS, says(wire.GpadlCreated(child_relid=1, gpadl=5, status=0))),
        ProtocolError,
        "no GPADL 0x5",
    ),
    "a GPADL refused": (instead(HEADER, lambda h, m: created(h, m, status=0xC0000001)), RefusedError, "0xc0000001"),
    "another GPADL": (instead(HEADER, lambda h, m: created(h, m, gpadl=77)), ProtocolError, "no GPADL 0x4d"),
    "another channel's GPADL": (instead(HEADER, lambda h, m: created(h, m, child_relid=2)), ProtocolError, "is of channel 1"),
    "a GPADL twice": (after(HEADER, created), ProtocolError, "need creating"),
    "a GPADL torn down instead": (
        instead(HEADER, lambda h, m: h.say(wire.GpadlTorndown(gpadl=m.gpadl))),  # type: ignore[attr-defined]
        ProtocolError,
        "need tearing",
    ),
    "no GPADL": (instead(HEADER, nothing), WaitTimeout, "GPADL 0x[0-9a-f]+ to be created"),
    "a channel refused": (instead(OPEN, lambda h, m: opened(h, m, status=0xC0000022)), RefusedError, "0xc0000022"),
    "another channel opened": (instead(OPEN, lambda h, m: opened(h, m, child_relid=2)), ProtocolError, "no channel 2"),
    "another opening": (instead(OPEN, lambda h, m: opened(h, m, open_id=99)), ProtocolError, "0x63"),
    "a channel opened twice": (after(OPEN, opened), ProtocolError, "need opening"),
    "no opening": (instead(OPEN, nothing), WaitTimeout, "channel 1 to open"),
    "rescinded instead of opened": (instead(OPEN, says(wire.RescindChannelOffer(child_relid=1))), RescindedError, "channel 1"),
    "a broken ring": (instead(OFFERS, lambda host, message: host.break_ring()), RingError, "index outside"),
    "a ring broken backwards": (after(OFFERS, lambda host, message: host.break_ring(8)), RingError, "ring"),
    "a function that failed": (instead(OFFERS, lambda host, message: host.fail()), RefusedError, "host stopped the connection"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_typed_error_and_leaves_nothing(host: ScriptedFunction, lie: str) -> None:
    host.script, kind, said = LIES[lie]
    with nothing_left(objects=False), pytest.raises(kind, match=said):
        drive(host)
    host.script = honest
    clock.rest()
    drive(host)


def test_lies_leave_no_private_memory_either(host: ScriptedFunction) -> None:
    with nothing_left():
        for script, kind, _ in list(LIES.values())[::3]:
            host.script = script
            with pytest.raises(kind):
                drive(host)
            clock.rest()


def test_what_is_torn_down_is_not_waited_for_twice(host: ScriptedFunction) -> None:
    """Closing a device of a host that has fallen silent waits once, and frees everything."""
    host.script = instead(TEARDOWN, nothing)
    waits = []
    with nothing_left():
        connection = VmbusConnection(host.device, timeout=TIMEOUT)
        device = OfferedDevice(connection, connection.offers[1], connection.close)
        device.open(4)
        for _ in range(5):
            device.share(PAGE, RW, "shared")
        patience = type(connection)._patience.fget
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VmbusConnection, "_patience", property(lambda self: waits.append(patience(self)) or waits[-1]))
            device.close()
        del connection, device
    assert waits == [TIMEOUT] * 3 + [0.0] * (len(waits) - 3)  # room for two messages, an answer that does not come; then no more
    assert len(waits) > 10


def test_an_answer_that_comes_too_late_is_not_taken_for_another(host: ScriptedFunction) -> None:
    asked: list[wire.Message] = []

    def keep(host: ScriptedFunction, message: wire.Message) -> None:
        asked.append(message)
        clock.hurry(host)

    with nothing_left(), VmbusConnection(host.device, timeout=TIMEOUT) as connection:
        host.script = instead(HEADER, keep)
        with pytest.raises(WaitTimeout):
            connection.create_gpadl(1, (1,))
        host.script = honest
        clock.rest()
        host.answer(asked[0])
        late = asked[0].gpadl  # type: ignore[attr-defined]
        other = connection.create_gpadl(1, (2,))
        assert other != late
        connection.teardown_gpadl(other)
        connection.teardown_gpadl(late)
    assert host.errors == []


def moments() -> list[int]:
    return list(range(1, 14))


TURNS: dict[str, Callable[[ScriptedFunction], object]] = {
    "rescinds": lambda host: host.rescind(1),
    "fails": lambda host: host.fail(),
    "breaks the ring": lambda host: host.break_ring(),
    "falls silent": lambda host: (setattr(host, "listening", False), clock.hurry(host)),
}


@pytest.mark.parametrize("moment", moments())
@pytest.mark.parametrize("turn", TURNS)
def test_a_host_may_turn_at_any_moment(host: ScriptedFunction, turn: str, moment: int) -> None:
    def script(host: ScriptedFunction, message: wire.Message) -> bool:
        if len(host.heard) == moment:
            TURNS[turn](host)
            return turn in ("fails", "falls silent")
        return False

    host.script = script
    with nothing_left(objects=False):
        try:
            drive(host)
        except PeerError as error:
            assert str(error)
            del error
    assert host.errors == []
    clock.rest()
    host.script, host.listening = honest, True
    if turn != "rescinds":
        drive(host)


def test_the_moments_are_all_there_are(host: ScriptedFunction) -> None:
    drive(host)
    assert len(host.heard) <= len(moments())


def in_time(call: Callable[[], object]) -> BaseException | None:
    """Run it on a thread that must end; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except VfioVmbusError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive(), "it never ends"
    return raised[0] if raised else None


def test_a_host_that_never_stops_talking_does_not_hold_up_the_end(host: ScriptedFunction) -> None:
    """While a connection ends everything but the end is ignored, however much of it comes."""
    connection = VmbusConnection(host.device, timeout=TIMEOUT)

    def flood(host: ScriptedFunction, message: wire.Message) -> None:
        host.every_turn(lambda: host.say(*[wire.AllOffersDelivered()] * 50))
        clock.hurry(host)

    host.script = instead(wire.Unload, flood)
    with nothing_left():
        assert in_time(connection.close) is None
    clock.rest()
    host.script = honest
    drive(host)


def test_a_flood_of_offers_ends_at_the_limit(host: ScriptedFunction) -> None:
    numbers = iter(range(1, wire.MAX_RELID + 2))
    waiting = [offer(next(numbers))]

    def flood() -> None:
        while waiting and host.say(waiting[0]):
            waiting[:] = [offer(number, number) for number in [next(numbers, 0)] if number]

    host.script = instead(OFFERS, lambda host, message: host.every_turn(flood))
    with nothing_left():
        error = in_time(lambda: VmbusConnection(host.device, timeout=TIMEOUT))
        assert isinstance(error, ProtocolError)
        assert f"limit 1..{wire.MAX_RELID}" in str(error)
        del error


def test_a_flood_of_signals_is_no_answer(host: ScriptedFunction) -> None:
    def flood(host: ScriptedFunction, message: wire.Message) -> None:
        host.every_turn(lambda: eventfd.ring(host.function.vectors.fds[0]))
        clock.hurry(host)

    host.script = instead(OFFERS, flood)
    with nothing_left():
        error = in_time(lambda: VmbusConnection(host.device, timeout=TIMEOUT))
        assert isinstance(error, WaitTimeout)
        assert error.awaited == "the list of offers"
        del error


def test_a_host_that_takes_no_messages_is_waited_for_once(host: ScriptedFunction) -> None:
    connection = VmbusConnection(host.device, timeout=TIMEOUT)
    host.listening = False
    clock.hurry(host)
    with nothing_left():
        with pytest.raises(WaitTimeout, match="room in the admin ring"):
            connection.create_gpadl(1, range(8190))
        connection.close()
        del connection


def steal_signals(host: ScriptedFunction, vector: int) -> None:
    """Make a client's eventfd a blocking one, ring it and empty it again, on and on."""
    fd = host.function.vectors.fds[vector]
    os.set_blocking(fd, True)

    def turn() -> None:
        os.eventfd_write(fd, 1)
        eventfd.take(fd)

    host.every_turn(turn)


def test_a_host_that_steals_our_signals_does_not_hang_us(host: ScriptedFunction) -> None:
    connection = VmbusConnection(host.device, timeout=TIMEOUT)
    device = OfferedDevice(connection, connection.offers[1], connection.close)
    channel = device.open(2)
    steal_signals(host, 0)
    steal_signals(host, 1)
    with nothing_left(objects=False):
        for _ in range(20):
            buffer = device.share(PAGE, RW, "shared")
            assert in_time(lambda: [connection.poll() for _ in range(20)]) is None
            assert in_time(lambda: [channel.wait(0.0005) for _ in range(20)]) is None
            buffer.close()
    device.close()
