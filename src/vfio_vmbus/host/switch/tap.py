"""The TAP port: a descriptor that gives one frame a read(2) and takes one a write(2)."""

from __future__ import annotations

import numpy as np

from ...memory.access import copy, viewer
from ...memory.kernel import step
from ...memory.libc import EAGAIN, EINTR, sys_read, sys_write
from ..frames import FRAME_SIZE, frame_at, stamp
from .state import port_at

STAGED = 64
"""Frames that are read before they are forwarded."""
RETRY_NS = 100_000_000
"""After an error (the interface is down or gone), the descriptor is left alone for so long."""
ENOBUFS = 105

STAGING = np.dtype(
    [
        ("memory", "i8"),  # address of STAGED + 1 slots; the last one is for writing
        ("slot", "i8"),  # bytes of a slot, more than the port's max_frame, so that a longer frame is told from the longest
    ]
)
"""A TAP port's own memory."""

staging_at = viewer(STAGING)


@step("i8(i8, i8, i8)")
def tap_poll(address: int, frames: int, now: int) -> int:
    """Read frames until there is none, or STAGED are there. Lengths are for the switch to judge."""
    port = port_at(address)
    if port.retry_at > now:
        return 0
    staging = staging_at(port.state)
    count = 0
    while count < STAGED:
        place = staging.memory + count * staging.slot
        size = sys_read(port.fd, place, staging.slot)
        if size == -EINTR:
            continue
        if size <= 0:
            if size != -EAGAIN:  # 0, too: the other end of a socket is closed
                port.errors += 1
                port.last_error = -size
                port.retry_at = now + RETRY_NS
            break
        frame = frame_at(frames + count * FRAME_SIZE)
        frame.address = place
        frame.size = size
        frame.flags = 0
        count += 1
    return count


@step("i8(i8, i8, i8)")
def tap_deliver(address: int, frames: int, count: int) -> int:
    """Write frames, by way of private memory, so that they leave with the addresses that were checked.

    Returns how many were written or failed; what comes behind them found no room.
    """
    port = port_at(address)
    staging = staging_at(port.state)
    place = staging.memory + STAGED * staging.slot
    done = 0
    while done < count:
        frame = frame_at(frames + done * FRAME_SIZE)
        copy(place, frame.address, frame.size)
        stamp(place, frame)
        written = sys_write(port.fd, place, frame.size)
        if written == -EINTR:
            continue
        if written in (-EAGAIN, -ENOBUFS):
            break
        if written < 0:
            port.errors += 1
            port.last_error = -written
        else:
            port.tx_frames += 1
            port.tx_bytes += frame.size
        done += 1
    return done
