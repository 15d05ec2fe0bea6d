"""Guest to switch: transfers from the guest's ring, taken apart into frames that stay where the guest put them.

Every word that the guest wrote is read once and checked before use. A transfer that breaks a rule, or names memory that the guest
may not reach, yields no frame at all and is completed with a failure; the channel goes on.
"""

from __future__ import annotations

from typing import Any

from ...dataplane.checksum import fill_ipv4, fill_l4
from ...dataplane.rndis import BAD_LENGTH, parse, parsed_at
from ...iommu.translation import READ, WRAPS, refuse, translate
from ...memory.access import copy, inline, load32, load64, store16, viewer
from ...wire import nvsp
from ...wire.frame import TxChecksum
from ...wire.gpa import PAGE_SIZE
from ..frames import FRAME_SIZE, VALID_IP_CHECKSUM, VALID_L4_CHECKSUM, frame_at
from .state import MAX_PAGES, PAIR, STAGE_SLOT, STAGE_SLOTS

STATUS_SUCCESS = nvsp.STATUS_SUCCESS
STATUS_FAIL = nvsp.STATUS_FAIL

CHECKSUM_TCP = TxChecksum.tcp_checksum.mask
CHECKSUM_UDP = TxChecksum.udp_checksum.mask
CHECKSUM_IP = TxChecksum.ip_header_checksum.mask

NO_SECTION = nvsp.NO_SECTION

pair_at = viewer(PAIR)
PAIR_SIZE = PAIR.itemsize


@inline
def _stage_slot(nic: Any) -> int:
    """A free staging slot of this burst, or 0."""
    if nic.staged >= STAGE_SLOTS:
        return 0
    nic.staged += 1
    return nic.stage + (nic.staged - 1) * STAGE_SLOT


@inline
def _change_on_the_way(nic: Any, frame: Any, checksum: int, vlan: int) -> int:
    """Copy a frame and put in what the guest left to us: its checksums, its VLAN tag. 0 when no slot is free."""
    slot = _stage_slot(nic)
    if slot == 0:
        return 0
    if vlan >= 0:
        copy(slot, frame.address, 12)
        store16(slot + 12, 0x0081)
        # As in the frame: priority 3 bits, CFI, identifier 12 bits, big-endian; in the word: from the low end.
        tag = ((vlan & 7) << 13) | ((vlan & 8) << 9) | ((vlan >> 4) & 0xFFF)
        store16(slot + 14, ((tag & 0xFF) << 8) | (tag >> 8))
        copy(slot + 16, frame.address + 12, frame.size - 12)
        frame.size += 4
    else:
        copy(slot, frame.address, frame.size)
    frame.address = slot
    if checksum > 0:
        if checksum & CHECKSUM_IP != 0 and fill_ipv4(slot, frame.size) != 0:
            frame.flags |= VALID_IP_CHECKSUM
        if checksum & (CHECKSUM_TCP | CHECKSUM_UDP) != 0 and fill_l4(slot, frame.size) != 0:
            frame.flags |= VALID_L4_CHECKSUM
    return 1


@inline
def take_messages(nic: Any, base: int, size: int, table: int, count: int) -> int:
    """Put the frames of the RNDIS messages in [base, base + size) behind the `count` in `table`. The new count, or -1.

    There must be one message at least.
    """
    out = parsed_at(nic.parsed)
    at = 0
    messages = 0
    while at < size or messages == 0:
        rule = parse(nic.parsed, base, at, size, nic.longest)
        messages += 1
        if rule == 0 and messages > nic.max_messages:
            rule = BAD_LENGTH
        if rule != 0:
            nic.last_rule = rule
            nic.bad_messages += 1
            return -1
        frame = frame_at(table + count * FRAME_SIZE)
        frame.address = out.address
        frame.size = out.size
        frame.flags = 0
        if (out.checksum > 0 or out.vlan >= 0) and _change_on_the_way(nic, frame, out.checksum, out.vlan) == 0:
            return -1
        count += 1
        at = out.next
    return count


@inline
def section_address(nic: Any, index: int, size: int) -> int:
    """Where the guest's send section `index` lies if `size` bytes of it may be sent, else 0, counted."""
    if index >= nic.send_sections or size > nic.send_section:
        nic.bad_sections += 1
        return 0
    return nic.send + index * nic.send_section


@inline
def _resolve(nic: Any, list_at: int, list_size: int, ranges: int) -> int:
    """Translate a GPA list into (address, size) pairs in `nic.pages`, neighbours joined. Their number; -1 malformed, -2 refused."""
    at = 0
    found = 0
    total = 0
    for _ in range(ranges):
        if list_size - at < 16:
            return -1
        head = load64(list_at + at)
        left = head & 0xFFFFFFFF
        offset = (head >> 32) & 0xFFFFFFFF
        at += 8
        total += left
        if left == 0 or offset >= PAGE_SIZE or total > STAGE_SLOT:
            return -1
        while left > 0:
            if list_size - at < 8:
                return -1
            pfn = load64(list_at + at)
            at += 8
            step = min(left, PAGE_SIZE - offset)
            if pfn < 0 or pfn >= 1 << 50:
                refuse(nic.domain, pfn, step, READ, WRAPS)
                return -2
            address = translate(nic.domain, (pfn << 12) + offset, step, READ)
            if address == 0:
                return -2
            last = pair_at(nic.pages + (found - 1) * PAIR_SIZE) if found > 0 else pair_at(nic.pages)
            if found > 0 and last.first + last.second == address:
                last.second += step
            else:
                if found == MAX_PAGES:
                    return -1
                pair = pair_at(nic.pages + found * PAIR_SIZE)
                pair.first = address
                pair.second = step
                found += 1
            left -= step
            offset = 0
    return found if at == list_size else -1


@inline
def take_pages(nic: Any, packet: int, offset: int, table: int, count: int, section: int, section_size: int) -> int:
    """Frames of a GPA-direct packet, whose list ends at `offset`. What of the message lies in a send section comes first.

    The new count of frames, or -1. A message in one piece is used in place, a scattered one is put together in a staging slot.
    """
    ranges = load32(packet + 20)
    if ranges == 0 or ranges > MAX_PAGES or offset < 24:
        nic.bad_ranges += 1
        return -1
    found = _resolve(nic, packet + 24, offset - 24, ranges)
    if found < 0:
        if found == -1:
            nic.bad_ranges += 1
        else:
            nic.faults += 1
        return -1
    first = pair_at(nic.pages)
    if found == 1 and section_size == 0:
        return take_messages(nic, first.first, first.second, table, count)
    slot = _stage_slot(nic)
    if slot == 0 or section_size > STAGE_SLOT:
        return -1
    if section_size > 0:
        copy(slot, section, section_size)
    used = section_size
    for index in range(found):
        pair = pair_at(nic.pages + index * PAIR_SIZE)
        if used + pair.second > STAGE_SLOT:
            nic.bad_ranges += 1
            return -1
        copy(slot + used, pair.first, pair.second)
        used += pair.second
    return take_messages(nic, slot, used, table, count)
