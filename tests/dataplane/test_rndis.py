"""The kernels that write and take apart RNDIS data messages, against wire/frame.py and wire/rndis.py."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataplane import kernels
from tests.dataplane.messages import LONGEST, agree, parse
from vfio_vmbus.dataplane.rndis import (
    BAD_DATA,
    BAD_FRAME,
    BAD_LENGTH,
    BAD_PPI,
    NOT_A_PACKET,
    SHORT_HEADER,
    room_for,
)
from vfio_vmbus.memory.block import Block
from vfio_vmbus.wire.frame import PPI_CHECKSUM, PPI_VLAN, Frame, PacketInfo, encode_packet, parse_packet

EXAMPLES = settings(max_examples=400, deadline=None)

infos = st.lists(
    st.builds(
        PacketInfo,
        number=st.sampled_from([PPI_CHECKSUM, PPI_VLAN, 1, 2, 8, 0x7FFFFFFF]),
        data=st.binary(max_size=3).map(lambda data: data.ljust(4 * len(data), b"\0")) | st.binary(min_size=4, max_size=4),
        internal=st.booleans(),
    ),
    max_size=4,
).map(tuple)
frames = st.builds(Frame, data=st.binary(max_size=100) | st.integers(0, 1600).map(bytes), infos=infos)
words = st.one_of(
    st.integers(0, 200), st.integers(0, 2**32 - 1), st.sampled_from([2**31, 2**32 - 1, 2**32 - 8, 1514, 1519, 44, 43])
)
changes = st.lists(st.tuples(st.integers(0, 22).map(lambda index: 4 * index), words), max_size=3)


@EXAMPLES
@given(frame=frames, align=st.sampled_from([1, 4, 8, 64]), before=st.integers(0, 3))
def test_messages(frame: Frame, align: int, before: int) -> None:
    agree(bytes(8 * before) + encode_packet(frame, align=align), 8 * before)


@EXAMPLES
@given(frame=frames, changes=changes, cut=st.integers(0, 60))
def test_messages_that_lie(frame: Frame, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(encode_packet(frame, align=8))
    for at, value in changes:
        if at + 4 <= len(data):
            data[at : at + 4] = struct.pack("<I", value)
    agree(bytes(data[: max(len(data) - cut, 0)]))


@EXAMPLES
@given(data=st.binary(max_size=120))
def test_any_bytes(data: bytes) -> None:
    agree(data)
    agree(struct.pack("<II", 1, len(data) + 8) + data)


@EXAMPLES
@given(data=st.binary(min_size=14, max_size=200), kind=st.sampled_from([PPI_CHECKSUM, PPI_VLAN]), info=st.integers(0, 2**32 - 1))
def test_messages_that_we_write(data: bytes, kind: int, info: int) -> None:
    """Our header and a frame behind it are a message as others read it; nothing else of the memory is touched."""
    room = room_for(info)
    total = room + len(data)
    memory = Block("u1", total + 16)
    memory.array[:] = 0xEE
    memory.array[room:total] = np.frombuffer(data, np.uint8)
    kernels.write_message(memory.address, len(data), total, kind, info)
    written = memory.array.tobytes()
    assert written[total:] == b"\xee" * 16
    assert parse_packet(written[:total]) == Frame(data, (PacketInfo.word(kind, info),) if info else ())
    rule, found = parse(written[:total], longest=2000)
    assert rule == 0
    assert found is not None
    assert found[1] == data


GOOD = encode_packet(Frame(bytes(60), (PacketInfo.word(PPI_CHECKSUM, 5),)), align=8)


def with_word(at: int, value: int) -> bytes:
    return GOOD[:at] + struct.pack("<I", value) + GOOD[at + 4 :]


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", SHORT_HEADER),
        (GOOD[:7], SHORT_HEADER),
        (GOOD[:43], SHORT_HEADER),
        (with_word(0, 2), NOT_A_PACKET),
        (with_word(4, 43), BAD_LENGTH),
        (with_word(4, len(GOOD) + 1), BAD_LENGTH),
        (with_word(8, 35), BAD_DATA),
        (with_word(8, 0xFFFFFFFF), BAD_DATA),
        (with_word(12, len(GOOD)), BAD_DATA),
        (with_word(12, 13), BAD_FRAME),
        (with_word(28, 35), BAD_PPI),
        (with_word(28, 38), BAD_PPI),
        (with_word(32, 15), BAD_PPI),
        (with_word(32, 4), BAD_PPI),
        (with_word(44, 0), BAD_PPI),
        (with_word(44, 11), BAD_PPI),
        (with_word(44, 20), BAD_PPI),
        (with_word(52, 11), BAD_PPI),
        (with_word(52, 17), BAD_PPI),
    ],
)
def test_which_rule_was_broken(data: bytes, rule: int) -> None:
    assert parse(data) == (rule, None)


def test_frames_longer_than_agreed() -> None:
    data = encode_packet(Frame(bytes(LONGEST)))
    assert parse(data)[0] == 0
    assert parse(data, longest=LONGEST - 1) == (BAD_FRAME, None)
