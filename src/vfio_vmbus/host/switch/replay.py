"""The replay port: the frames of a capture file, from memory, as fast as they are taken or each at its time."""

from __future__ import annotations

import numpy as np

from ...memory.access import viewer
from ...memory.kernel import step
from ..frames import FRAME_SIZE, frame_at
from .state import port_at

RECORDING = np.dtype(
    [
        ("index", "i8"),  # address of `count` ITEMs
        ("count", "i8"),
        ("next", "i8"),
        ("left", "i8"),  # passes still to come, the current one included; -1: without end
        ("paced", "i8"),  # 0: as fast as possible
        ("began", "i8"),  # when the current pass did, in ns of the switch's clock; 0: not yet
        ("span", "i8"),  # ns from the beginning of one pass to that of the next
        ("sent", "i8"),  # frames handed out
    ]
)
"""Frames and their times."""

ITEM = np.dtype(
    [
        ("address", "i8"),
        ("size", "i8"),
        ("at", "i8"),  # ns after the beginning of a pass
    ]
)
"""One frame of a recording."""

ITEM_SIZE = ITEM.itemsize
NEVER = 1 << 62

recording_at = viewer(RECORDING)
item_at = viewer(ITEM)


@step("i8(i8, i8, i8, i8)")
def replay_poll(address: int, frames: int, capacity: int, now: int) -> int:
    """Hand out up to `capacity` frames whose time has come."""
    recording = recording_at(port_at(address).state)
    if recording.began == 0:
        recording.began = now
    count = 0
    while count < capacity and recording.left != 0:
        item = item_at(recording.index + recording.next * ITEM_SIZE)
        if recording.paced != 0 and recording.began + item.at > now:
            break
        frame = frame_at(frames + count * FRAME_SIZE)
        frame.address = item.address
        frame.size = item.size
        frame.flags = 0
        count += 1
        recording.next += 1
        if recording.next == recording.count:
            recording.next = 0
            recording.began += recording.span
            if recording.left > 0:
                recording.left -= 1
    recording.sent += count
    return count


@step("i8(i8)")
def replay_due(address: int) -> int:
    """When the next frame's time comes, in ns of the switch's clock; NEVER after the last."""
    recording = recording_at(port_at(address).state)
    if recording.left == 0:
        return NEVER
    item = item_at(recording.index + recording.next * ITEM_SIZE)
    return recording.began + item.at if recording.paced != 0 else 0
