"""Fuzz target of the netvsc driver: bytes become what a host puts into its ring and into the receive buffer.

With NUMBA_DISABLE_JIT=1 an access outside of registered memory raises at once.
"""

from __future__ import annotations

import struct

from tests.fuzz.streams import Ended, Stream
from tests.netvsc.driven import RECEIVE_SECTIONS, Driven, driven
from vfio_vmbus.errors import PeerError
from vfio_vmbus.testing.scripted import RECEIVE_SECTION
from vfio_vmbus.wire import nvsp, oid, rndis
from vfio_vmbus.wire.frame import PPI_CHECKSUM, Frame, PacketInfo, encode_packet
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_INBAND, PACKET_XFER_PAGES

_SIZE = RECEIVE_SECTIONS * RECEIVE_SECTION
_GOOD = encode_packet(Frame(bytes(range(60)), (PacketInfo.word(PPI_CHECKSUM, 56),)), align=8)
_LINK = rndis.encode_message(rndis.IndicateStatus(status=oid.STATUS_MEDIA_CONNECT))

SEEDS = [
    bytes([0, 0, 0, 0, 2, 0, 0, 1, 0, 5, 64, 6, 6]),
    bytes([0, 3, 1, 8, 2, 1, 4, 3, 3, 1, 2, 2, 2, 0, 9, 5, 1, 5, 64]),
    bytes([1, 1, 0, 1, 200, 0, 0, 0, 0, 0, 0, 0, 2, 3, 6, 4, 5]),
    bytes([2, 0, 2, 7, 0, 16]) + bytes(16) + bytes([3, 1, 0, 0, 0, 0, 0, 0, 0, 4, 2]),
]


def fuzz_netvsc(data: bytes) -> None:
    """Whatever a host sends, the driver hands out only frames inside of the receive buffer, and raises only what is the host's fault."""
    stream = Stream(data)
    with driven(ring_pages=2) as rig:
        try:
            while True:
                _step(rig, stream)
        except (Ended, PeerError):
            pass
        counters = rig.nic.counters()
        assert all(value >= 0 for value in vars(counters).values())


def _step(rig: Driven, stream: Stream) -> None:
    choice = stream.number() % 7
    host = rig.host
    if choice == 0:
        ranges = [_range(rig, stream) for _ in range(stream.number() % 12)]
        host.transfer(
            ranges,
            transaction=stream.number(),
            pageset=nvsp.RECEIVE_BUFFER_ID if stream.number() % 8 else stream.number(2),
            count=len(ranges) if stream.number() % 8 else stream.number(4),
            flags=1 if stream.number() % 8 else 0,
        )
    elif choice == 1:
        host.complete(
            stream.number() if stream.number() & 1 else stream.number(8), nvsp.SendRndisPacketComplete(status=stream.number())
        )
    elif choice == 2:
        kind = (PACKET_INBAND, PACKET_XFER_PAGES, PACKET_COMPLETION, stream.number())[stream.number() % 4]
        body = stream.bytes(8 * (stream.number() % 9))
        host.post(
            struct.pack("<HHHHQ", kind, 2 + stream.number() % 4, 2 + len(body) // 8, stream.number() & 1, stream.number()) + body
        )
    elif choice == 3:
        rig.send([(bytes(14 + stream.number(2) % 1600), stream.number())] * (1 + stream.number() % 8))
    elif choice == 4:
        host.completes = bool(stream.number() & 1)
        host.turn()
    elif choice == 5:
        _receive(rig, stream.number() % 65)
    else:
        rig.nic.poll()


def _range(rig: Driven, stream: Stream) -> tuple[int, int]:
    """Part of the receive buffer with a message in it, more or less."""
    data = bytearray(_LINK if stream.number() % 8 == 0 else _GOOD)
    for _ in range(stream.number() % 3):
        at = stream.number() % (len(data) - 4)
        data[at : at + 4] = struct.pack("<I", stream.pick(0, 8, 36, len(_GOOD), 1 << 31, (1 << 32) - 1))
    size, offset = rig.host.place(bytes(data))
    return (size, offset) if stream.number() % 4 else (stream.pick(size, 0, _SIZE), stream.pick(offset, _SIZE - 40, _SIZE))


def _receive(rig: Driven, count: int) -> None:
    buffer = rig.nic.queue.receive_buffer
    for row in rig.nic.queue.rx_burst(count):
        address, size = int(row["address"]), int(row["size"])
        assert buffer.address <= address, "a frame in front of the receive buffer"
        assert address + size <= buffer.address + buffer.size, "a frame behind the receive buffer"
        assert 14 <= size <= 1518
