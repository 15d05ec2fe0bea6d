"""What lies in a VMBus ring: the control page, and the packets in the data behind it.

A channel has two rings, one each way. A ring is one control page of 4096 bytes and then its data, a multiple
of 4096. Indices count bytes from the beginning of the data and wrap around. Equal indices mean empty, so a
ring is never filled to the last byte. A packet is a descriptor, perhaps a list of pages or ranges, and the
payload, padded to 8 bytes. Behind it stand 8 bytes of footer that are in no length field.

Sources: include/linux/hyperv.h (hv_ring_buffer, vmpacket_descriptor and what follows it) and
drivers/hv/ring_buffer.c (footer, who sets which field) of Linux 6.12.
"""

from dataclasses import dataclass
from typing import Annotated

from vfio_vmbus.errors import RingError, UsageError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.gpa import PAGE_SIZE, PageRange, decode_ranges, encode_ranges
from vfio_vmbus.wire.layout import U8, U16, U32, U64, Array, Buffer, Int, Raw, Struct, Tail, get_many, struct

CONTROL_PAGE_SIZE = PAGE_SIZE
PACKET_ALIGNMENT = 8
FOOTER_SIZE = 8
MAX_PACKET_SIZE = 0xFFFF * 8  # length8 is 16 bits; the footer is not in it

PACKET_SYNCH = 0x1
PACKET_ADD_XFER_PAGESET = 0x2
PACKET_RM_XFER_PAGESET = 0x3
PACKET_ESTABLISH_GPADL = 0x4
PACKET_TEARDOWN_GPADL = 0x5
PACKET_INBAND = 0x6
PACKET_XFER_PAGES = 0x7
PACKET_GPADL = 0x8
PACKET_GPA_DIRECT = 0x9
PACKET_CANCEL_REQUEST = 0xA
PACKET_COMPLETION = 0xB
PACKET_ADDITIONAL_PACKETS = 0xC
PACKET_ADDITIONAL_DATA = 0xD

FLAG_COMPLETION_REQUESTED = 1

MAX_PAGE_BUFFERS = 32  # ranges that Linux puts into one GPA-direct packet
MAX_TRANSFER_RANGES = (MAX_PACKET_SIZE - 24) // 8


class RingFeatures(BitField, width=32):
    """Set by the end that sends on a ring; both ends look at the other's."""

    pending_send_size = Bits(0)  # it sets pending_send_size when it waits for room, and wants a signal then


@struct(size=4096)
class RingControl(Struct):
    """The first page of a ring: struct hv_ring_buffer with 4096-byte pages."""

    write_index: U32 = 0  # the sender's; bytes
    read_index: U32 = 0  # the receiver's; bytes
    interrupt_mask: U32 = 0  # the receiver's: 1 when it needs no signal for new packets
    pending_send_size: U32 = 0  # the sender's: bytes it waits for room of, 0 when it does not wait
    reserved1: Annotated[tuple[int, ...], Array(U32, 12)] = (0,) * 12
    features: RingFeatures = RingFeatures(0)
    reserved2: Annotated[bytes, Raw(4028)] = bytes(4028)


# The same as plain numbers, for kernels. Offsets in bytes from the beginning of the control page.
RING_WRITE_INDEX = RingControl.OFFSETS["write_index"]
RING_READ_INDEX = RingControl.OFFSETS["read_index"]
RING_INTERRUPT_MASK = RingControl.OFFSETS["interrupt_mask"]
RING_PENDING_SEND_SIZE = RingControl.OFFSETS["pending_send_size"]
RING_FEATURES = RingControl.OFFSETS["features"]
FEATURE_PENDING_SEND_SIZE = RingFeatures.pending_send_size.mask


@struct(size=16)
class PacketHeader(Struct):
    """struct vmpacket_descriptor. `offset8` and `length8` count 8-byte units from the header's beginning."""

    packet_type: U16 = 0
    offset8: U16 = 0  # where the payload begins
    length8: U16 = 0  # where it ends
    flags: U16 = 0
    transaction_id: U64 = 0


@struct(size=8)
class PacketFooter(Struct):
    """Stands behind every packet: where that packet began. Readers may ignore it."""

    reserved: U32 = 0
    start_offset: U32 = 0  # bytes into the data


@struct(size=24)
class GpaDirectHeader(Struct):
    """Begins a GPA-direct packet; the page list (wire/gpa.py) follows, up to `header.offset8`."""

    header: PacketHeader = PacketHeader(packet_type=PACKET_GPA_DIRECT)
    reserved: U32 = 0
    range_count: U32 = 0


@struct(size=16)
class PageBuffer(Struct):
    """One range of one page, the form for arrays of them: struct hv_page_buffer."""

    byte_count: U32 = 0
    byte_offset: U32 = 0
    pfn: U64 = 0


@struct(size=8)
class TransferRange(Struct):
    """A part of a shared buffer (the receive buffer of a network card)."""

    byte_count: U32 = 0
    byte_offset: U32 = 0


@struct(size=24)
class TransferPagesHeader(Struct):
    """A transfer-page packet's header with its ranges. `pageset_id` names the shared buffer."""

    header: PacketHeader = PacketHeader(packet_type=PACKET_XFER_PAGES)
    pageset_id: U16 = 0
    sender_owns_set: U8 = 0
    reserved: U8 = 0
    range_count: U32 = 0
    ranges: Annotated[tuple[TransferRange, ...], Tail(TransferRange, count="range_count", limit=MAX_TRANSFER_RANGES)] = ()


def padded(size: int) -> int:
    """`size` in bytes, rounded up to the alignment of packets."""
    return (size + PACKET_ALIGNMENT - 1) & -PACKET_ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Packet:
    """A packet outside of a ring. `pages` belong to GPA-direct, `pageset_id` and `ranges` to transfer pages.

    The payload's length is known to 8 bytes only: up to 7 zeros stand behind what was sent.
    """

    packet_type: int = PACKET_INBAND
    transaction_id: int = 0
    completion_requested: bool = False
    pages: tuple[PageRange, ...] = ()
    pageset_id: int = 0
    ranges: tuple[TransferRange, ...] = ()
    payload: bytes = b""

    def pack(self) -> bytes:
        """Header, lists and payload, padded, without the footer. UsageError where something does not fit."""
        lists = self._lists()
        payload = self.payload.ljust(padded(len(self.payload)), b"\0")
        size = PacketHeader.SIZE + len(lists) + len(payload)
        if size > MAX_PACKET_SIZE:
            raise UsageError(f"packet of {size} bytes, limit {MAX_PACKET_SIZE}")
        header = PacketHeader(
            packet_type=self.packet_type,
            offset8=(PacketHeader.SIZE + len(lists)) // 8,
            length8=size // 8,
            flags=FLAG_COMPLETION_REQUESTED if self.completion_requested else 0,
            transaction_id=self.transaction_id,
        )
        return header.pack() + lists + payload

    def _lists(self) -> bytes:
        if self.packet_type == PACKET_GPA_DIRECT:
            words = encode_ranges(self.pages)
            head = GpaDirectHeader(range_count=len(self.pages)).pack()[PacketHeader.SIZE :]
            return head + b"".join(word.to_bytes(8, "little") for word in words)
        if self.packet_type == PACKET_XFER_PAGES:
            whole = TransferPagesHeader(pageset_id=self.pageset_id, range_count=len(self.ranges), ranges=self.ranges)
            return whole.pack()[PacketHeader.SIZE :]
        return b""


def parse_packet(data: Buffer) -> Packet:
    """Decode a packet that begins at `data`'s first byte; what stands behind its length is ignored.

    `data` must be a copy that the peer cannot change. Raises RingError for lengths that cannot be, and
    ProtocolError for lists that do not add up.
    """
    header = PacketHeader.unpack(data)
    start, end = header.offset8 * 8, header.length8 * 8
    if not PacketHeader.SIZE <= start <= end <= len(data):
        raise RingError(
            f"packet type {header.packet_type:#x}: payload at {start} to {end} of {len(data)} bytes, "
            f"need {PacketHeader.SIZE} <= begin <= end <= {len(data)}"
        )
    pages: tuple[PageRange, ...] = ()
    pageset_id = 0
    ranges: tuple[TransferRange, ...] = ()
    if header.packet_type == PACKET_GPA_DIRECT:
        fixed = GpaDirectHeader.unpack(data[:start])
        words = get_many(Int("Q"), data, GpaDirectHeader.SIZE, (start - GpaDirectHeader.SIZE) // 8)
        pages = decode_ranges(words, fixed.range_count)
    elif header.packet_type == PACKET_XFER_PAGES:
        transfer = TransferPagesHeader.unpack(data[:start])
        pageset_id, ranges = transfer.pageset_id, transfer.ranges
    return Packet(
        packet_type=header.packet_type,
        transaction_id=header.transaction_id,
        completion_requested=bool(header.flags & FLAG_COMPLETION_REQUESTED),
        pages=pages,
        pageset_id=pageset_id,
        ranges=ranges,
        payload=bytes(data[start:end]),
    )
