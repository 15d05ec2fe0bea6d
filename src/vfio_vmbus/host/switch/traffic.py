"""The generator and sink ports: frames out of nothing and into nothing, without a copy, to measure what lies between."""

from __future__ import annotations

import numpy as np

from ...memory.access import load8, viewer
from ...memory.kernel import step
from ..frames import FRAME_SIZE, VALID_IP_CHECKSUM, VALID_L4_CHECKSUM, frame_at
from .state import port_at

TEMPLATES = np.dtype(
    [
        ("memory", "i8"),  # address of `flows` slots, a frame each
        ("slot", "i8"),  # bytes of a slot
        ("size", "i8"),  # bytes of each frame
        ("flows", "i8"),
        ("next", "i8"),  # whose turn it is
        ("left", "i8"),  # frames still to come; -1: without end
    ]
)
"""What a generator sends: its flows in turn."""

TOUCH = np.dtype([("bytes", "i8")])
"""How much of each frame a sink looks at, a byte of each cache line, as a receiver would."""

LINE = 64

templates_at = viewer(TEMPLATES)
touch_at = viewer(TOUCH)


@step("i8(i8, i8, i8)")
def generator_poll(address: int, frames: int, capacity: int) -> int:
    """Hand out up to `capacity` frames."""
    templates = templates_at(port_at(address).state)
    count = capacity if templates.left < 0 or templates.left > capacity else templates.left
    turn = templates.next
    for index in range(count):
        frame = frame_at(frames + index * FRAME_SIZE)
        frame.address = templates.memory + turn * templates.slot
        frame.size = templates.size
        frame.flags = VALID_IP_CHECKSUM | VALID_L4_CHECKSUM
        turn += 1
        if turn == templates.flows:
            turn = 0
    templates.next = turn
    if templates.left > 0:
        templates.left -= count
    return count


@step("i8(i8, i8, i8)")
def sink_deliver(address: int, frames: int, count: int) -> int:
    """Look at as much of the frames as was asked for. It always has room."""
    touch = touch_at(port_at(address).state).bytes
    if touch > 0:
        for index in range(count):
            frame = frame_at(frames + index * FRAME_SIZE)
            for at in range(0, min(touch, frame.size), LINE):
                load8(frame.address + at)
    return count
