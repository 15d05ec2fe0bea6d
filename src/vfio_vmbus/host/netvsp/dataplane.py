"""The netvsp channel as a port of the switch: what the switch's worker calls.

While `owner` is CONTROL the ring from the guest is the control plane's, and the worker keeps its hands off it; frames to the guest
go on being delivered.
"""

from __future__ import annotations

from typing import Any

from ...memory.access import inline, load64, load64_acquire, store64, store64_release
from ...memory.kernel import kernel
from ...memory.libc import eventfd_signal
from ...ring.primitives import (
    in_commit,
    in_header,
    in_mask,
    in_ready,
    in_skip,
    out_begin,
    out_end,
    out_publish,
    out_want,
    packet_flags,
    packet_length,
    packet_offset,
    packet_type,
    ring_at,
)
from ...wire import nvsp
from ...wire import ring as wire_ring
from ..frames import FRAME_SIZE
from .receive import MAX_RANGES, deliver, give_back, nic_at
from .state import CONTROL, MAX_PENDING, MAX_TAKEN, NIC, STAGE_SLOTS, WORKER
from .transmit import NO_SECTION, PAIR_SIZE, STATUS_FAIL, STATUS_SUCCESS, pair_at, section_address, take_messages, take_pages

INBAND = wire_ring.PACKET_INBAND
GPA_DIRECT = wire_ring.PACKET_GPA_DIRECT
COMPLETION = wire_ring.PACKET_COMPLETION
_SEND_RNDIS_PACKET = nvsp.SEND_RNDIS_PACKET
_SEND_RNDIS_COMPLETE = nvsp.SEND_RNDIS_PACKET_COMPLETE
_COMPLETION_SIZE = 16 + nvsp.MESSAGE_SIZE + wire_ring.FOOTER_SIZE
"""A completion carries a whole NVSP message of 40 bytes: Linux copies that many."""

_OWNER_AT = NIC.fields["owner"][1]  # type: ignore[index]


@inline
def _is_workers(nic: int) -> bool:
    return load64_acquire(nic + _OWNER_AT) == WORKER


@inline
def _hand_over(address: int, nic: Any) -> None:
    """Give the ring from the guest to the control plane, and call it."""
    store64_release(address + _OWNER_AT, CONTROL)
    eventfd_signal(nic.control_fd, nic.scratch)


@inline
def _complete(nic: Any, transaction: int, status: int) -> None:
    pair = pair_at(nic.pending + nic.pending_count * PAIR_SIZE)
    pair.first = transaction
    pair.second = status
    nic.pending_count += 1


@inline
def _send_completions(nic: Any, ring: Any) -> None:
    """Write as many completions as the ring has room for."""
    done = 0
    while done < nic.pending_count:
        packet = out_begin(ring, _COMPLETION_SIZE)
        if packet == 0:
            break
        pair = pair_at(nic.pending + done * PAIR_SIZE)
        store64(packet, COMPLETION | 2 << 16 | 7 << 32)
        store64(packet + 8, pair.first)
        store64(packet + 16, _SEND_RNDIS_COMPLETE | pair.second << 32)
        for at in range(24, 56, 8):
            store64(packet + at, 0)
        out_end(ring, _COMPLETION_SIZE)
        done += 1
    if done > 0:
        rest = nic.pending_count - done
        for index in range(rest):
            source = pair_at(nic.pending + (done + index) * PAIR_SIZE)
            target = pair_at(nic.pending + index * PAIR_SIZE)
            target.first = source.first
            target.second = source.second
        nic.pending_count = rest


@inline
def _take(nic: Any, packet: int, header: int, table: int, count: int) -> int:
    """The frames of one data transfer. The new count, -1 if it fails, -2 if it is not for the data plane."""
    offset = packet_offset(header)
    if packet_length(header) - offset < 16 or load64(packet + offset) != _SEND_RNDIS_PACKET:
        return -2  # another NVSP message, or RNDIS control: channel type 1 in the upper half
    place = load64(packet + offset + 8)
    section = place & 0xFFFFFFFF
    size = (place >> 32) & 0xFFFFFFFF
    if section == NO_SECTION:
        base = 0
        size = 0
    else:
        base = section_address(nic, section, size)
        if base == 0:
            return -1
    if packet_type(header) == INBAND:
        return take_messages(nic, base, size, table, count)
    return take_pages(nic, packet, offset, table, count, base, size)


@inline
def nic_finish(address: int) -> None:
    """The frames of the last `nic_poll` are where they were to go: give their space back, tell the guest."""
    nic = nic_at(address)
    incoming = ring_at(nic.incoming)
    outgoing = ring_at(nic.outgoing)
    in_commit(incoming)
    if nic.pending_count > 0:
        _send_completions(nic, outgoing)
    out_publish(outgoing)


@inline
def nic_poll(address: int, table: int, capacity: int) -> int:
    """Frames that the guest sent, up to `capacity`, into `table`. They stay where they are until `nic_finish`."""
    if not _is_workers(address):
        return 0
    nic = nic_at(address)
    ring = ring_at(nic.incoming)
    if ring.broken != 0 or ring_at(nic.outgoing).broken != 0:
        _hand_over(address, nic)
        return 0
    if nic.ready == 0:
        if nic.full == 0 and in_ready(ring):
            _hand_over(address, nic)
        return 0
    if nic.pending_count > 0:
        nic_finish(address)
    nic.staged = 0
    count = 0
    taken = 0
    foreign = False
    while nic.pending_count < MAX_PENDING and count + nic.max_messages <= capacity and in_ready(ring):
        if nic.staged + nic.max_messages >= STAGE_SLOTS or taken == MAX_TAKEN:
            break
        header = in_header(ring)
        if header < 0:
            _hand_over(address, nic)
            return 0
        packet = ring.data + ring.index
        kind = packet_type(header)
        if kind == COMPLETION:
            give_back(nic, load64(packet + 8))
        elif kind in (INBAND, GPA_DIRECT):
            transaction = load64(packet + 8)
            fresh = _take(nic, packet, header, table, count)
            if fresh == -2:
                foreign = True
                break
            if fresh >= 0 and nic.link == 0:
                nic.unplugged += fresh - count
            elif fresh >= 0:
                nic.sent_frames += fresh - count
                for index in range(count, fresh):
                    nic.sent_bytes += load64(table + index * FRAME_SIZE + 8)
                count = fresh
            if packet_flags(header) & 1 != 0:
                _complete(nic, transaction, STATUS_SUCCESS if fresh >= 0 else STATUS_FAIL)
        else:
            foreign = True
            break
        in_skip(ring, header)
        taken += 1
    if foreign and taken == 0:
        if nic.full == 0:
            _hand_over(address, nic)
    elif taken > 0 and count == 0:
        nic_finish(address)
    return count


@inline
def nic_deliver(address: int, table: int, count: int) -> int:
    """Give `count` frames to the guest. How many it got (or filtered out); the rest found no room and is counted `no_buffer`."""
    nic = nic_at(address)
    if nic.ready == 0 or nic.link == 0:
        return 0
    ring = ring_at(nic.outgoing)
    done = 0
    while done < count:
        step = deliver(nic, ring, table + done * FRAME_SIZE, count - done)
        done += step
        if step < min(count - done + step, MAX_RANGES):
            break
    out_publish(ring)
    nic.no_buffer += count - done
    return done


@inline
def nic_arm(address: int, armed: int) -> int:
    """Before the worker sleeps (armed 1): let the guest signal, and look once more: 1 if there is work. Afterwards (0): mask again."""
    if not _is_workers(address):
        return 0
    nic = nic_at(address)
    incoming = ring_at(nic.incoming)
    outgoing = ring_at(nic.outgoing)
    if nic.pending_count > 0:
        out_want(outgoing, _COMPLETION_SIZE if armed != 0 else 0)
        _send_completions(nic, outgoing)
        out_publish(outgoing)
    in_mask(incoming, 0 if armed != 0 else 1)
    if armed == 0:
        return 0
    work = nic.pending_count < MAX_PENDING and nic.full == 0 and in_ready(incoming)
    return 1 if work or incoming.broken != 0 or outgoing.broken != 0 else 0


@kernel("void(i8)")
def give_to_worker(address: int) -> None:
    """The control plane is done with the ring from the guest."""
    store64_release(address + _OWNER_AT, WORKER)
