"""One packet at a time inside a kernel: what arrives, and when the space behind it is given back."""

from collections.abc import Iterator

import pytest

from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import kernel
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.ring.bursts import PACKET, packet_at, take
from vfio_vmbus.ring.ends import IncomingRing, OutgoingRing
from vfio_vmbus.ring.primitives import in_header, in_next, in_ready, rest, ring_at
from vfio_vmbus.wire.ring import Packet


@kernel("i8(i8, i8, i8)")
def take_one(address: int, memory: int, row: int) -> int:
    """Copy the next packet: the bytes taken, 0 when there is none, -1 when it breaks a rule."""
    ring = ring_at(address)
    if not in_ready(ring):
        rest()
        return 0
    header = in_header(ring)
    if header < 0:
        return -1
    size = take(ring, header, packet_at(row), memory, 0)
    in_next(ring, header)
    return size


@pytest.fixture
def ends() -> Iterator[tuple[OutgoingRing, IncomingRing]]:
    with SharedMemory(3 * PAGE) as memory, memory.map(wrap_from=PAGE) as mapping:
        yield OutgoingRing(mapping), IncomingRing(mapping)


def test_packets_come_one_by_one_around_the_ring(ends: tuple[OutgoingRing, IncomingRing]) -> None:
    outgoing, incoming = ends
    memory, row = Block("u1", 4096), Block(PACKET)
    for turn in range(100):
        payload = bytes([turn]) * (8 * turn % 1600 + 8)
        assert outgoing.send_packet(Packet(payload=payload, transaction_id=turn))
        assert take_one(incoming.address, memory.address, row.address) == len(payload)
        assert row.array[0].tolist() == (0, len(payload), turn, 6, 0, 16)
        assert memory.array[: len(payload)].tobytes() == payload
        assert take_one(incoming.address, memory.address, row.address) == 0


def test_space_comes_back_when_all_that_was_known_is_read(ends: tuple[OutgoingRing, IncomingRing]) -> None:
    outgoing, incoming = ends
    memory, row = Block("u1", 4096), Block(PACKET)
    for _ in range(3):
        outgoing.send(bytes(8))
    free = []
    for _ in range(3):
        assert take_one(incoming.address, memory.address, row.address) == 8
        free.append(outgoing.room)
    assert free == [2 * PAGE - 96, 2 * PAGE - 96, 2 * PAGE]


def test_space_comes_back_when_a_quarter_of_the_ring_is_held(ends: tuple[OutgoingRing, IncomingRing]) -> None:
    outgoing, incoming = ends
    memory, row = Block("u1", 4096), Block(PACKET)
    for _ in range(7):
        assert outgoing.send(bytes(1000))
    free = []
    for _ in range(7):
        assert take_one(incoming.address, memory.address, row.address) == 1000
        free.append(outgoing.room)
    assert free == [1024, 1024, 4096, 4096, 4096, 7168, 8192]


def test_a_broken_rule_ends_it(ends: tuple[OutgoingRing, IncomingRing]) -> None:
    outgoing, incoming = ends
    memory, row = Block("u1", 4096), Block(PACKET)
    outgoing.send(bytes(8))
    outgoing.mapping.write(PAGE + 4, b"\0\0")
    assert take_one(incoming.address, memory.address, row.address) == -1
    assert take_one(incoming.address, memory.address, row.address) == 0
    assert incoming.broken
