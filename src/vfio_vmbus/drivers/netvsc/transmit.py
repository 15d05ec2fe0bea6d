"""Sending: several small frames to a section of the send buffer, long frames GPA-direct out of a pool of slots.

`tx_begin` says where a frame may be written, `tx_commit` takes it as written, `tx_flush` shows all of it to the host.
Nothing is shown before; what the host completes goes back to its free stack (`tx_completed`).
"""

from __future__ import annotations

from typing import Any

from ...dataplane.rndis import PLAIN_ROOM, room_for, write_header
from ...memory.access import copy, inline, load64, prefetch_to_write, store64
from ...ring.primitives import out_begin, out_end, out_publish, ring_at
from ...wire import nvsp
from ...wire import ring as wire_ring
from ...wire.frame import PPI_CHECKSUM
from ...wire.gpa import PAGE_SIZE
from .state import FRAME, QUEUE

_INBAND = wire_ring.PACKET_INBAND
_GPA_DIRECT = wire_ring.PACKET_GPA_DIRECT
_WITH_COMPLETION = wire_ring.FLAG_COMPLETION_REQUESTED << 48
_SEND_RNDIS_PACKET = nvsp.SEND_RNDIS_PACKET
_NO_SECTION = nvsp.NO_SECTION
_NVSP_SIZE = nvsp.MESSAGE_SIZE
_SECTION_PACKET = 16 + _NVSP_SIZE + wire_ring.FOOTER_SIZE
_RESERVED = _SECTION_PACKET + 32
"""Room that other packets leave in the ring, so that an open section can always be sent."""
_AHEAD = 8
"""Frames between the one that is written and the one whose memory is asked for: what lies with the host's core takes its time."""

QUEUE_SIZE = QUEUE.itemsize
FRAME_SIZE = FRAME.itemsize


@inline
def _write_nvsp(at: int, section: int, size: int) -> None:
    store64(at, _SEND_RNDIS_PACKET)
    store64(at + 8, section | size << 32)
    for offset in range(16, _NVSP_SIZE, 8):
        store64(at + offset, 0)


@inline
def tx_close(queue: Any) -> None:
    """Send the section that is being filled, if anything is in it: its packet's room was kept free when it was opened."""
    section = queue.open
    if section < 0 or queue.messages == 0:
        return
    ring = ring_at(queue.outgoing)
    packet = out_begin(ring, _SECTION_PACKET)
    if packet == 0:
        return
    store64(packet, _INBAND | 2 << 16 | 7 << 32 | _WITH_COMPLETION)
    store64(packet + 8, section)
    _write_nvsp(packet + 16, section, queue.used)
    out_end(ring, _SECTION_PACKET)
    store64(queue.busy + section * 8, 1)
    queue.open = -1


@inline
def _ask_for_message(place: int) -> None:
    """Prefetch where a message is to be written: its header, and the first bytes of its frame, which the host looks at, too."""
    prefetch_to_write(place)
    prefetch_to_write(place + PLAIN_ROOM)


@inline
def _ask_for_later(queue: Any, need: int) -> None:
    """A section is begun: prefetch the beginnings of messages in one that will be filled later, if they take `need` bytes, too."""
    fitting = queue.send_section // need
    later = (_AHEAD + fitting - 1) // fitting
    if later > queue.free_count:
        return
    section = queue.send + load64(queue.free + (queue.free_count - later) * 8) * queue.send_section
    for at in range(0, min(_AHEAD, fitting) * need, need):
        _ask_for_message(section + at)


@inline
def _begin_section(queue: Any, need: int) -> int:
    """Where `need` bytes of a section are free, opening another one if need be; 0 when all are with the host."""
    if queue.open >= 0 and (queue.used + need > queue.send_section or queue.messages >= queue.max_messages):
        tx_close(queue)
        if queue.open >= 0:
            return 0
    if queue.open < 0:
        if queue.free_count == 0 or out_begin(ring_at(queue.outgoing), _RESERVED) == 0:
            return 0
        queue.free_count -= 1
        queue.open = load64(queue.free + queue.free_count * 8)
        queue.used = 0
        queue.messages = 0
        _ask_for_later(queue, need)
    place = queue.send + queue.open * queue.send_section + queue.used
    if queue.used + (_AHEAD + 1) * need <= queue.send_section:
        _ask_for_message(place + _AHEAD * need)
    return place


@inline
def tx_begin(queue: Any, size: int, checksum: int) -> int:
    """Where to write a frame of up to `size` bytes (not above `longest`); 0 while nothing is free. Follow with `tx_commit`.

    checksum: what the host is to compute, 0 for nothing; the same for begin and commit.
    """
    room = room_for(checksum)
    need = (room + size + queue.align - 1) & -queue.align
    if need <= queue.send_section:
        message = _begin_section(queue, need)
        queue.slot = -1
    else:
        tx_close(queue)
        if (queue.open >= 0 and queue.messages > 0) or queue.pool_free_count == 0 or need > queue.pool_slot:
            return 0
        queue.slot = load64(queue.pool_free + (queue.pool_free_count - 1) * 8)
        message = queue.pool + queue.slot * queue.pool_slot
    return message + room if message != 0 else 0


@inline
def _commit_slot(queue: Any, total: int) -> int:
    """Send the slot that is being filled, GPA-direct, a range a page. 0 when the ring has no room for it."""
    slot = queue.slot
    iova = queue.pool_iova + slot * queue.pool_slot
    pages = (total + PAGE_SIZE - 1) // PAGE_SIZE
    offset = 24 + 16 * pages
    ring = ring_at(queue.outgoing)
    packet = out_begin(ring, offset + _NVSP_SIZE + _RESERVED)
    if packet == 0:
        return 0
    length = offset + _NVSP_SIZE
    store64(packet, _GPA_DIRECT | (offset >> 3) << 16 | (length >> 3) << 32 | _WITH_COMPLETION)
    store64(packet + 8, queue.send_sections + slot)
    store64(packet + 16, pages << 32)
    for page in range(pages):
        store64(packet + 24 + 16 * page, min(PAGE_SIZE, total - page * PAGE_SIZE))
        store64(packet + 32 + 16 * page, (iova >> 12) + page)
    _write_nvsp(packet + offset, _NO_SECTION, 0)
    out_end(ring, length + 8)
    queue.pool_free_count -= 1
    store64(queue.busy + (queue.send_sections + slot) * 8, 1)
    return 1


@inline
def tx_commit(queue: Any, frame: int, size: int, checksum: int) -> int:
    """The frame of `size` bytes is in place where `tx_begin` said. 1 when it is on its way, 0 when the ring is full: flush, try again."""
    room = room_for(checksum)
    total = (room + size + queue.align - 1) & -queue.align
    write_header(frame - room, size, total, PPI_CHECKSUM, checksum)
    if queue.slot >= 0:
        if _commit_slot(queue, total) == 0:
            return 0
    else:
        queue.used += total
        queue.messages += 1
    queue.tx_frames += 1
    queue.tx_bytes += size
    return 1


@inline
def tx_flush(queue: Any) -> None:
    """Show everything committed to the host."""
    tx_close(queue)
    out_publish(ring_at(queue.outgoing))


@inline
def tx_completed(queue: Any, transaction: int, status: int) -> None:
    """The host is done with a transfer. One that it does not have is counted, no more."""
    if transaction < 0 or transaction >= queue.send_sections + queue.pool_slots or load64(queue.busy + transaction * 8) == 0:
        queue.bad_completions += 1
        return
    store64(queue.busy + transaction * 8, 0)
    if status != 1:
        queue.tx_failed += 1
    if transaction < queue.send_sections:
        store64(queue.free + queue.free_count * 8, transaction)
        queue.free_count += 1
    else:
        store64(queue.pool_free + queue.pool_free_count * 8, transaction - queue.send_sections)
        queue.pool_free_count += 1


@inline
def tx_copy(queue: Any, source: int, size: int, checksum: int) -> int:
    """Send a copy of one frame. 1 when it is on its way (or too long, and counted as lost), 0 while there is no room."""
    if size > queue.longest or size < 14:
        queue.tx_too_long += 1
        return 1
    place = tx_begin(queue, size, checksum)
    if place == 0:
        return 0
    copy(place, source, size)
    return tx_commit(queue, place, size, checksum)
