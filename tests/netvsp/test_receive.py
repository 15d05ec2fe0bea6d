"""To the guest: frames into sections that are free, in order, filtered as it wished; sections come back by completions alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.netvsp.card import MAC, Card, Transfer, card
from vfio_vmbus.host.frames import VALID_IP_CHECKSUM, VALID_L4_CHECKSUM
from vfio_vmbus.testing.attacker import BROADCAST
from vfio_vmbus.wire import oid
from vfio_vmbus.wire.frame import PPI_CHECKSUM, RxChecksum

LONGEST = 1518
SECTION = 1792
MAX_RANGES = 64
OTHER = bytes.fromhex("00155d000001")
GROUP = bytes.fromhex("01005e000001")
ALL = oid.PACKET_TYPE_DIRECTED | oid.PACKET_TYPE_BROADCAST | oid.PACKET_TYPE_ALL_MULTICAST


@pytest.fixture(scope="module")
def rig() -> Iterator[Card]:
    with card(receive_buffer=200 * SECTION) as made:
        yield made


def accepts(filters: int, destination: bytes) -> bool:
    """Does a packet filter let a frame for `destination` in?"""
    if filters & oid.PACKET_TYPE_PROMISCUOUS:
        return True
    if destination == BROADCAST:
        return bool(filters & oid.PACKET_TYPE_BROADCAST)
    if destination[0] & 1:
        return bool(filters & (oid.PACKET_TYPE_MULTICAST | oid.PACKET_TYPE_ALL_MULTICAST))
    return bool(filters & oid.PACKET_TYPE_DIRECTED) and destination == MAC


@dataclass
class Model:
    """What the card should do: who has which section, and the counters."""

    sections: int
    filters: int = ALL
    outstanding: dict[int, list[int]] = field(default_factory=dict)
    counters: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("received_frames", "received_bytes", "no_buffer", "filtered", "bad_completions"), 0
        )
    )

    @property
    def free(self) -> int:
        return self.sections - sum(len(held) for held in self.outstanding.values())

    def deliver(self, frames: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
        """The frames that the guest is to get. After the first for which there is no section, all are lost."""
        passed: list[tuple[bytes, int]] = []
        for index, (data, flags) in enumerate(frames):
            if len(data) > LONGEST or not accepts(self.filters, data[:6]):
                self.counters["filtered"] += 1
            elif len(passed) == self.free:
                self.counters["no_buffer"] += len(frames) - index
                break
            else:
                passed.append((data, flags))
        self.counters["received_frames"] += len(passed)
        self.counters["received_bytes"] += sum(len(data) for data, _ in passed)
        return passed

    def take(self, transfers: list[Transfer]) -> None:
        """Check where transfers lie, and note them."""
        held = {section for sections in self.outstanding.values() for section in sections}
        for transfer in transfers:
            assert 1 <= len(transfer.ranges) <= MAX_RANGES
            sections = [offset // SECTION for offset, _ in transfer.ranges]
            assert all(offset % SECTION == 0 and size <= SECTION for offset, size in transfer.ranges)
            assert transfer.transaction == sections[0]
            assert not held & set(sections)
            assert len(set(sections)) == len(sections)
            held |= set(sections)
            self.outstanding[transfer.transaction] = sections


def said(flags: int) -> int | None:
    """What the guest is told of a frame's checksums: nothing unless TCP or UDP was found good."""
    if not flags & VALID_L4_CHECKSUM:
        return None
    return RxChecksum.of(tcp_succeeded=1, udp_succeeded=1, ip_succeeded=1 if flags & VALID_IP_CHECKSUM else 0)


def shown(transfers: list[Transfer]) -> list[tuple[bytes, int | None]]:
    """The frames of transfers, and what is said of their checksums."""
    found: list[tuple[bytes, int | None]] = []
    for frame in (frame for transfer in transfers for frame in transfer.frames):
        words = [int.from_bytes(info.data, "little") for info in frame.infos if info.number == PPI_CHECKSUM]
        assert len(words) == len(frame.infos) <= 1
        found.append((frame.data, words[0] if words else None))
    return found


@st.composite
def bursts(draw: st.DrawFn) -> list[tuple[bytes, int]]:
    count = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 130]))
    sizes = draw(
        st.lists(st.sampled_from([14, 15, 60, 64, 1514, 1518, 1519, 9000]) | st.integers(14, 1518), min_size=1, max_size=4)
    )
    targets = draw(st.lists(st.sampled_from([MAC, MAC, MAC, OTHER, BROADCAST, GROUP]), min_size=1, max_size=3))
    flags = draw(st.lists(st.integers(0, 3), min_size=1, max_size=2))
    frames = []
    for index in range(count):
        head = targets[index % len(targets)] + OTHER
        size = sizes[index % len(sizes)]
        frames.append(((head + bytes([index]) * size)[:size], flags[index % len(flags)]))
    return frames


steps = st.one_of(
    st.tuples(st.just("deliver"), bursts()),
    st.tuples(st.just("deliver"), bursts()),
    st.tuples(st.just("complete"), st.integers(0, 10)),
    st.tuples(st.just("complete"), st.integers(0, 10)),
    st.tuples(st.just("bogus"), st.sampled_from([-1, 0, 1, 199, 200, 201, 1 << 31, 1 << 62, (1 << 63) - 1])),
    st.tuples(st.just("filter"), st.sampled_from([ALL, 0, 1, 2, 4, 8, 0x20, 0x21, 0x80])),
)


def complete(rig: Card, model: Model, transaction: int) -> None:
    """Complete a transfer, due or not."""
    rig.guest.complete(transaction % (1 << 64))
    assert rig.poll() == []
    if model.outstanding.pop(transaction, None) is None:
        model.counters["bad_completions"] += 1


def step(rig: Card, model: Model, name: str, value: Any) -> None:
    if name == "deliver":
        passed = model.deliver(value)
        rig.deliver(value)
        transfers = rig.transfers()
        assert shown(transfers) == [(data, said(flags)) for data, flags in passed]
        model.take(transfers)
    elif name == "complete" and model.outstanding:
        complete(rig, model, list(model.outstanding)[value % len(model.outstanding)])
    elif name == "bogus":
        complete(rig, model, value)
    elif name == "filter":
        model.filters = value
        rig.record["filter"] = value


@settings(max_examples=60, deadline=None)
@given(script=st.lists(steps, max_size=12))
def test_whatever_comes_and_whenever_sections_come_back(rig: Card, script: list[tuple[str, Any]]) -> None:
    model = Model(int(rig.record["receive_sections"]))
    assert model.sections >= 200
    before = {name: rig.nic.counter(name) for name in model.counters}
    rig.record["filter"] = model.filters
    for name, value in script:
        step(rig, model, name, value)
    assert {name: rig.nic.counter(name) - before[name] for name in model.counters} == model.counters
    for transaction in list(model.outstanding):
        complete(rig, model, transaction)
    assert int(rig.record["free_count"]) == model.sections


def frame(destination: bytes = MAC, source: bytes = OTHER, size: int = 60) -> bytes:
    return (destination + source).ljust(size, b"\5")


def test_a_sender_that_rewrites_its_frame(rig: Card) -> None:
    """It leaves with the addresses that were judged, whatever lies in the sender's memory by then."""
    rig.record["filter"] = ALL
    for size in (14, 60, 1514):
        rig.deliver([(frame(size=size), 0)], rewritten=GROUP + MAC)
        (transfer,) = rig.transfers()
        assert transfer.frames[0].data == frame(size=size)
        rig.guest.complete(transfer.transaction)
        rig.poll()


def test_a_transfer_is_given_back_once(rig: Card) -> None:
    rig.record["filter"] = ALL
    rig.deliver([(frame(), 0)] * 3)
    (transfer,) = rig.transfers()
    before = rig.nic.counter("bad_completions")
    for _ in range(3):
        rig.guest.complete(transfer.transaction)
    for offset, _ in transfer.ranges[1:]:
        rig.guest.complete(offset // SECTION)
    rig.poll()
    assert rig.nic.counter("bad_completions") - before == 4
    assert int(rig.record["free_count"]) == int(rig.record["receive_sections"])


def test_no_sections_left(rig: Card) -> None:
    """Then frames are lost and counted; the first section that comes back is used again."""
    rig.record["filter"] = ALL
    sections = int(rig.record["receive_sections"])
    lost = rig.nic.counter("no_buffer")
    taken: list[Transfer] = []
    for _ in range(sections // 100 + 1):
        rig.deliver([(frame(), 0)] * 100)
        taken += rig.transfers()
    assert sum(len(transfer.ranges) for transfer in taken) == sections
    assert rig.nic.counter("no_buffer") - lost == (sections // 100 + 1) * 100 - sections
    first = taken.pop(0)
    rig.guest.complete(first.transaction)
    rig.poll()
    rig.deliver([(frame(), 0)] * 100)
    again = rig.transfers()
    assert sorted(place for transfer in again for place, _ in transfer.ranges) == sorted(place for place, _ in first.ranges)
    for transfer in [*taken, *again]:
        rig.guest.complete(transfer.transaction)
    rig.poll()
    assert int(rig.record["free_count"]) == sections


def test_without_room_in_the_ring_no_section_is_lost(rig: Card) -> None:
    rig.record["filter"] = ALL
    rounds = rig.guest.channel.incoming.size // 80 + 50  # of a transfer with one range
    sections = int(rig.record["receive_sections"])
    rig.record["free_count"] = 1  # all but one are with nobody, to fill the ring with transfers of one frame
    lost, sent = rig.nic.counter("no_buffer"), 0
    for _ in range(rounds):
        rig.deliver([(frame(), 0)])
        if rig.nic.counter("no_buffer") > lost:
            break
        sent += 1
        rig.record["free_count"] = 1
    assert 0 < sent < rounds
    assert len(rig.transfers()) == sent
    assert int(rig.record["free_count"]) == 1
    rig.deliver([(frame(), 0)])
    (transfer,) = rig.transfers()
    rig.guest.complete(transfer.transaction)
    rig.poll()
    rig.record["free_count"] = sections


def test_with_the_cable_out_nothing_passes_either_way(rig: Card) -> None:
    rig.record["filter"] = ALL
    rig.record["link"] = 0
    before = rig.nic.counter("unplugged")
    rig.deliver([(frame(), 0)])
    assert rig.transfers() == []
    rig.guest.say(b"".join(rig.message() for _ in range(3)))
    assert rig.poll() == []
    assert [status for _, status in rig.statuses()] == [1]
    assert rig.nic.counter("unplugged") - before == 3
    rig.record["link"] = 1
    rig.guest.say(rig.message())
    assert len(rig.poll()) == 1
    assert len(rig.statuses()) == 1
