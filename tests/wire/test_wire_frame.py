"""Frames: there and back with what is known about them, and offsets and sizes that cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire import frame, rndis
from vfio_vmbus.wire.frame import Frame, PacketInfo, PpiHeader, PpiKind, encode_packet, parse_packet
from vfio_vmbus.wire.rndis import PacketMessage

INFOS = st.builds(PacketInfo, st.integers(0, 0x7FFFFFFF), st.binary(max_size=12), st.booleans())
FRAMES = st.builds(Frame, st.binary(max_size=100), st.lists(INFOS, max_size=4).map(tuple))


def test_a_frame_with_a_vlan_byte_by_byte():
    tag = frame.Vlan.of(priority=5, vlan_id=0x123)
    raw = encode_packet(Frame(b"\xaa" * 6, (PacketInfo.word(frame.PPI_VLAN, tag),)), align=8)
    assert raw == bytes.fromhex(
        "01000000 48000000 34000000 06000000 00000000 00000000 00000000 24000000 10000000 00000000 00000000"
        "10000000 06000000 0c000000 35120000 aaaaaaaaaaaa 000000000000"
    )


def test_a_checksum_request_has_the_bits_of_ndis():
    assert frame.TxChecksum.of(is_ipv4=1, tcp_checksum=1, tcp_header_offset=34) == 0x00220005
    assert frame.LargeSend.of(mss=1460, tcp_header_offset=54, version_2=1, is_ipv6=1) == 0xC36005B4


@given(item=FRAMES, align=st.sampled_from([1, 4, 8, 16]), behind=st.binary(max_size=9))
def test_frames_come_back_as_they_went(item, align, behind):
    raw = encode_packet(item, align=align)
    assert len(raw) % align == 0
    assert parse_packet(raw + behind) == item
    assert list(rndis.split_messages(raw)) == [raw]


@given(item=FRAMES, data=st.data())
def test_frames_cut_short_are_refused(item, data):
    raw = encode_packet(item)
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(ProtocolError):
        parse_packet(raw[:cut])


def forged(**fields: int) -> bytes:
    """A frame of 20 bytes with one information, with these fields of the header as given."""
    raw = bytearray(encode_packet(Frame(bytes(20), (PacketInfo.word(frame.PPI_HASH, 1),))))
    for name, value in fields.items():
        at = PacketMessage.OFFSETS[name]
        raw[at : at + 4] = value.to_bytes(4, "little")
    return bytes(raw)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data_offset": 35}, r"data at byte 43 for 20 bytes, need 44\.\.80"),
        ({"data_offset": 53}, r"data at byte 61 for 20 bytes, need 44\.\.80"),
        ({"data_length": 21}, r"data at byte 60 for 21 bytes, need 44\.\.80"),
        ({"data_offset": 0xFFFFFFF8, "data_length": 8}, "data at byte 4294967296 for 8 bytes"),
        ({"data_length": 0xFFFFFFFF}, "data at byte 60 for 4294967295 bytes"),
        ({"ppi_offset": 4}, "per-packet information at byte 12"),
        ({"ppi_offset": 0xFFFFFFFF}, "per-packet information at byte 4294967303"),
        ({"ppi_length": 37}, "per-packet information at byte 44 for 37 bytes"),
        ({"ppi_length": 15}, r"size 16, need 12\.\.15"),
        ({"ppi_length": 17}, "PpiHeader: have 1 bytes, need 12"),
    ],
)
def test_offsets_and_lengths_that_cannot_be_are_refused(fields, named):
    with pytest.raises(ProtocolError, match=named):
        parse_packet(forged(**fields))


@pytest.mark.parametrize(
    ("size", "offset", "named"),
    [
        (0, 12, r"size 0, need 12\.\.16"),
        (11, 12, r"size 11, need 12\.\.16"),
        (0xFFFFFFFF, 12, r"size 4294967295, need 12\.\.16"),
        (16, 0, r"offset 0, need 12\.\.16"),
        (16, 17, r"offset 17, need 12\.\.16"),
        (16, 0xFFFFFFFF, r"offset 4294967295, need 12\.\.16"),
    ],
)
def test_information_that_would_loop_or_leave_is_refused(size, offset, named):
    raw = bytearray(forged())
    PpiHeader(size=size, kind=PpiKind.of(number=frame.PPI_HASH), offset=offset).pack_into(raw, PacketMessage.SIZE)
    with pytest.raises(ProtocolError, match=named):
        parse_packet(raw)


def test_a_control_message_is_no_frame():
    with pytest.raises(ProtocolError, match="HaltRequest where a data message was expected"):
        parse_packet(rndis.encode_message(rndis.HaltRequest()))
