"""VFIO, vfio-user and PCI: numbers, sizes and offsets as literals from their specifications, and what parsers refuse."""

import ctypes
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.strategies import all_structs, structs
from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire import opened, pci, vfio, vfio_user
from vfio_vmbus.wire.table import Side
from vfio_vmbus.wire.vfio_user import Header, HeaderFlags
from vfio_vmbus.wire.vfio_user_version import MAX_SERVER_PAYLOAD, Capabilities, decode_version, encode_version

REQUEST, REPLY, NO_REPLY, ERROR = 0, 1, 0x10, 0x20

# Structure: its size, then each field's offset, from include/uapi/linux/vfio.h and vfio-user.rst.
LAYOUTS = {
    vfio.RegionInfo: (32, "argsz 0 flags 4 index 8 cap_offset 12 size 16 offset 24"),
    vfio.CapabilityHeader: (8, "id 0 version 2 next 4"),
    vfio.SparseArea: (16, "offset 0 size 8"),
    vfio.SparseMmap: (16, "header 0 header.id 0 header.version 2 header.next 4 area_count 8 reserved 12 areas 16"),
    vfio.RegionType: (16, "header 0 header.id 0 header.version 2 header.next 4 type 8 subtype 12"),
    vfio.IrqInfo: (16, "argsz 0 flags 4 index 8 count 12"),
    vfio.IrqSet: (20, "argsz 0 flags 4 index 8 start 12 count 16"),
    vfio.Feature: (8, "argsz 0 flags 4"),
    vfio_user.Header: (16, "message_id 0 command 2 message_size 4 flags 8 error 12"),
    vfio_user.Version: (4, "major 0 minor 2"),
    vfio_user.DmaMap: (32, "argsz 0 flags 4 offset 8 iova 16 size 24"),
    vfio_user.DmaUnmap: (24, "argsz 0 flags 4 iova 8 size 16"),
    vfio_user.DirtyBitmap: (16, "page_size 0 size 8"),
    vfio_user.DeviceInfo: (16, "argsz 0 flags 4 region_count 8 irq_count 12"),
    vfio_user.RegionIoFds: (16, "argsz 0 flags 4 index 8 count 12"),
    vfio_user.SubRegion: (40, "offset 0 size 8 fd_index 16 type 20 flags 24 padding 28 data 32"),
    vfio_user.RegionAccess: (16, "offset 0 region 8 count 12"),
    vfio_user.WriteEntry: (24, "offset 0 region 8 count 12 data 16"),
    vfio_user.WriteMulti: (8, "count 0 writes 8"),
    vfio_user.WriteMultiReply: (8, "count 0"),
    vfio_user.DmaAccess: (16, "iova 0 count 8"),
    vfio_user.OldDmaAccess: (12, "iova 0 count 8"),
    vfio_user.MigrationData: (8, "argsz 0 size 4"),
    pci.ConfigHeader: (
        64,
        "vendor 0 device 2 command 4 status 6 class_and_revision 8 cache_line_size 12 latency_timer 13 header_type 14 self_test 15 "
        "bars 16 cardbus 40 subsystem_vendor 44 subsystem 46 rom 48 capabilities 52 reserved 53 interrupt_line 60 interrupt_pin 61 "
        "min_grant 62 max_latency 63",
    ),
    pci.MsiCapability: (14, "id 0 next 1 control 2 address_low 4 address_high 8 data 12"),
    pci.MsixCapability: (12, "id 0 next 1 control 2 table 4 pending 8"),
    pci.MsixEntry: (16, "address_low 0 address_high 4 data 8 control 12"),
    pci.VmbusCapability: (40, "id 0 next 1 length 2 layout 3 magic 4 class_guid 8 instance_guid 24"),
    opened.OpenedInfo: (  # docs/vmbus-personality.md
        64,
        "magic 0 layout 4 features 8 status 12 channels 16 max_channels 20 reserved 24 reserved2 28 class_guid 32 instance_guid 48",
    ),
    opened.OpenedRings: (16, "region 0 upstream 4 downstream 8 reserved 12"),
}

NUMBERS = {
    1: "VERSION",
    2: "DMA_MAP",
    3: "DMA_UNMAP",
    4: "DEVICE_GET_INFO",
    5: "DEVICE_GET_REGION_INFO",
    6: "DEVICE_GET_REGION_IO_FDS",
    7: "DEVICE_GET_IRQ_INFO",
    8: "DEVICE_SET_IRQS",
    9: "REGION_READ",
    10: "REGION_WRITE",
    11: "DMA_READ",
    12: "DMA_WRITE",
    13: "DEVICE_RESET",
    15: "REGION_WRITE_MULTI",
    16: "DEVICE_FEATURE",
    17: "MIG_DATA_READ",
    18: "MIG_DATA_WRITE",
}


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)
def test_sizes_and_offsets(kind):
    size, table = LAYOUTS[kind]
    words = table.split()
    assert size == kind.SIZE
    assert dict(kind.OFFSETS) == dict(zip(words[::2], map(int, words[1::2]), strict=True))


def test_no_structure_is_left_out():
    assert LAYOUTS.keys() == {
        kind for kind in all_structs() if kind.__module__ in (opened.__name__, pci.__name__, vfio.__name__, vfio_user.__name__)
    }


def test_command_numbers():
    assert {number: command.name for number, command in vfio_user.COMMANDS.items()} == NUMBERS
    assert all(getattr(vfio_user, name) == number for number, name in NUMBERS.items())
    assert {number for number, command in vfio_user.COMMANDS.items() if command.sender is Side.HOST} == {11, 12}


def test_flag_numbers():
    assert (vfio.DEVICE_RESET, vfio.DEVICE_PCI) == (1, 2)
    assert (vfio.REGION_READ, vfio.REGION_WRITE, vfio.REGION_MMAP, vfio.REGION_CAPS) == (1, 2, 4, 8)
    assert (vfio.IRQ_EVENTFD, vfio.IRQ_MASKABLE, vfio.IRQ_AUTOMASKED, vfio.IRQ_NORESIZE) == (1, 2, 4, 8)
    assert (vfio.SET_DATA_NONE, vfio.SET_DATA_BOOL, vfio.SET_DATA_EVENTFD) == (1, 2, 4)
    assert (vfio.SET_ACTION_MASK, vfio.SET_ACTION_UNMASK, vfio.SET_ACTION_TRIGGER) == (8, 16, 32)
    assert (vfio.FEATURE_INDEX, vfio.FEATURE_GET, vfio.FEATURE_SET, vfio.FEATURE_PROBE) == (0xFFFF, 0x10000, 0x20000, 0x40000)
    assert (vfio.REGION_BAR0, vfio.REGION_BAR5, vfio.REGION_ROM, vfio.REGION_CONFIG, vfio.REGION_VGA) == (0, 5, 6, 7, 8)
    assert (vfio.IRQ_INTX, vfio.IRQ_MSI, vfio.IRQ_MSIX, vfio.IRQ_ERR, vfio.IRQ_REQ) == (0, 1, 2, 3, 4)
    assert (vfio.PCI_REGIONS, vfio.PCI_IRQS) == (9, 5)
    assert (vfio.CAPABILITY_SPARSE_MMAP, vfio.CAPABILITY_TYPE, vfio.CAPABILITY_MSIX_MAPPABLE) == (1, 2, 3)
    assert (vfio_user.UNMAP_DIRTY_BITMAP, vfio_user.UNMAP_ALL) == (1, 2)
    assert (vfio.DMA_READ, vfio.DMA_WRITE) == (1, 2)


def test_numbers_of_opened_devices():
    """As docs/vmbus-personality.md has them, and, 0 to 6, uio_hv_generic and the patch of 2019."""
    assert opened.MAGIC == 0x4F424D56
    assert (opened.LAYOUT, opened.STATUS_AT, opened.CHANNELS_AT, opened.DOORBELLS_AT) == (1, 0x0C, 0x100, 0x1000)
    assert opened.REGISTERS_SIZE == 0x2000
    assert (opened.STATUS_OPEN, opened.STATUS_FAILED, opened.STATUS_GONE) == (1, 2, 4)
    assert (opened.REGION_RINGS, opened.REGION_INTERRUPT_PAGE, opened.REGION_MONITOR_PAGE) == (0, 1, 2)
    assert (opened.REGION_RECEIVE, opened.REGION_SEND, opened.REGION_RECEIVE_GPADL, opened.REGION_SEND_GPADL) == (3, 4, 5, 6)
    assert (opened.REGION_REGISTERS, opened.REGION_SUBCHANNELS, opened.IRQ_CHANNELS) == (7, 8, 0)
    assert opened.OpenedInfo.OFFSETS["status"] == opened.STATUS_AT


def test_messages_as_bytes():
    """Written down by hand from the specification's tables."""
    asked = vfio_user.encode_request(7, vfio_user.REGION_READ, vfio_user.RegionAccess(offset=0x20, region=7, count=4).pack())
    assert asked == bytes.fromhex("0700 0900 20000000 00000000 00000000  2000000000000000 07000000 04000000")
    header = vfio_user.parse_header(asked, 4096)
    answer = vfio_user.encode_reply(header, asked[16:] + b"\x14\x14\0\0")
    assert answer == bytes.fromhex("0700 0900 24000000 01000000 00000000  2000000000000000 07000000 04000000 14140000")
    assert vfio_user.encode_error(header, 22) == bytes.fromhex("0700 0900 10000000 21000000 16000000")
    posted = vfio_user.encode_request(1, vfio_user.DEVICE_RESET, no_reply=True)
    assert posted == bytes.fromhex("0100 0d00 10000000 10000000 00000000")


@settings(max_examples=30, deadline=None)
@given(message_id=st.integers(0, 0xFFFF), payload=st.binary(max_size=64), no_reply=st.booleans(), error=st.integers(1, 4095))
def test_what_is_encoded_is_parsed(message_id, payload, no_reply, error):
    for number in NUMBERS:
        message = vfio_user.encode_request(message_id, number, payload, no_reply=no_reply)
        header = vfio_user.parse_header(message, len(message))
        assert (header.message_id, header.command, header.message_size) == (message_id, number, len(message))
        assert header.flags == (NO_REPLY if no_reply else 0)
        reply = vfio_user.parse_header(vfio_user.encode_reply(header, payload), len(message))
        assert (reply.message_id, reply.command, reply.flags, reply.error) == (message_id, number, REPLY, 0)
        refusal = vfio_user.parse_header(vfio_user.encode_error(header, error), 16)
        assert (refusal.message_id, refusal.command, refusal.flags, refusal.error) == (message_id, number, REPLY | ERROR, error)


@pytest.mark.parametrize(
    ("size", "flags", "named"),
    [
        (15, 0, "message size 15 bytes, need 16 to 64"),
        (0, 0, "message size 0 bytes, need 16 to 64"),
        (65, 0, "message size 65 bytes, need 16 to 64"),
        (0xFFFFFFFF, 0, "message size 4294967295 bytes, need 16 to 64"),
        (16, 2, "message type 2, limit 1"),
        (16, 15, "message type 15, limit 1"),
        (16, 0x40, "message flags 0x40, limit 0x3f"),
        (16, 0x80000001, "message flags 0x80000001, limit 0x3f"),
        (16, ERROR, "message flags 0x20: a command cannot be an error"),
    ],
)
def test_a_header_that_cannot_be_is_refused(size, flags, named):
    with pytest.raises(ProtocolError, match=named):
        vfio_user.parse_header(Header(message_size=size, flags=HeaderFlags(flags)).pack(), 64)


def test_a_short_header_is_refused():
    for length in range(16):
        with pytest.raises(ProtocolError, match=f"have {length} bytes, need 16"):
            vfio_user.parse_header(bytes(length), 64)


@pytest.mark.parametrize("number", [0, 14, 19, 0xFFFF])
def test_an_unknown_command_is_refused(number):
    for parse in (vfio_user.parse_request, vfio_user.parse_reply):
        with pytest.raises(ProtocolError, match=f"unknown command {number}, limit 18"):
            parse(number, bytes(64))


SIZES = {number: command.request.kind.SIZE for number, command in vfio_user.COMMANDS.items() if command.request.kind}


@pytest.mark.parametrize("number", SIZES, ids=NUMBERS.get)
def test_a_short_request_is_refused(number):
    for length in range(SIZES[number]):
        with pytest.raises(ProtocolError, match=f"have {length} bytes, need {SIZES[number]}"):
            vfio_user.parse_request(number, bytes(length))


@pytest.mark.parametrize("number", [number for number in SIZES if "argsz" in vfio_user.COMMANDS[number].request.kind.OFFSETS])
def test_an_argsz_below_the_structure_is_refused(number):
    kind = vfio_user.COMMANDS[number].request.kind
    for argsz in (0, kind.SIZE - 1):
        with pytest.raises(ProtocolError, match=f"argsz is {argsz} bytes, need {kind.SIZE}"):
            vfio_user.parse_request(number, kind(argsz=argsz).pack())
    assert vfio_user.parse_request(number, kind(argsz=0xFFFFFFFF).pack()) == (kind(argsz=0xFFFFFFFF), b"")


BOOLS = vfio.SET_DATA_BOOL | vfio.SET_ACTION_TRIGGER


@pytest.mark.parametrize(
    ("number", "value", "data", "named"),
    [
        (vfio_user.DMA_MAP, vfio_user.DmaMap(), b"x", "DMA_MAP: 1 bytes behind the first 32, need 0"),
        (vfio_user.REGION_READ, vfio_user.RegionAccess(count=4), bytes(4), "REGION_READ: 4 bytes behind the first 16, need 0"),
        (vfio_user.REGION_WRITE, vfio_user.RegionAccess(count=4), bytes(3), "REGION_WRITE: 3 bytes behind the first 16, need 4"),
        (vfio_user.REGION_WRITE, vfio_user.RegionAccess(count=4), bytes(5), "REGION_WRITE: 5 bytes behind the first 16, need 4"),
        (vfio_user.REGION_WRITE, vfio_user.RegionAccess(count=0xFFFFFFFF), b"", "0 bytes behind the first 16, need 4294967295"),
        (vfio_user.DMA_WRITE, vfio_user.DmaAccess(count=8), bytes(7), "DMA_WRITE: 7 bytes behind the first 16, need 8"),
        (vfio_user.DEVICE_SET_IRQS, vfio.IrqSet(flags=BOOLS, count=3), bytes(2), "2 bytes behind the first 20, need 3"),
        (
            vfio_user.DEVICE_SET_IRQS,
            vfio.IrqSet(flags=vfio.SET_DATA_NONE, count=3),
            bytes(3),
            "3 bytes behind the first 20, need 0",
        ),
        (vfio_user.REGION_WRITE_MULTI, vfio_user.WriteMulti(), bytes(24), "24 bytes behind the first 8, need 0"),
        (vfio_user.MIG_DATA_WRITE, vfio_user.MigrationData(size=1), b"", "0 bytes behind the first 8, need 1"),
        (vfio_user.DEVICE_RESET, None, b"x", "DEVICE_RESET: 1 bytes behind the first 0, need 0"),
    ],
)
def test_data_of_another_length_is_refused(number, value, data, named):
    with pytest.raises(ProtocolError, match=re.escape(named)):
        vfio_user.parse_request(number, (value.pack() if value else b"") + data)


def test_many_writes_in_one_message():
    entries = tuple(vfio_user.WriteEntry(offset=4 * index, count=4, data=bytes([index] * 4)) for index in range(3))
    payload = vfio_user.WriteMulti(count=3, writes=entries).pack()
    assert len(payload) == 8 + 3 * 24
    assert vfio_user.parse_request(vfio_user.REGION_WRITE_MULTI, payload)[0].writes == entries
    for count, named in ((4, "count is 4, need 96 bytes, have 72"), (257, "limit 256"), (1 << 63, "limit 256")):
        with pytest.raises(ProtocolError, match=named):
            vfio_user.parse_request(vfio_user.REGION_WRITE_MULTI, count.to_bytes(8, "little") + payload[8:])


@settings(max_examples=60, deadline=None)
@given(number=st.sampled_from(sorted(NUMBERS)), data=st.data())
def test_requests_and_replies_come_back_as_they_went(number, data):
    command = vfio_user.COMMANDS[number]
    for form, parse in ((command.request, vfio_user.parse_request), (command.reply, vfio_user.parse_reply)):
        value = None
        if form.kind is not None:
            value = data.draw(structs(form.kind))
            fields = {field.name: getattr(value, field.name) for field in form.kind.FIELDS}
            for name, least in (("argsz", form.kind.SIZE), ("count", 0), ("size", 0)):
                if name in fields and form.kind is not vfio_user.WriteMulti:
                    fields[name] = data.draw(st.integers(least, least + 40))
            value = form.kind(**fields)
        need = form.behind(value) if value is not None else 0
        rest = data.draw(st.binary(min_size=need or 0, max_size=40 if need is None else need))
        payload = (value.pack() if value is not None else b"") + rest
        assert parse(number, payload) == (value, rest)


def test_an_errno_that_is_none_is_the_callers_mistake():
    for error in (0, -1, 4096):
        with pytest.raises(UsageError, match=f"errno {error}: take 1 to 4095"):
            vfio_user.encode_error(Header(), error)


# VERSION's JSON.


def version(text, major=0, minor=0):
    return vfio_user.Version(major=major, minor=minor).pack() + text


def test_a_version_of_qemu_is_taken():
    text = (
        b'{"capabilities": {"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "max_msg_fds": 16, "max_data_xfer_size": '
        b'1048576, "write_multiple": true, "pgsizes": 4096, "max_dma_maps": 65535}}\0'
    )
    found, capabilities = decode_version(version(text))
    assert (found.major, found.minor) == (0, 0)
    assert capabilities == Capabilities(max_msg_fds=16, write_multiple=True)


@pytest.mark.parametrize("text", [b"", b"\0", b"{}", b"{}\0", b'{"capabilities":{}}\0', b'{"more":[1,{}]}\0'])
def test_what_is_missing_has_its_default(text):
    _, capabilities = decode_version(version(text, 0, 2))
    assert capabilities == Capabilities(
        max_msg_fds=1, max_data_xfer_size=1048576, max_dma_maps=65535, pgsizes=4096, write_multiple=False
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"[", "is no JSON of capabilities"),
        (b"{}{}", "is no JSON of capabilities"),
        (b"{}\0{}\0", "is no JSON of capabilities"),
        (b"{}\0\0", "is no JSON of capabilities"),
        (b"\xff\xfe", "is no JSON of capabilities"),
        (b'{"capabilities":null}', "is no JSON of capabilities"),
        (b'{"capabilities":{"x":' + b"[" * 3000, "is no JSON of capabilities"),
        (b'{"capabilities":{"max_msg_fds":true}}', "Expected `int`, got `bool`"),
        (b'{"capabilities":{"max_msg_fds":"8"}}', "Expected `int`, got `str`"),
        (b'{"capabilities":{"write_multiple":1}}', "Expected `bool`, got `int`"),
        (b'{"capabilities":{"max_msg_fds":-1}}', "max_msg_fds is -1, need 0 to 1024"),
        (b'{"capabilities":{"max_msg_fds":1025}}', "max_msg_fds is 1025, need 0 to 1024"),
        (b'{"capabilities":{"max_data_xfer_size":0}}', "max_data_xfer_size is 0, need 1 to 67108864"),
        (b'{"capabilities":{"max_data_xfer_size":67108865}}', "max_data_xfer_size is 67108865, need 1 to 67108864"),
        (b'{"capabilities":{"max_dma_maps":0}}', "max_dma_maps is 0, need 1 to 4294967296"),
        (b'{"capabilities":{"pgsizes":0}}', "pgsizes is 0, need 1 to 18446744073709551615"),
        (b'{"capabilities":{"pgsizes":' + b"9" * 3000 + b"}}", "pgsizes is 9999"),
        (b" " * 4093, "VERSION: 4097 bytes, limit 4096"),
    ],
    ids=lambda value: value[:40],
)
def test_a_version_that_cannot_be_is_refused(text, named):
    with pytest.raises(ProtocolError, match=re.escape(named)):
        decode_version(version(text))


def test_a_version_is_short_enough_for_qemu():
    most = Capabilities(max_msg_fds=16, max_data_xfer_size=64 << 20, max_dma_maps=65535, pgsizes=1 << 30, write_multiple=True)
    payload = encode_version(vfio_user.Version(), most, limit=MAX_SERVER_PAYLOAD)
    assert len(payload) + 16 <= 214
    assert payload.endswith(b"\0")
    assert decode_version(payload) == (vfio_user.Version(), most)
    with pytest.raises(UsageError, match="bytes, limit 20"):
        encode_version(vfio_user.Version(), most, limit=20)


def test_this_machine_has_the_protocols_byte_order():
    """Header and structures are in the host's order, and encoded as little-endian ones."""
    assert bytes(ctypes.c_uint32(1)) == b"\1\0\0\0"
