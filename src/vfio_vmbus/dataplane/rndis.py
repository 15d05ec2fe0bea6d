"""RNDIS packet messages in kernels: written by one end, checked by the other.

A message is header (44 bytes), per-packet information, frame. Offsets in it count from byte 8. Source: MS-RNDIS 2.2.14, Linux
include/linux/rndis.h and drivers/net/hyperv/hyperv_net.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..memory.access import inline, load32, load64, store64, viewer
from ..wire import rndis
from ..wire.frame import PPI_CHECKSUM, PPI_VLAN

PACKET_MSG = rndis.PACKET
HEADER = rndis.PacketMessage.SIZE
"""Bytes of a packet message before its per-packet information."""
BASE = rndis.OFFSET_BASE
"""Offsets inside a message count from here."""
PLAIN_ROOM = 48
"""Bytes before the frame in the messages that we send: header, and 4 more to keep the frame on a multiple of 8."""
PPI_ROOM = 64
"""The same with one piece of per-packet information of 4 bytes (16 with its header) between."""
_PPI_AT = HEADER


PARSED = np.dtype([("next", "i8"), ("address", "i8"), ("size", "i8"), ("checksum", "i8"), ("vlan", "i8")])
"""One message taken apart: `next` is the offset behind it; `address` and `size` of the frame; the words of PPI or -1."""

parsed_at = viewer(PARSED)

SHORT_HEADER = 1
NOT_A_PACKET = 2
BAD_LENGTH = 3
BAD_DATA = 4
BAD_PPI = 5
BAD_FRAME = 6

MESSAGE_RULES = {
    SHORT_HEADER: "less than an RNDIS packet header",
    NOT_A_PACKET: "not an RNDIS packet message",
    BAD_LENGTH: "message length below its header or beyond its buffer",
    BAD_DATA: "frame outside its message",
    BAD_PPI: "per-packet information outside its message",
    BAD_FRAME: "frame shorter than an Ethernet header or longer than allowed",
}


@inline
def room_for(info: int) -> int:
    """Bytes before the frame in a message with (info != 0) or without per-packet information."""
    return PPI_ROOM if info != 0 else PLAIN_ROOM


@inline
def write_header(message: int, size: int, total: int, kind: int, info: int) -> None:
    """Write what stands before a frame of `size` bytes at `message + room_for(info)`; the message takes `total` bytes."""
    room = room_for(info)
    store64(message, PACKET_MSG | total << 32)
    store64(message + 8, (room - BASE) | size << 32)
    store64(message + 16, 0)
    if info == 0:
        store64(message + 24, 0)
        store64(message + 32, 0)
        store64(message + 40, 0)
    else:
        store64(message + 24, (_PPI_AT - BASE) << 32)
        store64(message + 32, 16)
        store64(message + 40, 16 << 32)  # reserved, then size of the information
        store64(message + 48, kind | 12 << 32)  # type, offset of the value in it
        store64(message + 56, info)


@inline
def _read_info(out: Any, base: int, start: int, size: int) -> int:
    """Walk the per-packet information at [start, start + size) of the message at `base`. 0, or BAD_PPI."""
    at = start
    end = start + size
    while at < end:
        if end - at < 12:
            return BAD_PPI
        lengths = load64(base + at)
        length = lengths & 0xFFFFFFFF
        kind = (lengths >> 32) & 0xFFFFFFFF  # the top bit marks internal kinds, which have numbers of their own
        offset = load32(base + at + 8)
        if length < 12 or length > end - at or offset < 12 or offset > length:
            return BAD_PPI
        if offset + 4 <= length:
            if kind == PPI_CHECKSUM:
                out.checksum = load32(base + at + offset)
            elif kind == PPI_VLAN:
                out.vlan = load32(base + at + offset)
        at += length
    return 0


@inline
def parse(out_address: int, base: int, at: int, limit: int, longest: int) -> int:
    """Take the packet message at `base + at` apart, into the PARSED record at `out_address`.

    limit: bytes from `base` that are the sender's. longest: of a frame. Each word is read once. Returns 0, or the rule broken.
    """
    out = parsed_at(out_address)
    if limit - at < BASE:
        return SHORT_HEADER
    message = base + at
    first = load64(message)
    if first & 0xFFFFFFFF != PACKET_MSG:
        return NOT_A_PACKET
    if limit - at < HEADER:
        return SHORT_HEADER
    length = (first >> 32) & 0xFFFFFFFF
    if length < HEADER or length > limit - at:
        return BAD_LENGTH
    second = load64(message + 8)
    offset = second & 0xFFFFFFFF
    size = (second >> 32) & 0xFFFFFFFF
    if offset < HEADER - BASE or offset + size > length - BASE:
        return BAD_DATA
    if size < 14 or size > longest:
        return BAD_FRAME
    out.next = at + length
    out.address = message + BASE + offset
    out.size = size
    out.checksum = -1
    out.vlan = -1
    info_size = load32(message + 32)
    if info_size == 0:
        return 0
    info_offset = load32(message + 28)
    if info_offset < HEADER - BASE or info_offset + info_size > length - BASE or info_size & 3 != 0 or info_offset & 3 != 0:
        return BAD_PPI
    return _read_info(out, message, BASE + info_offset, info_size)
