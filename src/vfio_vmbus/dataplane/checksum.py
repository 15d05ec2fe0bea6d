"""Internet checksums (RFC 1071) in kernels, for hosts and drivers that were promised checksum offload."""

from __future__ import annotations

from ..memory.access import inline, load8, load16, store16

ETHERTYPE_IPV4 = 0x0008  # as load16 reads them
ETHERTYPE_IPV6 = 0xDD86
ETHERTYPE_VLAN = 0x0081

TCP = 6
UDP = 17


@inline
def swap16(value: int) -> int:
    """Network to host order and back."""
    return ((value & 0xFF) << 8) | (value >> 8)


@inline
def ones_sum(address: int, size: int) -> int:
    """Sum of the 16-bit words as they lie in memory; a last odd byte counts as the low one."""
    total = 0
    for at in range(0, size - 1, 2):
        total += load16(address + at)
    if size & 1:
        total += load8(address + size - 1)
    return total


@inline
def fold(total: int) -> int:
    """A sum brought to 16 bits."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@inline
def l3_offset(frame: int, size: int) -> int:
    """Where the network header begins (behind one VLAN tag, if there is one); 0 when an IPv4 header would not fit."""
    if size >= 38 and load16(frame + 12) == ETHERTYPE_VLAN:
        return 18
    return 14 if size >= 34 else 0


@inline
def fill_ipv4(frame: int, size: int) -> int:
    """Compute the IPv4 header's checksum in place. 1 when the frame has such a header."""
    start = l3_offset(frame, size)
    if start == 0 or load16(frame + start - 2) != ETHERTYPE_IPV4:
        return 0
    header = (load8(frame + start) & 15) * 4
    if header < 20 or start + header > size:
        return 0
    store16(frame + start + 10, 0)
    store16(frame + start + 10, fold(ones_sum(frame + start, header)) ^ 0xFFFF)
    return 1


@inline
def fill_l4(frame: int, size: int) -> int:
    """Compute the TCP or UDP checksum in place, pseudo header included. 1 when the frame has one to compute."""
    start = l3_offset(frame, size)
    if start == 0:
        return 0
    kind = load16(frame + start - 2)
    if kind == ETHERTYPE_IPV4:
        header = (load8(frame + start) & 15) * 4
        length = swap16(load16(frame + start + 2)) - header
        protocol = load8(frame + start + 9)
        pseudo = ones_sum(frame + start + 12, 8)
    elif kind == ETHERTYPE_IPV6 and size >= start + 40:
        header = 40
        length = swap16(load16(frame + start + 4))
        protocol = load8(frame + start + 6)
        pseudo = ones_sum(frame + start + 8, 32)
    else:
        return 0
    at = start + header
    if header < 20 or length < 8 or at + length > size:
        return 0
    if protocol == TCP and length >= 20:
        place = frame + at + 16
    elif protocol == UDP:
        place = frame + at + 6
    else:
        return 0
    store16(place, 0)
    total = fold(pseudo + swap16(protocol) + swap16(length) + ones_sum(frame + at, length)) ^ 0xFFFF
    store16(place, 0xFFFF if total == 0 and protocol == UDP else total)
    return 1
