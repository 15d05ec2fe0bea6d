"""To the driver: frames come once, in order and as they were sent, in bursts of any size; each transfer is completed once, later."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.netvsc.driven import RECEIVE_SECTIONS, Driven, driven
from vfio_vmbus.drivers.netvsc.state import (
    BAD_IP_CHECKSUM,
    BAD_L4_CHECKSUM,
    DONE_SLOTS,
    GOOD_IP_CHECKSUM,
    GOOD_L4_CHECKSUM,
    MAIL_SLOTS,
)
from vfio_vmbus.testing.scripted import RECEIVE_SECTION
from vfio_vmbus.wire import nvsp, oid, rndis
from vfio_vmbus.wire.frame import PPI_CHECKSUM, PPI_VLAN, Frame, PacketInfo, RxChecksum, Vlan, encode_packet
from vfio_vmbus.wire.ring import PACKET_COMPLETION

LONGEST = 1518


def indication(up: bool) -> bytes:
    status = oid.STATUS_MEDIA_CONNECT if up else oid.STATUS_MEDIA_DISCONNECT
    return rndis.encode_message(rndis.IndicateStatus(status=status))


def flags_of(word: int) -> int:
    """What an application is told of a frame with this checksum information."""
    info, flags = RxChecksum(word & 0x1FF), 0
    if info.tcp_failed or info.udp_failed:
        flags |= BAD_L4_CHECKSUM
    elif info.tcp_succeeded or info.udp_succeeded:
        flags |= GOOD_L4_CHECKSUM
    if info.ip_failed:
        flags |= BAD_IP_CHECKSUM
    elif info.ip_succeeded:
        flags |= GOOD_IP_CHECKSUM
    return flags


class Model:
    """The host's side: which sections are free, what the driver should get next, what it should have completed."""

    def __init__(self, rig: Driven) -> None:
        self.rig = rig
        self.free = list(range(RECEIVE_SECTIONS))
        self.under_way: dict[int, list[int]] = {}
        self.expected: list[tuple[bytes, int]] = []
        self.got = 0
        self.lost = 0
        self.link = True
        self.counts = {"rx_bad_messages": 0, "rx_bad_ranges": 0}
        self._next = 0

    def _transaction(self) -> int:
        self._next += 1
        return (self._next * 0x9E3779B97F4A7C15) % (1 << 63)  # a driver makes nothing of the number

    def do(self, name: str, value: Any) -> None:
        if name == "deliver":
            self.deliver(value)
        elif name == "link":
            self.say(indication(value), lambda: setattr(self, "link", value))
        elif name == "receive":
            self.receive(value)
        elif name == "poll":
            self.rig.nic.poll()

    def deliver(self, items: list[tuple[int, int | None, str]]) -> None:
        """A transfer with a frame in each section, some of them no good."""
        if len(items) > len(self.free):
            return
        held = [self.free.pop() for _ in items]
        ranges, frames, counts = [], [], dict.fromkeys(self.counts, 0)
        for section, (size, word, fault) in zip(held, items, strict=True):
            data = bytes((section + index) & 0xFF for index in range(size))
            infos = () if word is None else (PacketInfo.word(PPI_CHECKSUM, word), PacketInfo.word(PPI_VLAN, Vlan.of(vlan_id=5)))
            length, offset = self.rig.host.place(encode_packet(Frame(data, infos), align=8), section * RECEIVE_SECTION)
            if fault == "range":
                length, offset = length, RECEIVE_SECTIONS * RECEIVE_SECTION - length + 8
                counts["rx_bad_ranges"] += 1
            elif fault == "message" or not 14 <= size <= LONGEST:
                length = length - 8 if fault == "message" else length
                counts["rx_bad_messages"] += 1
            else:
                frames.append((data, 0 if word is None else flags_of(word)))
            ranges.append((length, offset))
        transaction = self._transaction()
        if not self.rig.host.transfer(ranges, transaction=transaction):
            self.free += held
            return
        self.under_way[transaction] = held
        self.expected += frames
        for what, count in counts.items():
            self.counts[what] += count

    def say(self, message: bytes, then: Any) -> None:
        if not self.free:
            return
        section, transaction = self.free.pop(), self._transaction()
        where = self.rig.host.place(message, section * RECEIVE_SECTION)
        if not self.rig.host.transfer([where], transaction=transaction, channel=nvsp.CHANNEL_CONTROL):
            self.free.append(section)
            return
        self.under_way[transaction] = [section]
        then()

    def receive(self, count: int | None) -> None:
        found = self.rig.received(count)
        assert found == self.expected[: len(found)]
        assert len(found) <= (64 if count is None else count)
        del self.expected[: len(found)]
        self.got += len(found)
        self.rig.host.turn()
        for transaction in self.rig.host.completed:
            self.free += self.under_way.pop(transaction)
        self.rig.host.completed.clear()

    def settle(self) -> None:
        """Everything comes, everything goes back."""
        for _ in range(2000):
            self.receive(None)
            self.rig.nic.poll()
            if not self.under_way:
                break
        assert self.under_way == {}
        assert self.expected == []
        assert sorted(self.free) == list(range(RECEIVE_SECTIONS))
        counters = self.rig.nic.counters()
        assert counters.rx_frames == self.got
        assert {what: getattr(counters, what) for what in self.counts} == self.counts
        assert self.rig.nic.link == self.link or counters.mail_lost


sizes = st.sampled_from([13, 14, 15, 60, 64, 1514, 1518, 1519]) | st.integers(14, LONGEST)
faults = st.sampled_from([""] * 8 + ["range", "message"])
items = st.tuples(sizes, st.none() | st.integers(0, 0x1FF), faults)
steps = st.one_of(
    st.tuples(st.just("deliver"), st.lists(items, min_size=1, max_size=20)),
    st.tuples(st.just("deliver"), st.lists(items, min_size=1, max_size=3)),
    st.tuples(st.just("link"), st.booleans()),
    st.tuples(st.just("receive"), st.sampled_from([None, 1, 2, 3, 7, 64])),
    st.tuples(st.just("receive"), st.sampled_from([None, 1, 2, 3, 7, 64])),
    st.tuples(st.just("poll"), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(script=st.lists(steps, min_size=3, max_size=40))
def test_whatever_comes(script: list[tuple[str, Any]]) -> None:
    with driven() as rig:
        model = Model(rig)
        for name, value in script:
            model.do(name, value)
        model.settle()


def test_frames_stay_until_the_next_call() -> None:
    """The host gets its sections back no sooner, or it would write over what the application still reads."""
    with driven() as rig:
        rig.host.deliver([Frame(b"a" * 60), Frame(b"b" * 60)], transaction=7)
        rig.host.deliver([Frame(b"c" * 60)], transaction=8)
        assert [data[:1] for data, _ in rig.received(1)] == [b"a"]
        rig.host.turn()
        assert rig.host.completed == []
        assert [data[:1] for data, _ in rig.received(1)] == [b"b"]
        rig.host.turn()
        assert rig.host.completed == []
        assert [data[:1] for data, _ in rig.received(1)] == [b"c"]
        rig.host.turn()
        assert rig.host.completed == [7]
        assert rig.received() == []
        rig.host.turn()
        assert rig.host.completed == [7, 8]


def test_a_transfer_that_wants_no_completion_gets_none() -> None:
    with driven() as rig:
        where = rig.host.place(encode_packet(Frame(b"a" * 60)))
        rig.host.transfer([where], transaction=7, flags=0)
        assert len(rig.received()) == 1
        assert rig.received() == []
        rig.host.turn()
        assert rig.host.completed == []


def test_completions_wait_for_room_in_the_ring() -> None:
    """The driver's own ring is full: it keeps what it has to complete, takes nothing new beyond that, and goes on later."""
    with driven() as rig:
        rig.host.completes = False
        while rig.send([(b"x" * 1514, 0)]):
            pass
        delivered = 0
        for _ in range(40):
            if rig.host.deliver([Frame(bytes([delivered]) * 60)], transaction=delivered):
                delivered += 1
            rig.received(1)
        rig.host.completes = True
        for _ in range(40):
            rig.host.turn()
            rig.received()
        rig.host.turn()
        assert sorted(rig.host.completed) == list(range(delivered))
        assert rig.nic.counters().rx_frames == delivered > 30


def test_never_more_to_complete_than_there_is_place_for() -> None:
    """With its own ring full, the driver takes so many transfers and no more; when there is room again, all goes on."""
    with driven(ring_pages=64) as rig:
        outgoing = rig.nic.queue.channel.outgoing
        others = 0
        while outgoing.room > 100:
            others += outgoing.send(bytes(8), packet_type=PACKET_COMPLETION, transaction_id=1 << 50)
        delivered = 0
        while delivered < 2 * DONE_SLOTS and rig.host.deliver([Frame(b"y" * 60)], transaction=delivered):
            delivered += 1
            if delivered % 32 == 0:
                rig.received()
        assert delivered > DONE_SLOTS
        assert rig.nic.counters().rx_frames == DONE_SLOTS
        while rig.host.turn() or rig.received():
            pass
        rig.host.turn()
        assert rig.nic.counters().rx_frames == delivered
        assert sorted(rig.host.completed) == [*range(delivered), *[1 << 50] * others]


@pytest.mark.parametrize("count", [1, MAIL_SLOTS, MAIL_SLOTS + 3])
def test_messages_among_frames(count: int) -> None:
    """So many are kept for Python; more are lost and counted, and frames come all the same."""
    with driven() as rig:
        for index in range(count):
            rig.host.say(indication(index % 2 == 1))
            rig.host.deliver([Frame(bytes([index]) * 60)])
        assert [data[0] for data, _ in rig.received()] == list(range(count))
        assert rig.nic.counters().mail_lost == max(count - MAIL_SLOTS, 0)
        rig.nic.poll()
        assert rig.nic.link == (min(count, MAIL_SLOTS) % 2 == 0)


def test_a_message_too_long_to_keep() -> None:
    with driven() as rig:
        rig.host.transfer([rig.host.place(rndis.encode_message(rndis.IndicateStatus(), bytes(2040)), 0)], transaction=1)
        assert rig.received() == []
        assert rig.nic.counters().mail_lost == 1
        rig.nic.poll()


def test_waiting_ends_when_something_comes() -> None:
    with driven() as rig:
        assert not rig.nic.queue.wait(0.01)
        rig.host.deliver([Frame(b"a" * 60)])
        assert rig.nic.queue.wait(10)
        assert len(rig.received()) == 1
