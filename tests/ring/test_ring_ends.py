"""The ends as their callers see them: packets of control messages, room, signals, faults, and misuse."""

import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from vfio_vmbus.errors import ClosedError, DmaError, ProtocolError, RingError, UsageError
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.mapping import PAGE, Piece
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.ring.bursts import PACKET
from vfio_vmbus.ring.ends import IncomingRing, OutgoingRing, RingStatistics
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.wire.gpa import PageRange
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_XFER_PAGES, Packet, TransferRange
from vfio_vmbus.wire.table import Side

U32 = struct.Struct("<I")
DOWNSTREAM, TOTAL = 3 * PAGE, 5 * PAGE


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory(TOTAL) as shared:
        yield shared


@pytest.fixture
def bells() -> Iterator[tuple[int, int]]:
    fds = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def sides(memory: SharedMemory, bells: tuple[int, int]) -> Iterator[tuple[RingPair, RingPair]]:
    """Guest and host, each with the doorbell that the other one listens to."""
    with (
        RingPair.fresh(memory, 0, DOWNSTREAM, TOTAL, bells[0], "nic") as guest,
        RingPair([Piece(memory.fd, 0, TOTAL)], DOWNSTREAM, Side.HOST, bells[1], "nic") as host,
    ):
        yield guest, host


def rung(bell: int) -> int:
    """How often a doorbell rang since the last look."""
    try:
        return os.eventfd_read(bell)
    except BlockingIOError:
        return 0


def test_packets_of_every_kind_arrive_both_ways(sides: tuple[RingPair, RingPair]) -> None:
    packets = [
        Packet(payload=b"version?" * 3, transaction_id=2**64 - 1, completion_requested=True),
        Packet(packet_type=PACKET_COMPLETION, payload=b"", transaction_id=7),
        Packet(packet_type=PACKET_GPA_DIRECT, pages=(PageRange(5000, 100, (3, 9)), PageRange(8, 0, (1,))), payload=b"12345678"),
        Packet(packet_type=PACKET_XFER_PAGES, pageset_id=0xCAFE, ranges=(TransferRange(byte_count=60, byte_offset=4096),)),
    ]
    for sender, receiver in (sides, sides[::-1]):
        for packet in packets:
            assert sender.outgoing.send_packet(packet)
        assert [receiver.incoming.receive() for _ in packets] == packets
        assert receiver.incoming.receive() is None


def test_shorthands(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    assert guest.outgoing.send(b"abc", transaction_id=5, completion_requested=True)
    assert host.incoming.receive() == Packet(payload=b"abc" + bytes(5), transaction_id=5, completion_requested=True)
    pages = (PageRange(4096, 0, (12,)),)
    assert guest.outgoing.send_gpa_direct(pages, b"\1" * 8, transaction_id=6)
    expected = Packet(packet_type=PACKET_GPA_DIRECT, pages=pages, payload=b"\1" * 8, transaction_id=6, completion_requested=True)
    assert host.incoming.receive() == expected


def test_each_ring_lies_where_the_open_message_says(memory: SharedMemory, sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    guest.outgoing.send(b"up".ljust(8))
    host.outgoing.send(b"down".ljust(8))
    raw = os.pread(memory.fd, TOTAL, 0)
    assert raw[PAGE + 16 : PAGE + 24] == b"up".ljust(8)
    assert raw[DOWNSTREAM + PAGE + 16 :][:8] == b"down".ljust(8)
    for control in (0, DOWNSTREAM):
        assert U32.unpack_from(raw, control)[0] == 32
        assert U32.unpack_from(raw, control + 64)[0] == 1, "feature bit of pending_send_sz"


def test_the_doorbell_rings_only_for_the_first_packet_of_an_empty_unmasked_ring(
    sides: tuple[RingPair, RingPair], bells: tuple[int, int]
) -> None:
    guest, host = sides
    guest.outgoing.send(b"1")
    assert rung(bells[0]) == 1
    guest.outgoing.send(b"2")
    assert rung(bells[0]) == 0
    host.incoming.mask()
    assert host.incoming.receive()
    assert host.incoming.receive()
    guest.outgoing.send(b"3")
    assert rung(bells[0]) == 0
    assert host.incoming.unmask(), "a packet came while masked"
    assert host.incoming.receive()
    assert not host.incoming.unmask()
    guest.outgoing.send(b"4")
    assert rung(bells[0]) == 1
    assert guest.outgoing.statistics() == RingStatistics(packets=4, bytes=4 * 32, signals=2, full=0)


def test_a_reader_rings_back_once_when_wanted_room_comes_free(sides: tuple[RingPair, RingPair], bells: tuple[int, int]) -> None:
    guest, host = sides
    assert [guest.outgoing.send(bytes(1000)) for _ in range(8)] == [True] * 7 + [False]
    assert guest.outgoing.statistics().full == 1
    assert guest.outgoing.want(2048) < 2048
    signals = []
    for _ in range(7):
        assert host.incoming.receive()
        signals.append(rung(bells[1]))
    assert signals == [0, 1, 0, 0, 0, 0, 0], "the second packet of 1024 makes more than 2048 free"
    assert guest.outgoing.want(0) == 2 * PAGE


def test_a_peer_that_knows_no_pending_send_size_gets_no_signal_for_room(
    sides: tuple[RingPair, RingPair], bells: tuple[int, int]
) -> None:
    guest, host = sides
    assert guest.outgoing.send(bytes(8000))
    guest.outgoing.want(1000)
    guest.outgoing.mapping.write(64, U32.pack(0))
    assert host.incoming.receive()
    assert rung(bells[1]) == 0


def test_a_burst_stops_where_the_memory_ends(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    for _ in range(5):
        guest.outgoing.send(bytes(64))
    memory, table = Block("u1", 128), Block(PACKET, 8)
    assert [host.incoming.receive_burst(memory, table) for _ in range(4)] == [2, 2, 1, 0]


def test_room_counts_down_and_comes_back(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    assert guest.outgoing.room == 2 * PAGE
    guest.outgoing.send(bytes(8))
    assert guest.outgoing.room == 2 * PAGE - 32
    table = Block(PACKET, 4)
    assert host.incoming.receive_in_place(table) == 1
    assert guest.outgoing.room == 2 * PAGE - 32, "held in place"
    host.incoming.commit()
    assert guest.outgoing.room == 2 * PAGE


def test_rows_received_in_place_can_be_sent_on(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    sent = [Packet(payload=bytes([n]) * 8 * n, transaction_id=n) for n in range(5)]
    sent.append(Packet(packet_type=PACKET_GPA_DIRECT, pages=(PageRange(10, 4090, (1, 2)),), payload=b"rndis..."))
    for packet in sent:
        guest.outgoing.send_packet(packet)
    table = Block(PACKET, 32)
    held = host.incoming.receive_in_place(table)
    assert host.outgoing.send_burst(host.incoming.data, table, held) == len(sent)
    host.incoming.commit()
    assert [guest.incoming.receive() for _ in sent] == sent


WRITE, READ = 0, 4


@pytest.mark.parametrize("index", [2 * PAGE, 2**32 - 8, 4])
def test_a_forged_write_index(sides: tuple[RingPair, RingPair], index: int) -> None:
    guest, host = sides
    guest.outgoing.mapping.write(WRITE, U32.pack(index))
    with pytest.raises(RingError, match=rf"nic, incoming ring: index outside .* 8: {index} bytes, limit 8192 bytes"):
        host.incoming.receive()
    guest.outgoing.mapping.write(WRITE, U32.pack(0))
    with pytest.raises(RingError, match="index outside"):
        host.incoming.receive()
    with pytest.raises(RingError, match="index outside"):
        host.incoming.receive_burst(Block("u1", 64), Block(PACKET, 1))
    with pytest.raises(RingError, match="index outside"):
        host.incoming.unmask()
    assert host.incoming.broken
    assert host.outgoing.send(b"the other ring works")


@pytest.mark.parametrize("index", [PAGE, 2**32 - 8, 4])
def test_a_forged_read_index(sides: tuple[RingPair, RingPair], index: int) -> None:
    guest, host = sides
    guest.incoming.mapping.write(READ, U32.pack(index))
    with pytest.raises(RingError, match=rf"nic, outgoing ring: index outside .*: {index} bytes, limit 4096 bytes"):
        host.outgoing.send(b"x")
    with pytest.raises(RingError, match="index outside"):
        assert host.outgoing.room
    with pytest.raises(RingError, match="index outside"):
        host.outgoing.want(100)


def test_a_read_index_that_moves_back(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    guest.outgoing.send(bytes(104))
    host.incoming.receive()
    assert guest.outgoing.room == 2 * PAGE
    guest.outgoing.mapping.write(READ, U32.pack(120))
    with pytest.raises(RingError, match="moved backwards or past what there was: 120 bytes, limit 8192 bytes"):
        assert guest.outgoing.room


def test_a_read_index_in_front_of_what_was_shown(sides: tuple[RingPair, RingPair]) -> None:
    """A burst is shown at its end; a reader that claims to have read some of it before lies."""
    guest, host = sides
    memory, table = Block("u1", 1000), Block(PACKET, 4)
    table.array[:] = (0, 1000, 0, 6, 0, 16)
    assert host.outgoing.send_burst(memory, table, 1) == 1
    guest.incoming.mapping.write(READ, U32.pack(2 * 1024))
    with pytest.raises(RingError, match="moved backwards or past what there was: 2048 bytes, limit 4096 bytes"):
        host.outgoing.send_burst(memory, table, 4)


@pytest.mark.parametrize("index", [0, 64])
def test_a_write_index_that_runs_over_what_is_held(sides: tuple[RingPair, RingPair], index: int) -> None:
    guest, host = sides
    guest.outgoing.send(bytes(100))
    assert host.incoming.receive_in_place(Block(PACKET, 2)) == 1
    guest.outgoing.mapping.write(WRITE, U32.pack(index))
    with pytest.raises(RingError, match=f"moved backwards or past what there was: {index} bytes, limit 8192 bytes"):
        host.incoming.receive()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (2, 1, r"packet shorter than its header or longer .*: 8 bytes, limit 24 bytes"),
        (2, 4, r"packet shorter than its header or longer .*: 32 bytes, limit 24 bytes"),
        (2, 0xFFFF, r"packet shorter than its header or longer .*: 524280 bytes, limit 24 bytes"),
        (1, 1, r"data offset outside the packet: 8 bytes, limit 24 bytes"),
        (1, 4, r"data offset outside the packet: 32 bytes, limit 24 bytes"),
    ],
)
def test_a_forged_header(sides: tuple[RingPair, RingPair], field: int, value: int, rule: str) -> None:
    guest, host = sides
    guest.outgoing.send(bytes(8))
    guest.outgoing.mapping.write(PAGE + 2 * field, struct.pack("<H", value))
    with pytest.raises(RingError, match=rule):
        host.incoming.receive()


def test_packets_in_front_of_a_forged_one_are_delivered(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    for _ in range(3):
        guest.outgoing.send(bytes(8))
    guest.outgoing.mapping.write(PAGE + 2 * 32 + 4, struct.pack("<H", 0))
    memory, table = Block("u1", 4096), Block(PACKET, 8)
    assert host.incoming.receive_burst(memory, table) == 2
    with pytest.raises(RingError, match="packet shorter"):
        host.incoming.receive_burst(memory, table)


def test_lists_that_do_not_add_up_cost_only_their_packet(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    guest.outgoing.send_gpa_direct([PageRange(8, 0, (1,))])
    guest.outgoing.send(b"next")
    guest.outgoing.mapping.write(PAGE + 20, U32.pack(0))  # range count
    with pytest.raises(ProtocolError, match="page list: 0 ranges"):
        host.incoming.receive()
    assert host.incoming.receive() == Packet(payload=b"next\0\0\0\0")


def test_indices_of_a_ring_that_was_used_before_are_taken_over(sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    guest.outgoing.send(b"read")
    guest.outgoing.send(b"unread")
    host.incoming.receive()
    later = IncomingRing(host.incoming.mapping)
    assert later.receive() == Packet(payload=b"unread\0\0")
    assert OutgoingRing(guest.outgoing.mapping).send(b"more")
    assert later.receive() == Packet(payload=b"more\0\0\0\0")
    host.incoming.mapping.write(READ, U32.pack(2 * PAGE))
    with pytest.raises(RingError, match="index outside"):
        IncomingRing(host.incoming.mapping)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ((0, 65, 0, 6, 0, 16), "longer than the memory"),
        ((-8, 8, 0, 6, 0, 16), "in front of it"),
        ((64, 1, 0, 6, 0, 16), "behind it"),
        ((2**63 - 1, 8, 0, 6, 0, 16), "far behind it"),
        ((0, -1, 0, 6, 0, 16), "negative length"),
        ((0, 2**63 - 1, 0, 6, 0, 16), "huge length"),
        ((8, 8, 0, 6, 0, 32), "list begins in front of it"),
        ((8, 8, 0, 6, 0, 20), "header no multiple of 8"),
        ((8, 8, 0, 6, 0, 8), "header too short"),
        ((8, 8, 0, 6, 0, -(2**63)), "header negative"),
        ((8, 8, 0, 6, 0, 2**63 - 8), "header huge"),
        ((0, 8, 0, 65536, 0, 16), "type too large"),
        ((0, 8, 0, 6, 0x8000, 16), "flags too large"),
    ],
)
def test_rows_that_are_no_packets(sides: tuple[RingPair, RingPair], row: tuple[int, ...], why: str) -> None:
    guest, host = sides
    memory, table = Block("u1", 64), Block(PACKET, 3)
    memory.array[:] = np.arange(64)
    table.array[:] = [(0, 8, 1, 6, 0, 16), row, (0, 8, 2, 6, 0, 16)]
    with pytest.raises(UsageError, match="row 1 is no packet within 64 bytes"):
        guest.outgoing.send_burst(memory, table)
    assert host.incoming.receive() == Packet(payload=bytes(range(8)), transaction_id=1), why
    assert host.incoming.receive() is None


def test_misuse_is_told(memory: SharedMemory, sides: tuple[RingPair, RingPair]) -> None:
    guest, host = sides
    with pytest.raises(UsageError, match="a packet of 8184 bytes, this ring's limit is 8176 bytes"):
        guest.outgoing.send(bytes(8184 - 16))
    assert guest.outgoing.send(bytes(8176 - 16))
    with pytest.raises(UsageError, match=r"signal at 8192 bytes free; take 0\.\.8191"):
        guest.outgoing.want(8192)
    with pytest.raises(UsageError, match="a burst of 5 packets; this table has 4 rows"):
        guest.outgoing.send_burst(Block("u1", 8), Block(PACKET, 4), 5)
    with pytest.raises(UsageError, match="PACKET rows"):
        guest.outgoing.send_burst(Block("u1", 8), Block("i8", 60))
    with pytest.raises(UsageError, match="longer than 100 bytes of memory"):
        host.incoming.receive_burst(Block("u1", 100), Block(PACKET, 4))
    assert len(host.incoming.receive().payload) == 8176 - 16
    with memory.map(0, DOWNSTREAM) as plain, pytest.raises(UsageError, match="wrap_from=4096"):
        OutgoingRing(plain)
    with memory.map(0, PAGE, wrap_from=PAGE) as short, pytest.raises(UsageError, match="a ring of 4096 bytes"):
        OutgoingRing(short)


def test_pairs_that_cannot_be(memory: SharedMemory) -> None:
    pieces = [Piece(memory.fd, 0, TOTAL)]
    for downstream in (0, PAGE, PAGE + 8, 4 * PAGE, TOTAL, -PAGE):
        with pytest.raises(UsageError, match="control page and one data page or more"):
            RingPair(pieces, downstream, Side.HOST)
    with pytest.raises(DmaError, match="outside memory"):
        RingPair([Piece(memory.fd, PAGE, TOTAL)], DOWNSTREAM, Side.HOST)
    with SharedMemory(TOTAL) as other:
        os.pwrite(other.fd, U32.pack(4), DOWNSTREAM + WRITE)
        with pytest.raises(RingError, match="nic, outgoing ring: index outside"):
            RingPair([Piece(other.fd, 0, TOTAL)], DOWNSTREAM, Side.HOST, name="nic")


def test_a_pair_made_of_scattered_pages(memory: SharedMemory) -> None:
    """A GPADL's pages lie anywhere in the guest's memory; the ring is contiguous all the same."""
    pages = [Piece(memory.fd, PAGE * at, PAGE) for at in (4, 0, 3, 1, 2)]
    with (
        RingPair(pages, DOWNSTREAM, Side.GUEST) as guest,
        RingPair(pages, DOWNSTREAM, Side.HOST) as host,
    ):
        for turn in range(20):
            payload = bytes([turn]) * 1504
            assert guest.outgoing.send(payload)
            assert host.incoming.receive() == Packet(payload=payload)


def test_use_after_close(sides: tuple[RingPair, RingPair]) -> None:
    guest, _ = sides
    guest.close()
    guest.close()
    for use in (lambda: guest.outgoing.send(b""), lambda: guest.outgoing.room, guest.incoming.receive, guest.incoming.mask):
        with pytest.raises(ClosedError, match="memory is unmapped"):
            use()
