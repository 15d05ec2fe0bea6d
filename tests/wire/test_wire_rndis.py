"""RNDIS control messages with their information buffers, and the objects inside of these."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.strategies import structs
from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire import ndis, oid, rndis
from vfio_vmbus.wire.rndis import encode_message, parse_message, split_messages
from vfio_vmbus.wire.table import Side

KINDS = list(rndis.TABLE)
WITH_INFO = [rndis.QueryRequest, rndis.QueryComplete, rndis.SetRequest, rndis.IndicateStatus]
FILLED_IN = ("message_length", "info_length", "info_offset")


def each(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


def same(one, other):
    return type(one) is type(other) and all(
        getattr(one, field.name) == getattr(other, field.name) for field in one.FIELDS if field.name not in FILLED_IN
    )


@each(KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_message_comes_back_with_its_information(kind, data):
    message = data.draw(structs(kind))
    info = data.draw(st.binary(max_size=50)) if kind in WITH_INFO else b""
    packed = encode_message(message, info)
    parsed, parsed_info = parse_message(packed + b"\xee" * 9, sender=kind.SENDER)
    assert same(parsed, message)
    assert parsed_info == info
    assert parsed.message_length == len(packed)


def test_a_query_byte_by_byte():
    query = rndis.QueryRequest(request_id=3, oid=oid.OID_GEN_LINK_SPEED)
    assert encode_message(query) == bytes.fromhex("04000000 1c000000 03000000 07010100 00000000 00000000 00000000")
    answer = rndis.QueryComplete(request_id=3, status=oid.STATUS_SUCCESS)
    assert encode_message(answer, b"\x01\x02\x03\x04") == bytes.fromhex(
        "04000080 1c000000 03000000 00000000 04000000 10000000 01020304"
    )


@each([kind for kind in KINDS if kind not in WITH_INFO])
def test_messages_without_information_cannot_carry_any(kind):
    with pytest.raises(UsageError, match=f"{kind.__name__} has no information buffer, got 2 bytes"):
        encode_message(kind(), b"ab")


@each(KINDS)
def test_a_message_cut_short_is_refused(kind):
    whole = encode_message(kind())
    for length in range(len(whole)):
        with pytest.raises(ProtocolError, match=f"have {length} bytes, need 8|need {kind.SIZE}..{length}"):
            parse_message(whole[:length], sender=kind.SENDER)


@each(KINDS)
@pytest.mark.parametrize("said", [0, 7, 8, 11, 0xFFFFFFFF])
def test_a_length_that_cannot_be_is_refused(kind, said):
    raw = bytearray(encode_message(kind()))
    raw[4:8] = said.to_bytes(4, "little")
    with pytest.raises(ProtocolError, match=f"{kind.__name__}: message_length {said}, need {kind.SIZE}"):
        parse_message(raw, sender=kind.SENDER)


@each(WITH_INFO)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (4, 4), (0xFFFFFFF8, 8), (0xFFFFFFFF, 0xFFFFFFFF), (None, 9), (None, 0xFFFFFFFF), (-1, 4)],
)
def test_information_outside_of_the_message_is_refused(kind, offset, length):
    first = kind.SIZE - rndis.OFFSET_BASE
    offset = first if offset is None else first + offset if offset < 0 else offset
    raw = bytearray(encode_message(kind(), bytes(8)))
    for name, value in (("info_length", length), ("info_offset", offset)):
        at = kind.OFFSETS[name]
        raw[at : at + 4] = value.to_bytes(4, "little")
    with pytest.raises(ProtocolError, match=f"information at byte {offset + 8} for {length} bytes, need {kind.SIZE}"):
        parse_message(raw, sender=kind.SENDER)


@each([kind for kind in KINDS if kind.SENDER is not Side.BOTH])
def test_the_other_side_may_not_send_it(kind):
    other = Side.GUEST if kind.SENDER is Side.HOST else Side.HOST
    with pytest.raises(ProtocolError, match=f"{kind.__name__} from the {other.value}"):
        parse_message(encode_message(kind()), sender=other)


@given(st.lists(st.sampled_from(KINDS), max_size=5))
def test_messages_in_a_row_are_split(kinds):
    rows = [encode_message(kind()) for kind in kinds]
    assert [bytes(part) for part in split_messages(b"".join(rows))] == rows


@pytest.mark.parametrize("length", [0, 7, 13, 0xFFFFFFFF])
def test_a_row_with_a_wrong_length_stops_there(length):
    good = encode_message(rndis.HaltRequest())
    bad = good[:4] + length.to_bytes(4, "little") + good[8:]
    parts = split_messages(good + bad)
    assert next(parts) == good
    with pytest.raises(ProtocolError, match=rf"message_length {length}, need 8\.\.12"):
        next(parts)


@pytest.mark.parametrize("size", [ndis.OFFLOAD_SIZE_6_0, ndis.OFFLOAD_SIZE_6_1, ndis.Offload.SIZE])
def test_capabilities_of_older_hosts_end_earlier(size):
    full = ndis.Offload(
        header=ndis.ObjectHeader(object_type=ndis.OBJECT_OFFLOAD, revision=1, size=size),
        checksum=ndis.ChecksumOffload(ipv4_tx=ndis.ChecksumIpv4.of(tcp=1, ip=1)),
        rsc_ipv4=1,
        encapsulation_max_header=9,
    )
    parsed = ndis.parse_offload(full.pack()[:size] + b"\xee" * 4)
    assert parsed.checksum.ipv4_tx == 0x110
    assert (parsed.rsc_ipv4, parsed.encapsulation_max_header) == ((1, 9) if size == ndis.Offload.SIZE else (0, 0))


@pytest.mark.parametrize(("said", "have"), [(111, 200), (0, 200), (156, 155), (0xFFFF, 200)])
def test_capabilities_of_a_size_that_cannot_be_are_refused(said, have):
    raw = ndis.ObjectHeader(object_type=ndis.OBJECT_OFFLOAD, size=said).pack().ljust(have, b"\0")
    with pytest.raises(ProtocolError, match=f"size says {said} bytes, need at least 112, have {have}"):
        ndis.parse_offload(raw)
