"""Every structure: there and back, too short, too large, and the same in numpy's eyes."""

import re
import subprocess
import sys
from typing import Annotated
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.strategies import all_structs, raw_bytes, structs
from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.layout import S32, U8, U16, U32, Array, BitsCodec, Guid, Int, Raw, Struct, Tail, struct

STRUCTS = all_structs()
FIXED = [kind for kind in STRUCTS if kind.TAIL is None]
TAILED = [kind for kind in STRUCTS if kind.TAIL is not None]


def each(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


class Flags(BitField, width=16):
    urgent = Bits(0)
    queue = Bits(4, 3)


@struct(size=4)
class Point(Struct):
    x: U16 = 0
    y: U16 = 7


@struct(size=44)
class Sample(Struct):
    count: U8 = 0
    signed: S32 = 0
    guid: Guid = UUID(int=0)
    name: Annotated[bytes, Raw(5)] = bytes(5)
    pair: Annotated[tuple[int, ...], Array(U32, 2)] = (0, 0)
    point: Point = Point()
    wide: Annotated[tuple[Point, ...], Array(Point, 1)] = (Point(),)
    flags: Flags = Flags(0)
    points: Annotated[tuple[Point, ...], Tail(Point, count="count", limit=3)] = ()


def test_a_structure_is_laid_out_packed_and_little_endian():
    sample = Sample(
        count=1,
        signed=-2,
        guid=UUID("00112233-4455-6677-8899-aabbccddeeff"),
        name=b"abc",
        pair=(1, 0x01020304),
        point=Point(x=5),
        wide=(Point(x=8, y=9),),
        flags=Flags.of(urgent=1, queue=5),
        points=(Point(x=0x0A0B),),
    )
    assert sample.pack() == bytes.fromhex(
        "01 feffffff 33221100 5544 7766 8899aabbccddeeff 6162630000 01000000 04030201 05000700 08000900 5100 0b0a0700"
    )
    assert Sample.unpack(sample.pack()) == sample
    assert sample.nbytes == Sample.SIZE + 4
    assert Sample.OFFSETS["point.y"] == 36


def test_there_are_structures_of_every_protocol():
    modules = {kind.__module__.rpartition(".")[2] for kind in STRUCTS}
    assert modules >= {"vmbus", "gpa", "ring", "nvsp", "rndis", "frame", "ndis", "vfio", "vfio_user"}


@each(STRUCTS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_structure_comes_back_as_it_went_and_numpy_sees_the_same_numbers(kind, data):
    value = data.draw(structs(kind))
    packed = value.pack()
    assert len(packed) == value.nbytes
    assert kind.unpack(packed) == value
    assert kind.unpack(b"\xff" * 3 + packed, 3) == value
    record = np.frombuffer(packed[: kind.SIZE], kind.DTYPE)[0]
    for field in kind.FIELDS:
        if isinstance(field.codec, Int | BitsCodec):
            assert record[field.name] == getattr(value, field.name)


@each(STRUCTS)
def test_numpy_has_every_field_at_its_place(kind):
    assert kind.DTYPE.itemsize == kind.SIZE
    fixed = [field for field in kind.FIELDS if not isinstance(field.codec, Tail)]
    assert {name: at for name, (_, at, *_) in kind.DTYPE.fields.items()} == {field.name: field.offset for field in fixed}


@each(FIXED)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_byte_of_a_fixed_structure_is_kept(kind, data):
    raw = data.draw(raw_bytes(kind.SIZE))
    assert kind.unpack(raw).pack() == raw


@each([kind for kind in STRUCTS if kind.SIZE])
def test_too_few_bytes_are_refused_with_both_numbers(kind):
    whole = kind().pack()
    for length in range(kind.SIZE):
        with pytest.raises(ProtocolError, match=rf"{kind.__name__}: have {length} bytes, need {kind.SIZE}"):
            kind.unpack(whole[:length])


@each(TAILED)
def test_a_tail_beyond_its_limit_is_refused_both_ways(kind):
    tail = kind.TAIL.codec
    element = 0 if isinstance(tail.element, Int) else tail.element.kind()
    too_many = (element,) * (tail.limit + 1)
    fields = {kind.TAIL.name: too_many}
    if tail.count:
        fields[tail.count] = len(too_many)
    with pytest.raises(UsageError, match=f"{len(too_many)} elements, limit {tail.limit}"):
        kind(**fields).pack()
    raw = kind().pack() + bytes(tail.element.size * len(too_many))
    if tail.count:
        raw = _with_count(kind, raw, len(too_many))
    with pytest.raises(ProtocolError, match=f"is {len(too_many)} elements, limit {tail.limit}"):
        kind.unpack(raw)


def _with_count(kind, raw, count):
    name = kind.TAIL.codec.count
    size = next(field.size for field in kind.FIELDS if field.name == name)
    at = kind.OFFSETS[name]
    return raw[:at] + count.to_bytes(size, "little") + raw[at + size :]


@each([kind for kind in TAILED if kind.TAIL.codec.count])
def test_a_count_of_more_than_what_follows_is_refused(kind):
    raw = _with_count(kind, kind().pack(), 2)
    need = 2 * kind.TAIL.codec.element.size
    with pytest.raises(ProtocolError, match=f"{kind.TAIL.codec.count} is 2, need {need} bytes, have 0"):
        kind.unpack(raw)


def test_a_count_that_contradicts_the_tail_is_the_callers_mistake():
    with pytest.raises(UsageError, match=r"Sample\.points: 1 elements, but count says 2"):
        Sample(count=2, points=(Point(),)).pack()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"flags": 1 << 16}, "Sample.flags: 65536"),
        ({"signed": 1 << 31}, "Sample.signed: 2147483648"),
        ({"pair": (1,)}, "Sample.pair: (1,) does not fit: 1 elements, need 2"),
        ({"pair": (1, -1)}, "Sample.pair: (1, -1)"),
        ({"guid": "text"}, "Sample.guid: 'text'"),
        ({"point": Point(x=-1)}, "Point.x: -1"),
    ],
)
def test_a_value_that_does_not_fit_is_named(fields, named):
    with pytest.raises(UsageError, match=re.escape(named)):
        Sample(**fields).pack()


def test_bytes_are_padded_up_to_the_field_and_never_cut():
    assert Sample(name=b"ab").name == b"ab\0\0\0"
    with pytest.raises(UsageError, match=r"Sample\.name: 6 bytes, limit 5"):
        Sample(name=b"abcdef")


def test_packing_into_a_buffer_touches_only_its_own_bytes():
    buffer = bytearray(b"\xee" * 8)
    assert Point(x=1, y=2).pack_into(buffer, 2) == 4
    assert buffer == b"\xee\xee\x01\0\x02\0\xee\xee"
    for offset in (5, -1):
        with pytest.raises(UsageError, match="bytes of room, need 4"):
            Point().pack_into(buffer, offset)


def test_a_negative_offset_is_no_way_around_the_length_check():
    with pytest.raises(ProtocolError, match="Point"):
        Point.unpack(bytes(8), -4)


def test_a_wrong_size_or_a_field_behind_a_tail_does_not_pass_the_declaration():
    with pytest.raises(TypeError, match="the fields take 4 bytes, declared 5"):

        @struct(size=5)
        class _Wrong(Struct):
            value: U32 = 0

    with pytest.raises(TypeError, match="stands behind a tail"):

        @struct(size=1)
        class _Behind(Struct):
            tail: Annotated[tuple[int, ...], Tail(U8, limit=1)] = ()
            value: U8 = 0


def test_structures_are_immutable_and_print_what_differs_from_zero():
    point = Point(x=3)
    with pytest.raises(AttributeError):
        point.x = 4
    assert repr(point) == "Point(x=3)"
    assert repr(Sample(point=point, flags=Flags(0x51))) == "Sample(point=Point(x=3), flags=Flags(0x51: urgent=1, queue=5))"


def test_bit_fields_keep_unnamed_bits_and_refuse_what_is_too_wide():
    assert Flags(0x8051).queue == 5
    assert Flags(0x8051).replace(queue=2) == 0x8021
    assert Flags.queue.mask == 0x70
    assert Flags.queue.shift == 4
    with pytest.raises(UsageError, match=r"Flags\.queue: 8 is not in 0\.\.7"):
        Flags.of(queue=8)
    with pytest.raises(UsageError, match="no part 'wrong'"):
        Flags.of(wrong=1)
    with pytest.raises(UsageError, match="0x10000 does not fit 16 bits"):
        Flags(0x10000)
    with pytest.raises(TypeError, match="overlap"):

        class _Overlap(BitField, width=8):
            first = Bits(0, 2)
            second = Bits(1)


def test_the_package_loads_without_numpy_and_numba():
    modules = sorted({kind.__module__ for kind in STRUCTS} | {"vfio_vmbus.wire.oid", "vfio_vmbus.wire.guids"})
    code = f"import sys, {', '.join(modules)}; sys.exit(bool({{'numpy', 'numba'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
