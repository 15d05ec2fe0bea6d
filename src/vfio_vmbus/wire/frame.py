"""Data messages of RNDIS: a frame with its per-packet information (PPI).

Source: drivers/net/hyperv/hyperv_net.h, rndis_filter.c and netvsc_drv.c of Linux 6.12. The data path has
kernels of its own; what stands here is their oracle, and where their offsets and masks come from.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.layout import U8, U16, U32, Buffer, Struct, struct
from vfio_vmbus.wire.rndis import OFFSET_BASE, PacketMessage, bytes_at, parse_message
from vfio_vmbus.wire.table import Side

# Types of per-packet information.
PPI_CHECKSUM = 0  # TxChecksum from the guest, RxChecksum from the host
PPI_IPSEC = 1
PPI_LARGE_SEND = 2  # LargeSend
PPI_VLAN = 6  # Vlan
PPI_HASH = 8  # u32
PPI_INTERNAL_PACKET_ID = 1  # PacketId, with the internal bit


class TxChecksum(BitField, width=32):
    """What the host shall compute. `tcp_header_offset` is in bytes from the frame's beginning."""

    is_ipv4 = Bits(0)
    is_ipv6 = Bits(1)
    tcp_checksum = Bits(2)
    udp_checksum = Bits(3)
    ip_header_checksum = Bits(4)
    tcp_header_offset = Bits(16, 10)


class RxChecksum(BitField, width=32):
    """What the host found."""

    tcp_failed = Bits(0)
    udp_failed = Bits(1)
    ip_failed = Bits(2)
    tcp_succeeded = Bits(3)
    udp_succeeded = Bits(4)
    ip_succeeded = Bits(5)
    loopback = Bits(6)
    tcp_value_invalid = Bits(7)
    ip_value_invalid = Bits(8)


class LargeSend(BitField, width=32):
    """Large send version 2: the host cuts the frame into segments of `mss` bytes of payload."""

    mss = Bits(0, 20)
    tcp_header_offset = Bits(20, 10)
    version_2 = Bits(30)
    is_ipv6 = Bits(31)


class Vlan(BitField, width=32):
    """The VLAN tag, taken out of the frame."""

    priority = Bits(0, 3)
    canonical_format = Bits(3)
    vlan_id = Bits(4, 12)


class PacketIdFlags(BitField, width=8):
    """Which part of a coalesced frame this is."""

    sub_allocation = Bits(0)
    first = Bits(1)
    last = Bits(2)


@struct(size=4)
class PacketId(Struct):
    """Holds the parts of a coalesced frame together (NVSP 6.1)."""

    version: U8 = 1
    flags: PacketIdFlags = PacketIdFlags(0)
    packet_id: U16 = 0


class PpiKind(BitField, width=32):
    """Type of a per-packet information; internal ones have numbers of their own."""

    number = Bits(0, 31)
    internal = Bits(31)


@struct(size=12)
class PpiHeader(Struct):
    """Begins a per-packet information. `size` is all of it, `offset` where its data begins, both in bytes."""

    size: U32 = 0
    kind: PpiKind = PpiKind(0)
    offset: U32 = 12


@dataclass(frozen=True)
class PacketInfo:
    """One per-packet information: `number` is a PPI_ constant, `data` what stands behind the header."""

    number: int
    data: bytes
    internal: bool = False

    @classmethod
    def word(cls, number: int, value: int) -> "PacketInfo":
        """One whose data is a 32-bit integer or bit field."""
        return cls(number, int(value).to_bytes(4, "little"))


@dataclass(frozen=True)
class Frame:
    """A data message: the frame and what is known about it."""

    data: bytes
    infos: tuple[PacketInfo, ...] = ()


def encode_packet(frame: Frame, *, align: int = 1) -> bytes:
    """A data message, padded so that its length is a multiple of `align` bytes."""
    ppis = b"".join(_encode_info(info) for info in frame.infos)
    length = PacketMessage.SIZE + len(ppis) + len(frame.data)
    padding = -length % align
    message = PacketMessage(
        message_length=length + padding,
        data_offset=PacketMessage.SIZE - OFFSET_BASE + len(ppis),
        data_length=len(frame.data),
        ppi_offset=PacketMessage.SIZE - OFFSET_BASE if ppis else 0,
        ppi_length=len(ppis),
    )
    return message.pack() + ppis + frame.data + bytes(padding)


def _encode_info(info: PacketInfo) -> bytes:
    kind = PpiKind.of(number=info.number, internal=int(info.internal))
    return PpiHeader(size=PpiHeader.SIZE + len(info.data), kind=kind).pack() + info.data


def parse_packet(data: Buffer) -> Frame:
    """Decode a data message. Raises ProtocolError for offsets, lengths and sizes that cannot be."""
    message, _ = parse_message(data, sender=Side.BOTH)
    if not isinstance(message, PacketMessage):
        raise ProtocolError(f"{type(message).__name__} where a data message was expected")
    frame = bytes_at(data, message, "data", message.data_offset, message.data_length)
    if message.ppi_offset == 0:
        return Frame(frame)
    ppis = bytes_at(data, message, "per-packet information", message.ppi_offset, message.ppi_length)
    return Frame(frame, tuple(_parse_infos(ppis)))


def _parse_infos(ppis: bytes) -> Iterator[PacketInfo]:
    at = 0
    while at < len(ppis):
        head = PpiHeader.unpack(ppis, at)
        if not PpiHeader.SIZE <= head.size <= len(ppis) - at:
            raise ProtocolError(f"PpiHeader: size {head.size}, need {PpiHeader.SIZE}..{len(ppis) - at}")
        if not PpiHeader.SIZE <= head.offset <= head.size:
            raise ProtocolError(f"PpiHeader: offset {head.offset}, need {PpiHeader.SIZE}..{head.size}")
        yield PacketInfo(head.kind.number, ppis[at + head.offset : at + head.size], bool(head.kind.internal))
        at += head.size
