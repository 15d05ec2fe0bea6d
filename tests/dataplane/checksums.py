"""Internet checksums and the frames that need them, in plain Python: the oracle of the kernels."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hypothesis import strategies as st

TCP = 6
UDP = 17


def internet_checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ipv4_filled(frame: bytes) -> bytes | None:
    """The frame with its IPv4 header's checksum, or None when it has no such header."""
    start = _l3(frame)
    if start is None or frame[start - 2 : start] != b"\x08\x00":
        return None
    size = (frame[start] & 15) * 4
    if size < 20 or start + size > len(frame):
        return None
    cleared = frame[: start + 10] + b"\0\0" + frame[start + 12 :]
    value = internet_checksum(cleared[start : start + size])
    return cleared[: start + 10] + value.to_bytes(2, "big") + cleared[start + 12 :]


def l4_filled(frame: bytes) -> bytes | None:
    """The frame with its TCP or UDP checksum, or None when it has none."""
    start = _l3(frame)
    if start is None:
        return None
    kind = frame[start - 2 : start]
    if kind == b"\x08\x00":
        header = (frame[start] & 15) * 4
        size = int.from_bytes(frame[start + 2 : start + 4], "big") - header
        protocol, addresses = frame[start + 9], frame[start + 12 : start + 20]
    elif kind == b"\x86\xdd" and len(frame) >= start + 40:
        header, size = 40, int.from_bytes(frame[start + 4 : start + 6], "big")
        protocol, addresses = frame[start + 6], frame[start + 8 : start + 40]
    else:
        return None
    at = start + header
    least, place = {TCP: (20, at + 16), UDP: (8, at + 6)}.get(protocol, (1 << 30, 0))
    if header < 20 or size < least or at + size > len(frame):
        return None
    cleared = frame[:place] + b"\0\0" + frame[place + 2 :]
    value = internet_checksum(addresses + struct.pack(">HH", protocol, size) + cleared[at : at + size])
    if value == 0 and protocol == UDP:
        value = 0xFFFF
    return cleared[:place] + value.to_bytes(2, "big") + cleared[place + 2 :]


def _l3(frame: bytes) -> int | None:
    """Where the network header begins, if 20 bytes of it are there."""
    start = 18 if frame[12:14] == b"\x81\x00" else 14
    return start if len(frame) >= start + 20 else None


@dataclass(frozen=True)
class Sample:
    """A frame of TCP or UDP over IPv4 or IPv6 with wrong checksums."""

    frame: bytes
    ipv6: bool
    udp: bool


def made(ipv6: bool, udp: bool, vlan: int | None, options: int, payload: bytes, padding: int, seed: int) -> Sample:
    """options: 4-byte words of IPv4 options. padding: bytes behind the packet, as short frames have them."""
    noise = (seed * 2654435761) & 0xFFFFFFFF
    ports = struct.pack(">HH", noise & 0xFFFF, noise >> 16)
    if udp:
        l4 = ports + struct.pack(">HH", 8 + len(payload), noise & 0xFFFF) + payload
    else:
        l4 = ports + struct.pack(">IIHHHH", noise, 1, 5 << 12 | 0x18, 512, noise & 0xFFFF, 0) + payload
    addresses = struct.pack(">I", noise) * (8 if ipv6 else 2)
    protocol = UDP if udp else TCP
    if ipv6:
        l3 = struct.pack(">IHBB", 6 << 28, len(l4), protocol, 64) + addresses
    else:
        size = 20 + 4 * options
        l3 = struct.pack(">BBHHHBBH", 4 << 4 | size // 4, 0, size + len(l4), 1, 0, 64, protocol, noise & 0xFFFF)
        l3 += addresses + b"\x01\x01\x01\x00" * options
    kind = b"\x86\xdd" if ipv6 else b"\x08\x00"
    tag = b"" if vlan is None else struct.pack(">HH", 0x8100, vlan)
    return Sample(b"\x02" * 5 + b"\x04" + b"\x02" * 6 + tag + kind + l3 + l4 + b"\xaa" * padding, ipv6, udp)


samples = st.builds(
    made,
    ipv6=st.booleans(),
    udp=st.booleans(),
    vlan=st.none() | st.integers(0, 0xFFFF),
    options=st.integers(0, 10),
    payload=st.binary(max_size=80) | st.integers(0, 1400).map(lambda size: bytes(index * 37 % 256 for index in range(size))),
    padding=st.integers(0, 30),
    seed=st.integers(0, 1 << 32),
)
