"""Switch to guest: frames into sections of the receive buffer, announced in transfer-page packets, given back by completions."""

from __future__ import annotations

from typing import Any

from ...dataplane.rndis import room_for, write_header
from ...memory.access import copy, inline, load64, prefetch_to_write, store64, viewer
from ...memory.kernel import step
from ...ring.primitives import out_begin, out_end
from ...wire import nvsp, oid
from ...wire import ring as wire_ring
from ...wire.frame import PPI_CHECKSUM, RxChecksum
from ..frames import FRAME_SIZE, VALID_IP_CHECKSUM, VALID_L4_CHECKSUM, frame_at, stamp
from .state import NIC

nic_at = viewer(NIC)

MAX_RANGES = 64
"""Frames announced in one packet."""

RECEIVE_BUFFER_ID = nvsp.RECEIVE_BUFFER_ID
"""The pageset that stands for the receive buffer (Linux: NETVSC_RECEIVE_BUFFER_ID)."""

_XFER_PAGES = wire_ring.PACKET_XFER_PAGES
_WITH_COMPLETION = wire_ring.FLAG_COMPLETION_REQUESTED << 48
_SEND_RNDIS_PACKET = nvsp.SEND_RNDIS_PACKET
_NVSP_SIZE = nvsp.MESSAGE_SIZE
_AHEAD = 8
"""Frames between the one that is written and the one whose section is asked for."""

FILTER_DIRECTED = oid.PACKET_TYPE_DIRECTED
FILTER_MULTICAST = oid.PACKET_TYPE_MULTICAST
FILTER_ALL_MULTICAST = oid.PACKET_TYPE_ALL_MULTICAST
FILTER_BROADCAST = oid.PACKET_TYPE_BROADCAST
FILTER_PROMISCUOUS = oid.PACKET_TYPE_PROMISCUOUS

_SUCCEEDED = int(RxChecksum.of(tcp_succeeded=1, udp_succeeded=1, ip_succeeded=1))
"""Receive checksum information: TCP, UDP and IP checksum found good (NDIS_TCP_IP_CHECKSUM_PACKET_INFO)."""
_L4_SUCCEEDED = int(RxChecksum.of(tcp_succeeded=1, udp_succeeded=1))


@inline
def wanted(nic: Any, low: int) -> bool:
    """Does the guest's packet filter let a frame for this address (48 bits, in memory order) in?"""
    accept = nic.filter
    if accept & FILTER_PROMISCUOUS != 0:
        return True
    if low == 0xFFFFFFFFFFFF:
        return accept & FILTER_BROADCAST != 0
    if low & 1 != 0:
        return accept & (FILTER_MULTICAST | FILTER_ALL_MULTICAST) != 0
    return accept & FILTER_DIRECTED != 0 and low == nic.mac_low


@inline
def _place(nic: Any, section: int, source: Any) -> int:
    """Write one frame as an RNDIS message into a section. Its length in bytes."""
    info = 0
    if source.flags & VALID_L4_CHECKSUM != 0:
        info = _SUCCEEDED if source.flags & VALID_IP_CHECKSUM != 0 else _L4_SUCCEEDED
    room = room_for(info)
    message = nic.receive + section * nic.receive_section
    total = room + source.size
    write_header(message, source.size, total, PPI_CHECKSUM, info)
    copy(message + room, source.address, source.size)
    stamp(message + room, source)
    return total


@inline
def announce(nic: Any, ring: Any, packet: int, first: int, ranges: int) -> int:
    """Finish the packet whose `ranges` are in place. Its bytes, footer included."""
    offset = 24 + 8 * ranges
    length = offset + _NVSP_SIZE
    store64(packet, _XFER_PAGES | (offset >> 3) << 16 | (length >> 3) << 32 | _WITH_COMPLETION)
    store64(packet + 8, first)
    store64(packet + 16, RECEIVE_BUFFER_ID | ranges << 32)
    store64(packet + offset, _SEND_RNDIS_PACKET)
    store64(packet + offset + 8, 0xFFFFFFFF)
    for at in range(16, _NVSP_SIZE, 8):
        store64(packet + offset + at, 0)
    out_end(ring, length + 8)
    return length + 8


@inline
def deliver(nic: Any, ring: Any, table: int, count: int) -> int:
    """Give up to MAX_RANGES of the `count` frames in `table` to the guest. How many frames were dealt with (filtered ones too)."""
    packet = out_begin(ring, 24 + 8 * min(count, MAX_RANGES) + _NVSP_SIZE + 8)
    if packet == 0:
        return 0
    done = 0
    ranges = 0
    first = -1
    last = -1
    while done < count and ranges < MAX_RANGES:
        source = frame_at(table + done * FRAME_SIZE)
        if source.size > nic.longest or not wanted(nic, source.destination):
            nic.filtered += 1
            done += 1
            continue
        if nic.free_count == 0:
            break
        nic.free_count -= 1
        section = load64(nic.free + nic.free_count * 8)
        if nic.free_count >= _AHEAD:
            later = nic.receive + load64(nic.free + (nic.free_count - _AHEAD) * 8) * nic.receive_section
            prefetch_to_write(later)
            prefetch_to_write(later + 64)
        total = _place(nic, section, source)
        store64(packet + 24 + 8 * ranges, total | (section * nic.receive_section) << 32)
        if ranges == 0:
            first = section
        else:
            store64(nic.chain + last * 8, section)
        last = section
        nic.received_bytes += source.size
        ranges += 1
        done += 1
    if ranges > 0:
        store64(nic.chain + last * 8, -1)
        store64(nic.head + first * 8, 1)
        nic.received_frames += ranges
        announce(nic, ring, packet, first, ranges)
    return done


@inline
def give_back(nic: Any, transaction: int) -> None:
    """The guest is done with a transfer: its sections are free again. A transfer that is not outstanding is counted, no more."""
    if transaction < 0 or transaction >= nic.receive_sections or load64(nic.head + transaction * 8) == 0:
        nic.bad_completions += 1
        return
    store64(nic.head + transaction * 8, 0)
    section = transaction
    while section >= 0:
        store64(nic.free + nic.free_count * 8, section)
        nic.free_count += 1
        section = load64(nic.chain + section * 8)


@step("void(i8, i8)")
def give_back_one(address: int, transaction: int) -> None:
    """`give_back` for the control plane."""
    give_back(nic_at(address), transaction)
