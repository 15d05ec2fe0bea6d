"""Packets, completions and interrupts of a channel behind a relay: who is hit is known beforehand, and nobody else is touched."""

from __future__ import annotations

import pytest
from faults_rig import Talk, chosen, connection, talk
from raw_client import eventually

from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.errors import RingError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.faults.plan import FaultPlan, Flow
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.ring.primitives import WRITE_INDEX
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.gpa import PageRange
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_XFER_PAGES, Packet, TransferRange

COUNT = 60


def numbered(count: int = COUNT, *, completed: bool = False) -> list[Packet]:
    return [
        Packet(transaction_id=number, completion_requested=completed, payload=number.to_bytes(8, "little") + b"\x55" * 24)
        for number in range(count)
    ]


def numbers(packets: list[Packet]) -> list[int]:
    return [packet.transaction_id for packet in packets]


def test_without_orders_there_is_no_relay_and_no_other_carrier() -> None:
    with talk() as rig:
        end = connection(rig)
        assert type(end._open_channels[1].pair) is RingPair
        assert end.carrier.name == end.name
        assert type(end.carrier).__name__ == "AdminRing"
        assert rig.host.fault_counts() == []
        assert rig.host.fault_counters("talker") == {}


def test_orders_for_other_flows_change_nothing_here() -> None:
    with talk("delay:messages:1/10:1ms") as rig:
        assert type(connection(rig)._open_channels[1].pair) is RingPair
    with talk("drop:packets:1/10") as rig:
        assert type(connection(rig).carrier).__name__ == "AdminRing"


@pytest.mark.parametrize("pages", [4, 8, 64])
def test_a_relay_that_hits_nobody_changes_nothing(pages: int) -> None:
    """Packets of all kinds, more than the rings hold, pass as they are, in order, completed each."""
    sent = [
        Packet(transaction_id=1, payload=b""),
        Packet(packet_type=PACKET_GPA_DIRECT, transaction_id=2, pages=(PageRange(5000, 7, (3, 4)),), payload=b"12345678"),
        Packet(packet_type=0x77, transaction_id=(1 << 64) - 1, completion_requested=True, payload=b"\xff" * 3200),
    ]
    told = [
        Packet(
            packet_type=PACKET_XFER_PAGES,
            transaction_id=9,
            pageset_id=0xCAFE,
            ranges=(TransferRange(byte_count=60, byte_offset=0),) * 64,
        ),
        *numbered(5),
    ]
    with talk("drop:packets:1:after=1000000", pages=pages) as rig:
        for _ in range(20):
            before = len(rig.heard)
            rig.ask(sent)
            rig.tell(told)
            rig.until(lambda before=before: len(rig.heard) == before + len(told) + 1, "all of it")
        assert rig.device.got == sent * 20
        done = [packet for packet in rig.heard if packet.packet_type == PACKET_COMPLETION]
        assert [packet for packet in rig.heard if packet.packet_type != PACKET_COMPLETION] == told * 20
        assert [(packet.transaction_id, packet.payload) for packet in done] == [((1 << 64) - 1, b"\xff" * 3200)] * 20


def test_full_rings_lose_nothing() -> None:
    """The client does not read, and the device says more and more; then the client reads."""
    with talk("drop:packets:1:after=1000000") as rig:
        told = 0
        while told < 2000:  # beyond the relay's ring and the client's
            room = rig.host.run(lambda start=told: rig.device.say(numbered(2000)[start : start + 40]))
            told += room
            if room < 40:
                rig.listen()
        rig.until(lambda: len(rig.heard) == told, "all of it")
        assert numbers(rig.heard) == list(range(told))


def test_packets_to_the_guest_are_lost() -> None:
    order = "drop:packets-to-guest:0.3"
    gone = chosen(order, Flow.PACKETS_TO_GUEST, COUNT)
    with talk(order) as rig:
        rig.tell(numbered())
        rig.until(lambda: len(rig.heard) == COUNT - len(gone), "the others")
        rig.settled()
        assert numbers(rig.heard) == [number for number in range(COUNT) if number not in gone]
        assert rig.hits(Flow.PACKETS_TO_GUEST) == len(gone) > 10
        assert rig.host.fault_counters("talker") == {"fault_drop_packets_to_guest": len(gone)}


def test_packets_to_the_host_are_lost_and_what_is_left_is_completed() -> None:
    order = "drop:packets:0.3"
    gone = chosen(order, Flow.PACKETS_TO_HOST, COUNT)
    left = [number for number in range(COUNT) if number not in gone]
    with talk(order) as rig:
        rig.ask(numbered(completed=True))
        rig.until(lambda: numbers(rig.heard) == left, "completions of the others")  # these are no packets in the orders' words
        assert numbers(rig.device.got) == left
        assert rig.hits(Flow.PACKETS_TO_HOST) == len(gone)
        assert rig.hits(Flow.PACKETS_TO_GUEST) == 0


def test_completions_are_lost() -> None:
    order = "drop:completions:0.3"
    gone = chosen(order, Flow.COMPLETIONS, COUNT)
    with talk(order) as rig:
        rig.tell(numbered(5))  # no completions
        rig.ask(numbered(completed=True))
        rig.until(lambda: len(rig.heard) == 5 + COUNT - len(gone), "the others")
        assert numbers(rig.device.got) == list(range(COUNT))
        done = [packet for packet in rig.heard if packet.packet_type == PACKET_COMPLETION]
        assert numbers(done) == [number for number in range(COUNT) if number not in gone]


def test_the_guests_completions_are_lost_by_themselves() -> None:
    order = "drop:completions-to-host:1"
    with talk(order) as rig:
        rig.ask([Packet(packet_type=PACKET_COMPLETION, transaction_id=7), *numbered(3)])
        eventually(lambda: len(rig.device.got) == 3, "the others")
        assert numbers(rig.device.got) == [0, 1, 2]
        assert rig.hits(Flow.COMPLETIONS_TO_HOST) == 1


def test_a_lost_transfer_is_the_devices_again() -> None:
    with talk("drop:packets-to-guest:1:times=1") as rig:
        transfer = Packet(
            packet_type=PACKET_XFER_PAGES,
            transaction_id=33,
            completion_requested=True,
            ranges=(TransferRange(byte_count=60, byte_offset=0),),
        )
        rig.tell([transfer])
        eventually(lambda: rig.device.got, "a completion on the guest's behalf")
        (done,) = rig.device.got
        assert (done.packet_type, done.transaction_id, done.payload[:8]) == (PACKET_COMPLETION, 33, b"\x6c\0\0\0\x01\0\0\0")
        assert rig.listen() == []


def test_packets_come_twice() -> None:
    order = "duplicate:packets:0.3"
    for flow, say in ((Flow.PACKETS_TO_GUEST, Talk.tell), (Flow.PACKETS_TO_HOST, Talk.ask)):
        twice = chosen(order, flow, COUNT)
        expected = sorted([*range(COUNT), *twice])
        with talk(order) as rig:
            say(rig, numbered())
            came = rig.heard if flow is Flow.PACKETS_TO_GUEST else rig.device.got
            rig.until(lambda came=came, expected=expected: len(came) == len(expected), "all of it")
            assert numbers(came) == expected


@pytest.mark.parametrize(
    ("target", "flow"), [("packets-to-guest", Flow.PACKETS_TO_GUEST), ("packets-to-host", Flow.PACKETS_TO_HOST)]
)
def test_packets_are_corrupted_by_a_bit_of_what_they_carry(target: str, flow: Flow) -> None:
    order = f"corrupt:{target}:0.3"
    bad = chosen(order, flow, COUNT)
    with talk(order) as rig:
        (rig.tell if flow is Flow.PACKETS_TO_GUEST else rig.ask)(numbered())
        came = rig.heard if flow is Flow.PACKETS_TO_GUEST else rig.device.got
        rig.until(lambda: len(came) == COUNT, "all of it")
        for number, (packet, right) in enumerate(zip(came, numbered(), strict=True)):
            flipped = int.from_bytes(packet.payload, "little") ^ int.from_bytes(right.payload, "little")
            assert flipped.bit_count() == (number in bad)
            assert packet.transaction_id == number


def test_of_completions_the_transaction_is_corrupted_as_well() -> None:
    with talk("corrupt:completions:1") as rig:
        rig.ask([Packet(transaction_id=5, completion_requested=True, payload=b"\0" * 8)] * COUNT)
        rig.until(lambda: len(rig.heard) == COUNT, "all of it")
        wrong = [packet.transaction_id for packet in rig.heard if packet.transaction_id != 5]
        assert len(wrong) > 10
        assert all((number ^ 5).bit_count() == 1 for number in wrong)
        assert len(wrong) + sum(packet.payload != b"\0" * 8 for packet in rig.heard) == COUNT


def test_late_packets_are_overtaken_and_come() -> None:
    order = "delay:packets-to-guest:0.3:30ms"
    late = chosen(order, Flow.PACKETS_TO_GUEST, COUNT)
    with talk(order) as rig:
        rig.tell(numbered())
        rig.until(lambda: len(rig.heard) == COUNT, "all of it")
        assert numbers(rig.heard) == [*(number for number in range(COUNT) if number not in late), *late]


def test_closing_with_packets_held_back_leaves_nothing() -> None:
    with nothing_left(objects=False), talk("delay:packets:1:60s", "delay:interrupts:1:60s") as rig:
        rig.tell(numbered())
        rig.ask(numbered())
        eventually(lambda: rig.hits(Flow.PACKETS_TO_HOST) == COUNT, "all of them are held")
        rig.client.say(wire.CloseChannel(child_relid=1))
        rig.client.ping()
        assert rig.device.context is None
        assert rig.listen() == []


def test_counts_and_decisions_go_on_when_a_channel_opens_again() -> None:
    order = "drop:packets-to-host:1:after=2:times=2"
    with talk(order) as rig:
        rig.ask(numbered(3))
        eventually(lambda: len(rig.device.got) == 2, "two")
        rig.client.say(wire.CloseChannel(child_relid=1))
        rig.client.ping()
        assert rig.client.open(1, 4) == wire.STATUS_SUCCESS
        rig.ask(numbered(3))
        eventually(lambda: len(rig.device.got) == 4, "two more")
        assert numbers(rig.device.got) == [0, 1, 1, 2]
        assert rig.hits(Flow.PACKETS_TO_HOST) == 2


# Interrupts.


def test_interrupts_come_as_they_would() -> None:
    with talk("drop:packets:1:after=1000000") as rig:
        rig.tell(numbered(3))
        eventually(lambda: eventfd.take(rig.interrupt), "an interrupt")


def test_lost_interrupts() -> None:
    """The packet is there; nobody says so. As nothing else does: VMBus signals when a ring was empty, and this one is not."""
    with talk("drop:interrupts:1:times=1") as rig:
        rig.tell(numbered(1))
        eventually(lambda: rig.hits(Flow.INTERRUPTS) == 1, "an interrupt is lost")
        rig.tell(numbered(1))
        rig.settled()
        assert not eventfd.take(rig.interrupt)
        assert len(rig.listen()) == 2
        assert rig.pair.incoming.unmask() is False
        rig.tell(numbered(1))  # the ring was empty: this one is told of
        eventually(lambda: eventfd.take(rig.interrupt), "an interrupt")


def test_late_interrupts() -> None:
    with talk("delay:interrupts:1:40ms:times=1") as rig:
        rig.tell(numbered(1))
        rig.until(lambda: rig.heard, "the packet")
        eventually(lambda: eventfd.take(rig.interrupt), "the interrupt")
        assert rig.hits(Flow.INTERRUPTS) == 1


def test_interrupts_twice() -> None:
    with talk("duplicate:interrupts:1:times=1") as rig:
        rig.tell(numbered(1))
        for _ in range(2):
            eventually(lambda: eventfd.take(rig.interrupt), "an interrupt")
        for _ in range(20):
            rig.settled()
        assert [count.seen for count in rig.host.fault_counts() if count.flow == "interrupts"] == [1]


def test_interrupts_lead_where_the_client_wants_them() -> None:
    with talk("duplicate:interrupts:1:after=1000000") as rig:
        rig.client.say(wire.ModifyChannel(child_relid=1, target_vp=7))
        rig.client.ping()
        rig.tell(numbered(1))
        rig.until(lambda: rig.heard, "the packet")
        rig.settled()
        assert not eventfd.take(rig.interrupt)


# Breaches.


def test_a_guest_that_breaks_its_ring_loses_its_device_as_without_a_relay() -> None:
    with talk("drop:packets:1:after=1000000") as rig:
        rig.ask(numbered(1))
        eventually(lambda: rig.device.got, "a packet")
        rig.pair.outgoing.mapping.write(WRITE_INDEX, b"\xff\xff\xff\xff")
        eventfd.ring(rig.client.bar.doorbell(0x1004))
        rig.client.failed()
        errors = list(connection(rig).errors)
        assert all(isinstance(error, RingError) for error in errors)
        assert "incoming ring: index outside" in str(errors[0])
        assert rig.device.context is None


def test_the_same_for_a_client_that_gets_its_channel_opened(caplog: pytest.LogCaptureFixture) -> None:
    with nothing_left(objects=False), EmbeddedHost(faults=FaultPlan.parse(["drop:packets:1:after=1000000"])) as host:
        card = host.add_nic("card")
        with open_device(host.attach(card, personality="vmbus")) as device:
            end = host.connection_of(card)
            channel = device.open(4)
            channel.outgoing.mapping.write(WRITE_INDEX, b"\xff\xff\xff\xff")
            channel.outgoing.signal()
            eventually(lambda: end.error_count, "the host minds")
            assert all(isinstance(error, RingError) for error in end.errors)
            eventually(lambda: host.run(lambda: end.open_channels) == 0, "the channel is closed")
    assert "defect" not in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_lies_are_no_longer_than_the_ring(seed: int) -> None:
    """A ring of one data page, and announcements of 600 ranges."""
    with talk("hostile:ranges:1", "hostile:transactions:1", "hostile:nvsp:1", seed=seed, pages=4) as rig:
        rig.tell(numbered(20))
        rig.until(lambda: {packet.payload for packet in numbered(20)} <= {packet.payload for packet in rig.heard}, "the truth")
        assert connection(rig).error_count == 0
        assert all(count.hits == 20 for count in rig.host.fault_counts())
