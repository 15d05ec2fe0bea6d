"""Packets of a ring: known bytes, there and back, and headers that cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.strategies import structs
from vfio_vmbus.errors import ProtocolError, RingError, UsageError
from vfio_vmbus.wire import ring
from vfio_vmbus.wire.gpa import page_range, single_pages
from vfio_vmbus.wire.ring import Packet, PacketHeader, TransferRange, parse_packet

PAYLOADS = st.binary(max_size=100).map(lambda data: data.ljust(ring.padded(len(data)), b"\0"))
COMMON = {"transaction_id": st.integers(0, (1 << 64) - 1), "completion_requested": st.booleans(), "payload": PAYLOADS}
PACKETS = st.one_of(
    st.builds(Packet, packet_type=st.sampled_from([ring.PACKET_INBAND, ring.PACKET_COMPLETION]), **COMMON),
    st.builds(
        Packet,
        packet_type=st.just(ring.PACKET_GPA_DIRECT),
        pages=st.builds(single_pages, st.integers(0, 1 << 48), st.integers(1, 20000)),
        **COMMON,
    ),
    st.builds(
        Packet,
        packet_type=st.just(ring.PACKET_XFER_PAGES),
        pageset_id=st.integers(0, 0xFFFF),
        ranges=st.lists(structs(TransferRange), max_size=5).map(tuple),
        **COMMON,
    ),
)


def test_an_in_band_packet_byte_by_byte():
    packet = Packet(transaction_id=0x1122334455667788, completion_requested=True, payload=b"abc")
    assert packet.pack() == bytes.fromhex("0600 0200 0300 0100 8877665544332211") + b"abc\0\0\0\0\0"


def test_a_gpa_direct_packet_byte_by_byte():
    packet = Packet(packet_type=ring.PACKET_GPA_DIRECT, pages=(page_range(0x5010, 0x1000),), payload=bytes(8))
    assert packet.pack() == bytes.fromhex(
        "0900 0600 0700 0000 0000000000000000 00000000 01000000 00100000 10000000 0500000000000000 0600000000000000"
    ) + bytes(8)


def test_a_transfer_page_packet_byte_by_byte():
    ranges = (TransferRange(byte_count=60, byte_offset=1728), TransferRange(byte_count=1500, byte_offset=0))
    packet = Packet(packet_type=ring.PACKET_XFER_PAGES, pageset_id=0xCAFE, ranges=ranges, transaction_id=9)
    assert packet.pack() == bytes.fromhex(
        "0700 0500 0500 0000 0900000000000000 feca 00 00 02000000 3c000000 c0060000 dc050000 00000000"
    )


@given(packet=PACKETS, behind=st.binary(max_size=16))
def test_packets_come_back_as_they_went(packet, behind):
    packed = packet.pack()
    assert len(packed) % ring.PACKET_ALIGNMENT == 0
    assert parse_packet(packed + behind) == packet
    assert parse_packet(memoryview(packed)) == packet


@given(packet=PACKETS, data=st.data())
def test_packets_cut_short_are_refused(packet, data):
    packed = packet.pack()
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ProtocolError):
        parse_packet(packed[:cut])


@pytest.mark.parametrize(("offset8", "length8"), [(0, 2), (1, 2), (3, 2), (2, 4), (4, 4), (0xFFFF, 0xFFFF), (2, 0), (0, 0)])
def test_lengths_that_cannot_be_are_refused(offset8, length8):
    raw = PacketHeader(packet_type=ring.PACKET_INBAND, offset8=offset8, length8=length8).pack() + bytes(8)
    with pytest.raises(RingError, match=f"payload at {8 * offset8} to {8 * length8} of 24 bytes"):
        parse_packet(raw)


@pytest.mark.parametrize("kind", [ring.PACKET_GPA_DIRECT, ring.PACKET_XFER_PAGES])
def test_a_list_must_lie_before_the_payload(kind):
    for offset8 in (2, 3):
        raw = PacketHeader(packet_type=kind, offset8=offset8, length8=8).pack() + bytes(4) + b"\x02\0\0\0" + bytes(40)
        with pytest.raises(ProtocolError, match=r"have 16 bytes, need 24|2 ranges in 0 words|need 16 bytes, have 0"):
            parse_packet(raw)


@pytest.mark.parametrize("count", [1, 2, 0x10000, 0x20000000, 0xFFFFFFFF])
def test_a_huge_count_costs_nothing(count):
    for kind, at in ((ring.PACKET_GPA_DIRECT, 20), (ring.PACKET_XFER_PAGES, 20)):
        raw = bytearray(PacketHeader(packet_type=kind, offset8=3, length8=3).pack() + bytes(8))
        raw[at : at + 4] = count.to_bytes(4, "little")
        with pytest.raises(ProtocolError, match=str(count)):
            parse_packet(raw)


def test_a_packet_that_no_length_can_tell_is_the_callers_mistake():
    assert len(Packet(payload=bytes(ring.MAX_PACKET_SIZE - 16)).pack()) == ring.MAX_PACKET_SIZE
    with pytest.raises(UsageError, match=f"packet of {ring.MAX_PACKET_SIZE + 8} bytes, limit {ring.MAX_PACKET_SIZE}"):
        Packet(payload=bytes(ring.MAX_PACKET_SIZE - 15)).pack()


@pytest.mark.parametrize(("size", "whole"), [(0, 0), (1, 8), (7, 8), (8, 8), (9, 16)])
def test_padding_goes_up_to_eight(size, whole):
    assert ring.padded(size) == whole
