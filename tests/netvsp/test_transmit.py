"""From the guest: transfers in sections, in pages and in both become the frames that a plain reading of them gives, or fail whole."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataplane.checksums import ipv4_filled, l4_filled, made, samples
from tests.dataplane.messages import oracle
from tests.netvsp.card import Card, card
from vfio_vmbus.host.frames import VALID_IP_CHECKSUM, VALID_L4_CHECKSUM
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.wire import nvsp
from vfio_vmbus.wire.frame import PPI_CHECKSUM, PPI_VLAN, Frame, PacketInfo, TxChecksum, Vlan, encode_packet
from vfio_vmbus.wire.gpa import pages_spanned
from vfio_vmbus.wire.ring import PACKET_INBAND
from vfio_vmbus.wire.rndis import PacketMessage

LONGEST = 1518
MAX_BYTES = 16384
SEND_SECTION = nvsp.DEFAULT_SEND_SECTION_SIZE
MAX_MESSAGES = 64
EXAMPLES = settings(max_examples=120, deadline=None)


@dataclass(frozen=True)
class Transfer:
    """`inside` bytes of `data` in a send section, the rest in pages: ranges of these sizes at these offsets."""

    data: bytes
    inside: int
    ranges: tuple[tuple[int, int], ...]
    """(bytes, offset in the first page); the last range gets what is left."""
    forbidden: int | None
    """The range that lies in memory which the host may only write."""


@pytest.fixture(scope="module")
def rig() -> Iterator[Card]:
    with card() as made:
        yield made


wishes = st.builds(
    lambda bits, offset: TxChecksum.of(
        is_ipv4=bits & 1,
        is_ipv6=bits >> 1 & 1,
        tcp_checksum=bits >> 2 & 1,
        udp_checksum=bits >> 3 & 1,
        ip_header_checksum=bits >> 4 & 1,
        tcp_header_offset=offset,
    ),
    st.integers(0, 31),
    st.integers(0, 1023),
)
tags = st.builds(lambda priority, canonical, vlan: Vlan.of(priority=priority, canonical_format=canonical, vlan_id=vlan),
                 st.integers(0, 7), st.integers(0, 1), st.integers(0, 4095))  # fmt: skip
infos = st.tuples(st.none() | wishes, st.none() | tags).map(
    lambda pair: tuple(
        PacketInfo.word(number, value) for number, value in zip((PPI_CHECKSUM, PPI_VLAN), pair, strict=True) if value is not None
    )
)
contents = samples.map(lambda sample: sample.frame) | st.binary(min_size=14, max_size=90)
messages = st.builds(lambda data, infos: encode_packet(Frame(data, infos), align=8), contents, infos)
lies = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 8, 35, 43, 2**31, 2**32 - 1])), max_size=1)


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    data = b"".join(draw(st.lists(messages, min_size=1, max_size=4)))
    for word, value in draw(lies) if draw(st.integers(0, 3)) == 0 else []:
        at = min(4 * word, len(data) - 4)
        data = data[:at] + struct.pack("<I", value) + data[at + 4 :]
    inside = draw(st.sampled_from([len(data), 0, 44, len(data) // 2]))
    ranges: list[tuple[int, int]] = []
    left = len(data) - inside
    while left > 0 and len(ranges) < 5:
        size = min(left, draw(st.sampled_from([left, 1, 8, 100, 1500, PAGE])))
        ranges.append((size, draw(st.integers(0, PAGE - 1) | st.sampled_from([0, PAGE - 1, PAGE - 40]))))
        left -= size
    if left > 0:
        ranges.append((left, 0))
    forbidden = draw(st.integers(0, 30))
    return Transfer(data, inside, tuple(ranges), forbidden if forbidden < len(ranges) else None)


def send(rig: Card, transfer: Transfer, index: int) -> None:
    """Put a transfer's bytes where it says, in memory of its own, and announce them."""
    guest = rig.guest
    guest.fill_section(index, transfer.data[: transfer.inside])
    if not transfer.ranges:
        guest.in_section(index, len(transfer.data))
        return
    words: list[int] = []
    at = transfer.inside
    first = 40 * index
    for number, (size, offset) in enumerate(transfer.ranges):
        spanned = pages_spanned(size, offset)
        memory, page = (guest.deaf, 0) if number == transfer.forbidden else (rig.pages, first)
        memory.mapping.write(page * PAGE + offset, transfer.data[at : at + size])
        words += [size | offset << 32, *memory.pfns[page : page + spanned]]
        first += spanned
        at += size
    section = (index, transfer.inside) if transfer.inside else (nvsp.NO_SECTION, 0)
    guest.pages(words, ranges=len(transfer.ranges), section=section)


def expected(transfer: Transfer) -> list[tuple[bytes, int]] | None:
    """What a plain reading gives: frames and flags; None when the transfer must fail."""
    if transfer.forbidden is not None or len(transfer.data) > MAX_BYTES or transfer.inside > SEND_SECTION:
        return None
    found: list[tuple[bytes, int]] = []
    at = 0
    while at < len(transfer.data) or not found:
        one = oracle(transfer.data[at:], LONGEST)
        if one is None or len(found) == MAX_MESSAGES:
            return None
        found.append(changed(*one))
        at += PacketMessage.unpack(transfer.data, at).message_length
    return found


def changed(frame: bytes, checksum: int, vlan: int) -> tuple[bytes, int]:
    """The frame with its tag and the checksums that were asked for."""
    if vlan >= 0:
        tag = Vlan(vlan & 0xFFFF)
        word = tag.priority << 13 | tag.canonical_format << 12 | tag.vlan_id
        frame = frame[:12] + struct.pack(">HH", 0x8100, word) + frame[12:]
    flags = 0
    wish = TxChecksum(max(checksum, 0))
    if wish.ip_header_checksum and (filled := ipv4_filled(frame)) is not None:
        frame, flags = filled, flags | VALID_IP_CHECKSUM
    if (wish.tcp_checksum or wish.udp_checksum) and (filled := l4_filled(frame)) is not None:
        frame, flags = filled, flags | VALID_L4_CHECKSUM
    return frame, flags


@EXAMPLES
@given(batch=st.lists(transfers(), min_size=1, max_size=5))
def test_transfers(rig: Card, batch: list[Transfer]) -> None:
    first = rig.guest.last_transaction + 1
    before = rig.nic.counter("sent_frames"), rig.nic.counter("sent_bytes")
    for index, transfer in enumerate(batch):
        send(rig, transfer, index)
    wanted = [expected(transfer) for transfer in batch]
    frames = [frame for found in wanted for frame in found or []]
    assert rig.poll() == frames
    good, bad = nvsp.STATUS_SUCCESS, nvsp.STATUS_FAIL
    assert rig.statuses() == [(first + index, bad if found is None else good) for index, found in enumerate(wanted)]
    counted = rig.nic.counter("sent_frames") - before[0], rig.nic.counter("sent_bytes") - before[1]
    assert counted == (len(frames), sum(len(data) for data, _ in frames))


def plain(size: int = 60, fill: int = 1) -> bytes:
    return encode_packet(Frame(bytes([fill]) * size), align=8)


def status(rig: Card) -> int:
    """Of the only transfer that was sent."""
    ((_, found),) = rig.statuses()
    return found


@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_messages_in_a_section(rig: Card, count: int) -> None:
    """As many as were promised, and not one more."""
    rig.guest.say(b"".join(plain(14, number) for number in range(count)))
    frames = rig.poll()
    assert frames == ([(bytes([number]) * 14, 0) for number in range(count)] if count <= MAX_MESSAGES else [])
    assert status(rig) == (nvsp.STATUS_SUCCESS if count <= MAX_MESSAGES else nvsp.STATUS_FAIL)


def test_frames_up_to_the_mtu_and_a_tag(rig: Card) -> None:
    for size, passes in [(13, False), (14, True), (1514, True), (1518, True), (1519, False)]:
        rig.guest.say(plain(size))
        assert rig.poll() == ([(b"\1" * size, 0)] if passes else [])
        assert status(rig) == (nvsp.STATUS_SUCCESS if passes else nvsp.STATUS_FAIL)


def test_a_whole_section(rig: Card) -> None:
    section = rig.guest.section
    data = b"".join(plain(size, size % 251) for size in (1492, 1492, 1492, 1492))
    assert len(data) == section
    rig.guest.fill_section(rig.guest.sections - 1, data)
    rig.guest.in_section(rig.guest.sections - 1, section)
    assert [len(frame) for frame, _ in rig.poll()] == [1492] * 4
    assert status(rig) == nvsp.STATUS_SUCCESS


@pytest.mark.parametrize(("pieces", "passes"), [(1, True), (63, True), (64, True), (65, False)])
def test_a_message_in_pieces(rig: Card, pieces: int, passes: bool) -> None:
    """Each in a page of its own, not beside the others."""
    message = plain(1500)
    cuts = [len(message) * index // pieces for index in range(pieces + 1)]
    words: list[int] = []
    for index in range(pieces):
        part = message[cuts[index] : cuts[index + 1]]
        page = 2 * index
        rig.pages.mapping.write(page * PAGE + 16 * index, part)
        words += [len(part) | (16 * index) << 32, rig.pages.pfns[page]]
    rig.guest.pages(words, ranges=pieces)
    assert [data for data, _ in rig.poll()] == ([b"\1" * 1500] if passes else [])
    assert status(rig) == (nvsp.STATUS_SUCCESS if passes else nvsp.STATUS_FAIL)


@pytest.mark.parametrize(("extra", "passes"), [(0, True), (8, False)])
def test_as_much_as_a_transfer_may_have(rig: Card, extra: int, passes: bool) -> None:
    """16384 bytes, the half of them in scattered pages."""
    data = b"".join(plain(1492, number) for number in range(10))
    data += plain(MAX_BYTES + extra - len(data) - PacketMessage.SIZE, 10)
    assert len(data) == MAX_BYTES + extra
    words = []
    for index in range(0, len(data), PAGE):
        part = data[index : index + PAGE]
        page = 2 * index // PAGE
        rig.pages.mapping.write(page * PAGE, part)
        words += [len(part), rig.pages.pfns[page]]
    rig.guest.pages(words, ranges=len(words) // 2)
    assert len(rig.poll()) == (11 if passes else 0)
    assert status(rig) == (nvsp.STATUS_SUCCESS if passes else nvsp.STATUS_FAIL)


def test_a_transfer_that_wants_no_completion(rig: Card) -> None:
    rig.guest.fill_section(0, plain())
    payload = nvsp.encode_message(nvsp.SendRndisPacket(section_index=0, section_size=len(plain())))
    rig.guest.post(rig.guest.packet(PACKET_INBAND, payload=payload, flags=0))
    assert len(rig.poll()) == 1
    assert rig.packets() == []


def test_many_transfers_that_ask_for_checksums(rig: Card) -> None:
    """More frames are put together anew than there are places for at once: the rest waits for the next poll."""
    frame, wish = made(False, True, None, 0, b"data", 0, 5).frame, PacketInfo.word(PPI_CHECKSUM, TxChecksum.of(udp_checksum=1))
    message = encode_packet(Frame(frame, (wish,)), align=8)
    for index in range(20):
        rig.guest.fill_section(index, message * 20)
        rig.guest.in_section(index, len(message) * 20)
    frames = rig.poll()
    assert frames == [(l4_filled(frame), VALID_L4_CHECKSUM)] * 400
    assert [found for _, found in rig.statuses()] == [nvsp.STATUS_SUCCESS] * 20


def test_a_guest_that_does_not_read_its_completions(rig: Card) -> None:
    """As many wait as there is room for, then nothing more is read; when it reads, everything goes on, and nothing is lost."""
    guest, sent = rig.guest, 0
    guest.fill_section(0, plain())
    guest.listening = False
    guest.patience = 0.0
    frames = 0
    try:
        while guest.in_section(0, len(plain())):
            sent += 1
            frames += len(rig.poll())
    finally:
        guest.listening, guest.patience = True, 0.3
    answered = 0
    for _ in range(10):
        answered += len(rig.statuses())
        frames += len(rig.poll())
    assert (frames, answered) == (sent, sent)
    assert sent > guest.channel.incoming.size // 64 + 256
