"""The table of frames that ports hand to the switch and the switch hands to ports: addresses, never copies."""

from __future__ import annotations

import numpy as np

from ..memory.access import viewer

FRAME = np.dtype(
    [
        ("address", "i8"),  # of the Ethernet header; what lies there may be written by a guest at any time
        ("size", "i8"),  # bytes, from the Ethernet header on, without FCS; 14 at least
        ("flags", "i8"),  # VALID_*: what the receiver need not check any more
        ("target", "i8"),  # the switch's own: index of the port it goes to, or FLOOD
    ]
)
"""One frame of a burst. The table is private memory of the worker; a frame's bytes are not."""

FRAME_SIZE = FRAME.itemsize
BURST = 256
"""Frames in a worker's table."""

VALID_IP_CHECKSUM = 1
VALID_L4_CHECKSUM = 2

frame_at = viewer(FRAME)
