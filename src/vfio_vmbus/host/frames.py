"""The table of frames that ports hand to the switch and the switch hands to ports: addresses, never copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..memory.access import inline, store32, store64, viewer

FRAME = np.dtype(
    [
        ("address", "i8"),  # of the Ethernet header; what lies there may be written by a guest at any time
        ("size", "i8"),  # bytes, from the Ethernet header on, without FCS; 14 at least
        ("flags", "i8"),  # VALID_*: what the receiver need not check any more
        ("target", "i8"),  # the switch's own: index of the port it goes to, FLOOD, or why it was dropped
        ("destination", "i8"),  # the addresses that the switch read, once, and checked; as `mac_value` numbers them
        ("source", "i8"),
    ]
)
"""One frame of a burst. The table is private memory of the worker; a frame's bytes are not."""

FRAME_SIZE = FRAME.itemsize
BURST = 256
"""Frames in a worker's table."""

VALID_IP_CHECKSUM = 1
VALID_L4_CHECKSUM = 2

frame_at = viewer(FRAME)

ADDRESSES = (1 << 48) - 1


@inline
def stamp(copied: int, frame: Any) -> None:
    """Put the addresses that the switch checked over the first 12 bytes of a copy of `frame`.

    A guest may rewrite its frame after the switch has looked, so every port that copies frames out calls this.
    """
    store64(copied, frame.destination | ((frame.source & 0xFFFF) << 48))
    store32(copied + 8, frame.source >> 16)


def mac_value(mac: bytes) -> int:
    """A MAC address as the number that kernels compare: its first byte in the lowest bits, as a little-endian load gives it."""
    return int.from_bytes(mac, "little")
