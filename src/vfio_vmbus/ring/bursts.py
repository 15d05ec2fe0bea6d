"""Kernels over tables of packets: send a burst, receive one with copy or in place, and one packet at a time.

All arguments are int64: addresses of a RING record, of private memory and of a table of PACKET rows, and counts. The Python
ends (`ends`) call these; a data plane that does more with a packet is made of `primitives` instead.

A row describes a packet in memory of `limit` bytes: `length` bytes of data at `offset`, and in the `header - 16` bytes in front
of them what stands between a packet's 16-byte descriptor and its data (the ranges of a GPA-direct packet; nothing for in-band
ones, whose `header` is 16). Rows that were received can thus be sent again as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..memory.access import copy, inline, load64, store64, viewer
from ..memory.kernel import kernel, step
from ..wire.ring import MAX_PACKET_SIZE
from .primitives import (
    FOOTER,
    HEADER,
    in_commit,
    in_header,
    in_mask,
    in_ready,
    in_skip,
    out_begin,
    out_end,
    out_look,
    out_publish,
    out_want,
    packet_flags,
    packet_length,
    packet_offset,
    packet_type,
    ring_at,
    signal,
)

PACKET = np.dtype(
    [
        ("offset", "i8"),  # of the data, in bytes from the start of the memory (in place: of the ring's data area)
        ("length", "i8"),  # bytes of data; received, always a multiple of 8: VMBus tells no finer
        ("trans_id", "i8"),  # the 64 bits that a completion echoes, as a signed number
        ("kind", "i8"),  # type of the packet, 16 bits
        ("flags", "i8"),  # 15 bits
        ("header", "i8"),  # bytes of the packet in front of its data: 16, or more by multiples of 8
    ]
)
"""One packet of a burst."""

MAX_PACKET = MAX_PACKET_SIZE
"""Bytes of the longest packet, descriptor and data."""
_ROW = PACKET.itemsize

packet_at = viewer(PACKET)


@inline
def packet_word(kind: int, header: int, length: int, flags: int) -> int:
    """The first 64 bits of a packet's descriptor; `header` and `length` (of the whole packet) are multiples of 8."""
    return kind | header << 13 | length << 29 | flags << 48


@inline
def _possible(row: Any, limit: int) -> bool:
    """Is this row a packet, and within memory of `limit` bytes?"""
    offset, length, header, after = row.offset, row.length, row.header, limit - row.offset
    if offset < 0 or length < 0 or length > after or row.kind & ~0xFFFF != 0 or row.flags & ~0x7FFF != 0:
        return False
    return length <= MAX_PACKET and HEADER <= header <= MAX_PACKET - length and header & 7 == 0 and header - HEADER <= offset


@inline
def _note(row: Any, header: int, place: int, offset: int) -> None:
    """Fill a row from a checked header; the transaction id is at `place` + 8."""
    row.offset = offset
    row.length = packet_length(header) - packet_offset(header)
    row.trans_id = load64(place + 8)
    row.kind = packet_type(header)
    row.flags = packet_flags(header)
    row.header = packet_offset(header)


@inline
def send_rows(ring: Any, memory: int, table: int, count: int) -> int:
    """Send `count` rows that are known to be packets; how many were sent: fewer when the ring is full."""
    sent = 0
    while sent < count:
        row = packet_at(table + sent * _ROW)
        offset, length, header = row.offset, row.length, row.header
        whole = (header + length + 7) & ~7
        place = out_begin(ring, whole + FOOTER)
        if place == 0:
            break
        store64(place, packet_word(row.kind, header, whole, row.flags))
        store64(place + 8, row.trans_id)
        if length & 7 != 0:
            store64(place + whole - 8, 0)
        extra = header - HEADER
        copy(place + HEADER, memory + offset - extra, extra + length)
        out_end(ring, whole + FOOTER)
        sent += 1
    out_publish(ring)
    return sent


@inline
def take(ring: Any, header: int, row: Any, memory: int, used: int) -> int:
    """Copy the packet with this checked header to `used` bytes behind `memory`, and note it in a row; the bytes it took."""
    place = ring.data + ring.index
    size = packet_length(header) - HEADER
    _note(row, header, place, used + packet_offset(header) - HEADER)
    copy(memory + used, place + HEADER, size)
    return size


@inline
def receive_rows(ring: Any, memory: int, limit: int, table: int, count: int) -> int:
    """Copy up to `count` packets into `memory`, one behind the other, and give their space back; how many.

    Stops early at a packet that does not fit into the rest of `limit` bytes, and at the first that breaks a rule.
    """
    received = used = 0
    while received < count and in_ready(ring):
        header = in_header(ring)
        if header < 0 or packet_length(header) - HEADER > limit - used:
            break
        used += take(ring, header, packet_at(table + received * _ROW), memory, used)
        in_skip(ring, header)
        received += 1
    in_commit(ring)
    return received


@step("i8(i8, i8, i8, i8, i8)")
def send_burst(ring_address: int, memory: int, limit: int, table: int, count: int) -> int:
    """Send `count` rows; how many were sent: fewer when the ring is full. Minus (row + 1) for a row that is no packet.

    The rows in front of such a one are sent; it and those behind it are not.
    """
    good = 0
    while good < count and _possible(packet_at(table + good * _ROW), limit):
        good += 1
    sent = send_rows(ring_at(ring_address), memory, table, good)
    return sent if sent < good or good == count else -(good + 1)


@step("i8(i8, i8, i8, i8, i8)")
def receive_burst(ring_address: int, memory: int, limit: int, table: int, count: int) -> int:
    """`receive_rows`, called from Python."""
    return receive_rows(ring_at(ring_address), memory, limit, table, count)


@step("i8(i8, i8, i8)")
def receive_in_place(ring_address: int, table: int, count: int) -> int:
    """Note up to `count` packets where they lie: offsets into the data area. Their space stays taken until `commit`.

    The other side can change what lies there at any time: read it once.
    """
    ring = ring_at(ring_address)
    received = 0
    while received < count and in_ready(ring):
        header = in_header(ring)
        if header < 0:
            break
        offset = ring.index
        _note(packet_at(table + received * _ROW), header, ring.data + offset, offset + packet_offset(header))
        in_skip(ring, header)
        received += 1
    return received


@step("i8(i8)")
def commit(ring_address: int) -> int:
    """Give the space of everything received in place back to the writer; 1 if that was worth a signal."""
    return in_commit(ring_at(ring_address))


@kernel("i8(i8, i8, i8)")
def send_packet(ring_address: int, packet: int, length: int) -> int:
    """Send one finished packet, descriptor included, of `length` bytes (a multiple of 8, up to MAX_PACKET); 0 when full."""
    ring = ring_at(ring_address)
    place = out_begin(ring, length + FOOTER)
    if place == 0:
        return 0
    copy(place, packet, length)
    out_end(ring, length + FOOTER)
    out_publish(ring)
    return 1


@kernel("i8(i8)")
def next_header(ring_address: int) -> int:
    """The checked first 64 bits of the next packet, which lies at data + index; 0 when there is none, -1 when it breaks a rule.

    No packet's descriptor begins with 0: its length would be.
    """
    ring = ring_at(ring_address)
    return in_header(ring) if in_ready(ring) else 0


@kernel("i8(i8, i8)")
def finish(ring_address: int, header: int) -> int:
    """Step over the packet with this checked header and give its space back; 1 if that was worth a signal."""
    ring = ring_at(ring_address)
    in_skip(ring, header)
    return in_commit(ring)


@step("i8(i8)")
def room(ring_address: int) -> int:
    """Bytes free after a new look at the reader's index; a packet fits when it takes less, its footer counted."""
    ring = ring_at(ring_address)
    return out_look(ring) if ring.broken == 0 else 0


@step("i8(i8, i8)")
def want(ring_address: int, size: int) -> int:
    """Ask the reader for a signal when more than `size` bytes become free (0: no more), and look: bytes free now."""
    ring = ring_at(ring_address)
    out_want(ring, size)
    return out_look(ring) if ring.broken == 0 else 0


@kernel("i8(i8, i8)")
def mask(ring_address: int, masked: int) -> int:
    """Tell the writer not to signal (1) or to signal (0), and look: is there something to read?"""
    ring = ring_at(ring_address)
    in_mask(ring, masked)
    return 1 if in_ready(ring) else 0


@step("void(i8)")
def ring_doorbell(ring_address: int) -> None:
    """Signal the other side, whether it needs to know or not."""
    signal(ring_at(ring_address))
