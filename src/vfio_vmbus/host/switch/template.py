"""Frames for a generator to repeat: UDP over IPv4 with valid checksums, one template a flow."""

from __future__ import annotations

import socket

import dpkt
import numpy as np

from ...errors import UsageError
from ...memory.block import Block
from .state import MAX_FRAME
from .traffic import TEMPLATES

MIN_SIZE = 42
"""Bytes of the headers: Ethernet 14, IPv4 20, UDP 8."""
MAX_FLOWS = 1024
_FROM = "198.18.0.1"
_TO = "198.19.0.1"
"""The network of benchmarks (RFC 2544, RFC 6890)."""
_DISCARD = 9
_FIRST_PORT = 0xC000
"""Start of the range of dynamic ports (RFC 6335); each flow has its own."""
_SLOT = 64


def udp_frame(source: bytes, destination: bytes, size: int, flow: int = 0) -> bytes:
    """An Ethernet frame of `size` bytes, without FCS: UDP to the discard port."""
    payload = bytes(range(256)) * (size // 256 + 1)
    udp = dpkt.udp.UDP(sport=_FIRST_PORT + flow, dport=_DISCARD, data=payload[: size - MIN_SIZE], ulen=size - 34)
    packet = dpkt.ip.IP(src=socket.inet_aton(_FROM), dst=socket.inet_aton(_TO), p=dpkt.ip.IP_PROTO_UDP, ttl=64, data=udp)
    packet.len = size - 14
    return bytes(dpkt.ethernet.Ethernet(src=source, dst=destination, type=dpkt.ethernet.ETH_TYPE_IP, data=packet))


class Templates:
    """The templates of a generator. `state.address` is for the port. Raises UsageError for sizes and counts that cannot be."""

    def __init__(self, source: bytes, destination: bytes, size: int, count: int | None, flows: int) -> None:
        if not MIN_SIZE <= size <= MAX_FRAME:
            raise UsageError(f"generator: frames of {size} bytes: take {MIN_SIZE} to {MAX_FRAME}")
        if not 1 <= flows <= MAX_FLOWS:
            raise UsageError(f"generator: {flows} flows: take 1 to {MAX_FLOWS}")
        if count is not None and count < 0:
            raise UsageError(f"generator: {count} frames: take 0 or more, or None for no end")
        slot = -(-size // _SLOT) * _SLOT
        self._memory = Block("u1", slot * flows)
        for flow in range(flows):
            frame = udp_frame(source, destination, size, flow)
            self._memory.array[flow * slot : flow * slot + size] = np.frombuffer(frame, np.uint8)
        self.state = Block(TEMPLATES)
        self.state["memory"] = self._memory.address
        self.state["slot"] = slot
        self.state["size"] = size
        self.state["flows"] = flows
        self.state["left"] = -1 if count is None else count
