"""The steps of a ring that data-plane kernels are made of. Order of accesses as in Linux drivers/hv/ring_buffer.c.

Outgoing: `out_begin` gives the address for a packet of a total size (footer included) or 0 when the ring is full; after
writing it, `out_end`; after the last one of a burst, `out_publish` (one store, one barrier, at most one signal). Publishing and
committing store the index and pass the barrier in one ordered access; what follows it are ordered loads, for the same reason.
Incoming: while `in_ready`, `in_header` gives the checked header (or -1: the other side broke a rule, `ring.broken` says
which), `in_skip` steps over the packet; after a burst, `in_commit`. Who takes single packets uses `in_next` instead of both.
Who polls calls `rest` between two looks that found nothing.

The data area is mapped twice in a row, so a packet is contiguous wherever it starts. A broken ring stays broken.
"""

from __future__ import annotations

from typing import Any

from ..memory.access import (
    fence,
    inline,
    load32,
    load32_acquire,
    load32_ordered,
    load64,
    pause,
    prefetch_to_write,
    store32,
    store32_ordered,
    store64,
    viewer,
)
from ..memory.bell import NOBODY, strike
from ..memory.signal import signal as signal_eventfd
from ..wire import ring as layout
from .state import BAD_INDEX, BAD_LENGTH, BAD_MOVE, BAD_OFFSET, RING

# Plain numbers for kernels: bytes into the control page.
WRITE_INDEX = layout.RING_WRITE_INDEX
READ_INDEX = layout.RING_READ_INDEX
INTERRUPT_MASK = layout.RING_INTERRUPT_MASK
PENDING_SEND_SZ = layout.RING_PENDING_SEND_SIZE
FEATURE_BITS = layout.RING_FEATURES
FEAT_PENDING_SEND_SZ = layout.FEATURE_PENDING_SEND_SIZE
HEADER = layout.PacketHeader.SIZE
FOOTER = layout.FOOTER_SIZE
"""Bytes behind each packet: its own start index in the upper half, 0 in the lower."""

AHEAD = 512
"""Bytes behind the last packet whose cache lines the writer asks for while its index becomes visible: they are the reader's."""
RESTS = 32
"""Spin-wait hints of one `rest`: some 1 us on x86-64."""

ring_at = viewer(RING)


@inline
def broken(ring: Any, rule: int, value: int, limit: int) -> None:
    """Note the first rule that the other side broke, and let nothing more through."""
    if ring.broken == 0:
        ring.broken = rule
        ring.bad_value = value
        ring.bad_limit = limit
    ring.room = 0


@inline
def ahead(index: int, total: int, size: int) -> int:
    """The index `total` bytes further on."""
    index += total
    return index - size if index >= size else index


@inline
def distance(start: int, end: int, size: int) -> int:
    """Bytes from one index to another: 0 where they are equal."""
    return end - start if end >= start else end - start + size


@inline
def free_between(write: int, read: int, size: int) -> int:
    """Bytes free in a ring with these indices: all where they are equal."""
    return read - write if read > write else read - write + size


@inline
def signal(ring: Any) -> None:
    """Ring the other side's doorbell."""
    ring.signals += 1
    if ring.doorbell >= 0:
        signal_eventfd(ring.doorbell, ring.signal)
    elif ring.doorbell != NOBODY:
        strike(ring.doorbell)


@inline
def out_look(ring: Any) -> int:
    """Bytes free, after a look at the reader's index; 0 when the ring is broken. A packet fits when it is smaller.

    A reader only ever gives back, and never what it has not been shown.
    """
    read = load32_acquire(ring.control + READ_INDEX)
    if read >= ring.size or read & 7 != 0:
        broken(ring, BAD_INDEX, read, ring.size)
        return 0
    free = free_between(ring.index, read, ring.size)
    if free < ring.room or free > ring.size - distance(ring.shown, ring.index, ring.size):
        broken(ring, BAD_MOVE, read, ring.size)
        return 0
    ring.room = free
    return free


@inline
def out_begin(ring: Any, total: int) -> int:
    """Where to write a packet of `total` bytes, a multiple of 8 that counts header and footer; 0 when there is no room."""
    if ring.room <= total and (ring.broken != 0 or out_look(ring) <= total):
        ring.full += 1
        return 0
    return ring.data + ring.index


@inline
def out_end(ring: Any, total: int) -> None:
    """The packet begun last is written: add its footer and step over it. Invisible to the other side until `out_publish`."""
    index = ring.index
    store64(ring.data + index + total - FOOTER, index << 32)
    ring.index = ahead(index, total, ring.size)
    ring.room -= total
    ring.packets += 1


@inline
def out_publish(ring: Any) -> int:
    """Show all packets written to the other side; signal it if the ring was empty and it wants to know. 1 if signalled."""
    before = ring.shown
    index = ring.index
    if index == before:
        return 0
    ring.shown = index
    ring.bytes += distance(before, index, ring.size)
    if ring.room > AHEAD:
        for line in range(0, AHEAD, 64):
            prefetch_to_write(ring.data + index + line)
    store32_ordered(ring.control + WRITE_INDEX, index)
    if load32_ordered(ring.control + INTERRUPT_MASK) != 0 or load32_ordered(ring.control + READ_INDEX) != before:
        return 0
    signal(ring)
    return 1


@inline
def out_want(ring: Any, size: int) -> None:
    """Ask the reader for a signal once more than `size` bytes are free (0: no more)."""
    store32(ring.control + PENDING_SEND_SZ, size)
    fence()


@inline
def in_look(ring: Any) -> int:
    """Bytes readable, after a look at the writer's index; 0 when the ring is broken. Only when all known ones are read."""
    write = load32_acquire(ring.control + WRITE_INDEX)
    if write >= ring.size or write & 7 != 0:
        broken(ring, BAD_INDEX, write, ring.size)
        return 0
    ready = distance(ring.index, write, ring.size)
    if ready + distance(ring.shown, ring.index, ring.size) >= ring.size:
        broken(ring, BAD_MOVE, write, ring.size)
        return 0
    ring.room = ready
    return ready


@inline
def in_ready(ring: Any) -> bool:
    """Is there a packet to read?"""
    return ring.room > 0 or (ring.broken == 0 and in_look(ring) > 0)


@inline
def packet_type(header: int) -> int:
    """Type of a packet, from the first 64 bits of its descriptor."""
    return header & 0xFFFF


@inline
def packet_offset(header: int) -> int:
    """Bytes from a packet's start to its data."""
    return ((header >> 16) & 0xFFFF) * 8


@inline
def packet_length(header: int) -> int:
    """Bytes of a packet with its descriptor, without the footer."""
    return ((header >> 32) & 0xFFFF) * 8


@inline
def packet_flags(header: int) -> int:
    """Flags of a packet; bit 0 asks for a completion."""
    return (header >> 48) & 0x7FFF


@inline
def in_header(ring: Any) -> int:
    """The next packet's first 64 bits, read once and checked: 16 <= offset <= length, length + 8 <= readable. -1 if not so."""
    header = load64(ring.data + ring.index) & 0x7FFFFFFFFFFFFFFF
    length = packet_length(header)
    if length < HEADER or length + FOOTER > ring.room:
        broken(ring, BAD_LENGTH, length, ring.room - FOOTER)
        return -1
    if packet_offset(header) < HEADER or packet_offset(header) > length:
        broken(ring, BAD_OFFSET, packet_offset(header), length)
        return -1
    return header


@inline
def in_skip(ring: Any, header: int) -> None:
    """Step over the packet with this checked header. Its place stays the reader's until `in_commit`."""
    total = packet_length(header) + FOOTER
    ring.index = ahead(ring.index, total, ring.size)
    ring.room -= total
    ring.packets += 1


@inline
def in_commit(ring: Any) -> int:
    """Give the space of all packets read back; signal a writer that waits for more room than it had. 1 if signalled.

    The rule is the kernel's (hv_pkt_iter_close): only on the way from "not more than pending_send_sz free" to "more".
    """
    before = ring.shown
    index = ring.index
    if index == before:
        return 0
    freed = distance(before, index, ring.size)
    ring.shown = index
    ring.bytes += freed
    store32_ordered(ring.control + READ_INDEX, index)
    pending = load32_ordered(ring.control + PENDING_SEND_SZ)
    if pending == 0 or load32(ring.control + FEATURE_BITS) & FEAT_PENDING_SEND_SZ == 0:
        return 0
    write = load32_ordered(ring.control + WRITE_INDEX)
    if write >= ring.size or write & 7 != 0:
        broken(ring, BAD_INDEX, write, ring.size)
        return 0
    free = free_between(write, index, ring.size)
    if free <= pending or free - freed > pending:
        return 0
    signal(ring)
    return 1


@inline
def in_next(ring: Any, header: int) -> None:
    """`in_skip`, and `in_commit` when it is due: for whoever takes one packet at a time.

    It is due once all that was known to be there is read, which is when Linux's iterator gives space back (hv_pkt_iter_next), and
    earlier when a quarter of the ring is held. Indices are then shown as rarely as in bursts while the writer is ahead.
    """
    in_skip(ring, header)
    if ring.room == 0 or distance(ring.shown, ring.index, ring.size) > ring.size >> 2:
        in_commit(ring)


@inline
def rest() -> None:
    """What a poller does between two looks at an index that has not moved.

    Each look takes the control page's cache line away from the other side, which works on it: looking at once again and again
    costs the other side up to half of its speed.
    """
    for _ in range(RESTS):
        pause()


@inline
def in_mask(ring: Any, masked: int) -> None:
    """Tell the writer whether it may signal (0) or need not (1); after unmasking, look once more before sleeping."""
    store32(ring.control + INTERRUPT_MASK, masked)
    fence()
