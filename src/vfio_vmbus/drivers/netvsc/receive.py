"""Receiving: frames are handed out where they lie in the receive buffer; their transfer is completed at the next call.

The host is not trusted: ranges, lengths and transaction numbers are read once and checked; whatever is wrong is counted and
completed, so that the host gets its sections back, and never reaches the application.
"""

from __future__ import annotations

from typing import Any

from ...dataplane.rndis import NOT_A_PACKET, parse, parsed_at
from ...memory.access import copy, inline, load16, load32, load64, store64, viewer
from ...ring.primitives import (
    in_commit,
    in_header,
    in_ready,
    in_skip,
    out_begin,
    out_end,
    out_publish,
    packet_flags,
    packet_length,
    packet_offset,
    packet_type,
    ring_at,
)
from ...wire import nvsp
from ...wire import ring as wire_ring
from ...wire.frame import RxChecksum
from .state import (
    BAD_IP_CHECKSUM,
    BAD_L4_CHECKSUM,
    DONE_SLOTS,
    FRAME,
    GOOD_IP_CHECKSUM,
    GOOD_L4_CHECKSUM,
    MAIL_SLOT,
    MAIL_SLOTS,
    QUEUE,
)
from .transmit import FRAME_SIZE, tx_completed

_L4_FAILED = RxChecksum.tcp_failed.mask | RxChecksum.udp_failed.mask
_L4_SUCCEEDED = RxChecksum.tcp_succeeded.mask | RxChecksum.udp_succeeded.mask
_IP_FAILED = RxChecksum.ip_failed.mask
_IP_SUCCEEDED = RxChecksum.ip_succeeded.mask
_XFER_PAGES = wire_ring.PACKET_XFER_PAGES
_COMPLETION = wire_ring.PACKET_COMPLETION
_RECEIVE_BUFFER_ID = nvsp.RECEIVE_BUFFER_ID
_SEND_RNDIS_COMPLETE = nvsp.SEND_RNDIS_PACKET_COMPLETE
_COMPLETION_SIZE = 16 + 8 + 8
_KEPT_FREE = 64 + 32

queue_at = viewer(QUEUE)
frame_at = viewer(FRAME)


@inline
def _checked(info: int) -> int:
    """What the host says of a received frame's checksums, as GOOD_* and BAD_* bits (NDIS_TCP_IP_CHECKSUM_PACKET_INFO, receive)."""
    if info <= 0:
        return 0
    flags = 0
    if info & _L4_FAILED != 0:
        flags |= BAD_L4_CHECKSUM
    elif info & _L4_SUCCEEDED != 0:
        flags |= GOOD_L4_CHECKSUM
    if info & _IP_FAILED != 0:
        flags |= BAD_IP_CHECKSUM
    elif info & _IP_SUCCEEDED != 0:
        flags |= GOOD_IP_CHECKSUM
    return flags


@inline
def _to_mail(queue: Any, message: int, limit: int) -> None:
    """Keep a copy of an RNDIS control message for Python."""
    size = (load64(message) >> 32) & 0xFFFFFFFF
    if size < 8 or size > limit or size > MAIL_SLOT - 8 or queue.mail_put - queue.mail_taken >= MAIL_SLOTS:
        queue.mail_lost += 1
        return
    place = queue.mail + (queue.mail_put % MAIL_SLOTS) * MAIL_SLOT
    store64(place, size)
    copy(place + 8, message, size)
    queue.mail_put += 1


@inline
def _take_range(queue: Any, packet: int, index: int, table: int, count: int) -> int:
    """One range of a transfer: its frame goes to `table[count]`. The new count."""
    word = load64(packet + 24 + 8 * index)
    size = word & 0xFFFFFFFF
    offset = (word >> 32) & 0xFFFFFFFF
    if offset + size > queue.receive_size:
        queue.rx_bad_ranges += 1
        return count
    message = queue.receive + offset
    rule = parse(queue.parsed, message, 0, size, queue.longest)
    if rule != 0:
        if rule == NOT_A_PACKET:
            _to_mail(queue, message, size)
        else:
            queue.last_rule = rule
            queue.rx_bad_messages += 1
        return count
    out = parsed_at(queue.parsed)
    frame = frame_at(table + count * FRAME_SIZE)
    frame.address = out.address
    frame.size = out.size
    frame.flags = _checked(out.checksum)
    frame.checksum = 0
    queue.rx_frames += 1
    queue.rx_bytes += out.size
    return count + 1


@inline
def _ranges_of(queue: Any, packet: int, header: int) -> int:
    """The number of ranges of a transfer-page packet of the receive buffer; 0, counted, for any other."""
    ranges = load32(packet + 20)
    if load16(packet + 16) != _RECEIVE_BUFFER_ID or ranges == 0 or 24 + 8 * ranges > packet_offset(header):
        queue.rx_bad_ranges += 1
        return 0
    return ranges


@inline
def rx_release(queue: Any) -> int:
    """Complete the transfers whose frames were handed out. 1 when all are, 0 when the ring had no room for some."""
    ring = ring_at(queue.outgoing)
    while queue.done_count > 0:
        packet = out_begin(ring, _COMPLETION_SIZE + _KEPT_FREE)
        if packet == 0:
            break
        queue.done_count -= 1
        store64(packet, _COMPLETION | 2 << 16 | 3 << 32)
        store64(packet + 8, load64(queue.done + queue.done_count * 8))
        store64(packet + 16, _SEND_RNDIS_COMPLETE | 1 << 32)
        out_end(ring, _COMPLETION_SIZE)
    out_publish(ring)
    if ring.broken != 0:
        queue.attention = 1
    return 1 if queue.done_count == 0 else 0


@inline
def _take(queue: Any, table: int, capacity: int) -> int:
    """Work through the ring until there are `capacity` frames, or something that needs more room or Python."""
    ring = ring_at(queue.incoming)
    count = 0
    while queue.attention == 0 and queue.done_count < DONE_SLOTS and in_ready(ring):
        header = in_header(ring)
        if header < 0:
            break
        packet = ring.data + ring.index
        offset = packet_offset(header)
        kind = packet_type(header)
        if kind == _XFER_PAGES and packet_length(header) >= 24:
            if count >= capacity:
                break
            ranges = _ranges_of(queue, packet, header)
            index = queue.resume
            while index < ranges and count < capacity:
                count = _take_range(queue, packet, index, table, count)
                index += 1
            queue.resume = index if index < ranges else 0
            if index < ranges:
                break
            if packet_flags(header) & 1 != 0:
                store64(queue.done + queue.done_count * 8, load64(packet + 8))
                queue.done_count += 1
        elif kind == _COMPLETION and packet_length(header) - offset >= 8 and load32(packet + offset) == _SEND_RNDIS_COMPLETE:
            tx_completed(queue, load64(packet + 8), load32(packet + offset + 4))
        else:
            queue.attention = 1
            break
        in_skip(ring, header)
    in_commit(ring)
    if ring.broken != 0:
        queue.attention = 1
    return count


@inline
def rx_burst(queue: Any, table: int, capacity: int) -> int:
    """Up to `capacity` received frames into `table`, in place, until the next call; the frames of the call before go back."""
    rx_release(queue)
    return _take(queue, table, capacity)


@inline
def tx_reap(queue: Any) -> None:
    """Take completions of what was sent, as far as no received frame stands before them."""
    _take(queue, 0, 0)
