"""Fuzz targets of the parsers in wire/. Each takes any bytes; its docstring is what must hold for all of them.

Parsers may raise ProtocolError and nothing else. SEEDS are good messages, for a fuzzer to begin with.
"""

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire import dm, frame, gpa, ndis, nvsp, ring, rndis, vfio, vfio_user, vfio_user_version, vmbus
from vfio_vmbus.wire.table import Side

_PAGES = gpa.single_pages(0x1234, 9000)
_INFOS = (frame.PacketInfo.word(frame.PPI_VLAN, 7), frame.PacketInfo(frame.PPI_INTERNAL_PACKET_ID, bytes(4), True))
SEEDS = [
    *(kind().pack() for kind in vmbus.TABLE),
    vmbus.GpadlHeader(range_bytes=24, range_count=1, words=(8192, 1, 2)).pack(),
    vmbus.GpadlBody(words=(1, 2, 3)).pack(),
    *(nvsp.encode_message(kind()) for kind in nvsp.TABLE),
    nvsp.SendReceiveBufferComplete(section_count=1, sections=(nvsp.ReceiveSection(),)).pack(),
    nvsp.encode_indirection_table(range(16)),
    *(rndis.encode_message(kind()) for kind in rndis.TABLE),
    rndis.encode_message(rndis.QueryComplete(), ndis.Offload(header=ndis.ObjectHeader(size=156)).pack()),
    *(dm.encode_message(kind()) for kind in dm.TABLE),
    dm.encode_message(dm.BalloonResponse(flags=dm.RangesBefore.of(range_count=2), ranges=(dm.PageSpan(1), dm.PageSpan(2)))),
    dm.encode_message(dm.UnballoonRequest(range_count=1, ranges=(dm.PageSpan.of(start_page=5, page_count=3),))),
    dm.encode_message(dm.InfoMessage(info_size=16), dm.InfoHeader(data_size=8).pack() + bytes(8)),
    frame.encode_packet(frame.Frame(bytes(60), _INFOS), align=8) * 2,
    ring.Packet(payload=bytes(40)).pack(),
    ring.Packet(packet_type=ring.PACKET_GPA_DIRECT, pages=_PAGES, payload=bytes(40)).pack(),
    ring.Packet(packet_type=ring.PACKET_XFER_PAGES, ranges=(ring.TransferRange(),) * 3, payload=bytes(40)).pack(),
    *(
        vfio_user.encode_request(1, number, command.request.kind().pack() if command.request.kind else b"")
        for number, command in vfio_user.COMMANDS.items()
    ),
    vfio_user.encode_request(2, vfio_user.REGION_WRITE, vfio_user.RegionAccess(count=4).pack() + bytes(4)),
    vfio_user.encode_request(
        3, vfio_user.REGION_WRITE_MULTI, vfio_user.WriteMulti(count=1, writes=(vfio_user.WriteEntry(),)).pack()
    ),
    vfio_user.encode_request(
        4, vfio_user.DEVICE_SET_IRQS, vfio.IrqSet(flags=vfio.SET_DATA_BOOL | vfio.SET_ACTION_TRIGGER, count=3).pack() + bytes(3)
    ),
    vfio_user.encode_error(vfio_user.Header(command=vfio_user.DMA_MAP), 22),
    vfio_user_version.encode_version(vfio_user.Version(), vfio_user_version.Capabilities()),
]


def fuzz_vmbus_message(data: bytes) -> None:
    """A VMBus message that is taken encodes to the bytes that it came from."""
    try:
        message = vmbus.parse_message(data)
    except ProtocolError:
        return
    packed = message.pack()
    assert data.startswith(packed)
    assert vmbus.parse_message(packed) == message


def fuzz_page_list(data: bytes) -> None:
    """A page list that is taken has the pages that its byte counts need, and encodes to the same words."""
    words = tuple(int.from_bytes(data[at : at + 8], "little") for at in range(1, len(data) - 7, 8))
    try:
        ranges = gpa.decode_ranges(words, data[0] if data else 0)
    except ProtocolError:
        return
    assert sum(len(item.pfns) for item in ranges) + len(ranges) == len(words)
    assert gpa.encode_ranges(ranges) == words


def fuzz_ring_packet(data: bytes) -> None:
    """A packet that is taken lies within the bytes given, and its encoding is taken as the same packet."""
    try:
        packet = ring.parse_packet(data)
    except ProtocolError:
        return
    assert len(packet.payload) <= len(data) - ring.PacketHeader.SIZE
    assert ring.parse_packet(packet.pack()) == packet


def fuzz_nvsp_message(data: bytes) -> None:
    """An NVSP message that is taken from either side encodes to the bytes that it came from."""
    for sender in (Side.GUEST, Side.HOST):
        try:
            message = nvsp.parse_message(data, sender=sender)
        except ProtocolError:
            continue
        assert data.startswith(message.pack())


def fuzz_indirection_table(data: bytes) -> None:
    """An indirection table that is taken has 16 entries, all from behind the message's fixed part."""
    for version in (nvsp.VERSION_5, nvsp.VERSION_6_1):
        try:
            table = nvsp.decode_indirection_table(data, version)
        except ProtocolError:
            continue
        assert len(table) == nvsp.SEND_TABLE_SIZE
        assert b"".join(entry.to_bytes(4, "little") for entry in table) in data[nvsp.SendIndirectionTable.SIZE :]


def fuzz_dm_message(data: bytes) -> None:
    """A message of dynamic memory that is taken is as long as it says, and encodes to the bytes that it came from."""
    for sender in (Side.GUEST, Side.HOST):
        try:
            message = dm.parse_message(data, sender=sender)
        except ProtocolError:
            continue
        assert message.nbytes <= message.size <= len(data)
        assert data.startswith(message.pack())


def fuzz_dm_info(data: bytes) -> None:
    """What an InfoMessage says comes out of its bytes, and is as long as it says."""
    try:
        header, value = dm.parse_info(data)
    except ProtocolError:
        return
    assert len(value) == header.data_size
    assert value in data[dm.InfoMessage.SIZE + header.SIZE :]


def fuzz_rndis_message(data: bytes) -> None:
    """An RNDIS message that is taken is no longer than the bytes given, and its information comes out of it."""
    for sender in (Side.GUEST, Side.HOST):
        try:
            message, info = rndis.parse_message(data, sender=sender)
        except ProtocolError:
            continue
        assert message.SIZE <= message.message_length <= len(data)
        assert info in data[message.SIZE : message.message_length]


def fuzz_rndis_row(data: bytes) -> None:
    """A row of RNDIS messages is split without a gap until the first that cannot be."""
    at = 0
    try:
        for part in rndis.split_messages(data):
            assert bytes(part) == data[at : at + len(part)]
            at += len(part)
    except ProtocolError:
        assert at < len(data)
        return
    assert at == len(data)


def fuzz_frame(data: bytes) -> None:
    """A frame that is taken comes out of the bytes given, and its encoding is taken as the same frame."""
    try:
        found = frame.parse_packet(data)
    except ProtocolError:
        return
    assert found.data in data
    assert frame.parse_packet(frame.encode_packet(found)) == found


def fuzz_offload(data: bytes) -> None:
    """Capabilities that are taken are as long as they say, and zero behind that."""
    try:
        offload = ndis.parse_offload(data)
    except ProtocolError:
        return
    packed = offload.pack()
    size = min(offload.header.size, len(packed))
    assert packed[:size] == data[:size]
    assert not any(packed[size:])


def fuzz_vfio_user_message(data: bytes) -> None:
    """A vfio-user command or reply that is taken is its header, its structure and the data behind it, and nothing else."""
    try:
        header = vfio_user.parse_header(data, 1 << 20)
        payload = data[header.SIZE : header.message_size]
        parse = vfio_user.parse_reply if header.flags.kind == vfio_user.KIND_REPLY else vfio_user.parse_request
        value, rest = parse(header.command, payload)
    except ProtocolError:
        return
    assert header.pack() + (value.pack() if value is not None else b"") + rest == data[: header.message_size]


def fuzz_vfio_user_version(data: bytes) -> None:
    """Capabilities that are taken are within their limits, and encode to something that is taken as the same."""
    try:
        version, capabilities = vfio_user_version.decode_version(data)
    except ProtocolError:
        return
    for name, (least, most) in vfio_user_version.LIMITS.items():
        assert least <= getattr(capabilities, name) <= most
    packed = vfio_user_version.encode_version(version, capabilities)
    assert vfio_user_version.decode_version(packed) == (version, capabilities)
