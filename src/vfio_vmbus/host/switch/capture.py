"""The capture port: copies of all frames that the switch forwards, as records of a pcap file, in a ring of bytes.

The worker's thread writes records, a thread of the capture's own writes the bytes to the file. One producer, one consumer; the
memory is mapped twice in a row, so that both deal with contiguous bytes only. Layout of a record: libpcap's savefile format 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...memory.access import (
    copy,
    copy16,
    fence,
    inline,
    load64,
    load64_acquire,
    store32,
    store64_release,
    viewer,
)
from ...memory.kernel import step
from ...memory.libc import EINTR, clock_ns, eventfd_signal, sys_write
from ..frames import FRAME_SIZE, frame_at, stamp
from .state import FLOOD, port_at

RECORD = 16
"""Bytes of a record's header: seconds, fraction, bytes captured, bytes of the frame; 32 bits each."""
SECOND = 1_000_000_000
WRITE_SIZE = 1 << 20
"""Bytes a write(2) at most."""

TAPE = np.dtype(
    [
        ("memory", "i8"),  # address of the ring's bytes
        ("size", "i8"),  # how many, a power of two
        ("head", "i8"),  # address of how many bytes were ever written; the worker's
        ("tail", "i8"),  # address of how many were ever taken; the file thread's
        ("snaplen", "i8"),  # bytes of a frame that are kept
        ("unit", "i8"),  # ns of one unit of the timestamps' fractions
        ("epoch", "i8"),  # ns to add to CLOCK_MONOTONIC for CLOCK_REALTIME
        ("signal", "i8"),  # eventfd that wakes the file thread
        ("header", "i8", (2,)),  # where a record's header is put together
        ("scratch", "i8", (2,)),
    ]
)
"""What a capture port keeps."""

_HEADER: int = TAPE.fields["header"][1]  # type: ignore[index]
_SCRATCH: int = TAPE.fields["scratch"][1]  # type: ignore[index]

tape_at = viewer(TAPE)


@inline
def _record(tape: Any, header: int, head: int, frame: Any, size: int) -> None:
    """Write the record of one frame at `head`; timestamp and room are seen to."""
    place = tape.memory + (head & (tape.size - 1))
    store32(header + 8, size)
    store32(header + 12, frame.size)
    copy16(place, header)
    copy(place + RECORD, frame.address, size)
    stamp(place + RECORD, frame)


@step("void(i8, i8, i8)")
def capture_take(address: int, frames: int, count: int) -> None:
    """Record the frames of a burst that go anywhere; those for which there is no room are counted."""
    port = port_at(address)
    tape = tape_at(port.state)
    header = port.state + _HEADER
    time = clock_ns(port.state + _SCRATCH) + tape.epoch
    store32(header, time // SECOND)
    store32(header + 4, time % SECOND // tape.unit)
    before = load64(tape.head)
    head = before
    tail = load64_acquire(tape.tail)
    for index in range(count):
        frame = frame_at(frames + index * FRAME_SIZE)
        if frame.target < FLOOD:
            continue
        size = min(frame.size, tape.snaplen)
        if head + RECORD + size - tail > tape.size:
            port.no_room += 1
            continue
        _record(tape, header, head, frame, size)
        head += RECORD + size
        port.tx_frames += 1
        port.tx_bytes += size
    if head != before:
        store64_release(tape.head, head)
        fence()
        if load64_acquire(tape.tail) == before:  # it was empty: the file thread may sleep
            eventfd_signal(tape.signal, port.state + _SCRATCH)


@step("i8(i8, i8)")
def capture_drain(address: int, fd: int) -> int:
    """On the file thread: write all there is to the file. Returns 0 once there is no more, or minus an errno."""
    tape = tape_at(address)
    tail = load64(tape.tail)
    while True:
        ready = load64_acquire(tape.head) - tail
        if ready == 0:
            return 0
        written = sys_write(fd, tape.memory + (tail & (tape.size - 1)), min(ready, WRITE_SIZE))
        if written == -EINTR:
            continue
        if written <= 0:
            return written
        tail += written
        store64_release(tape.tail, tail)
        fence()  # between giving room back and the look at the head: whoever fills an empty ring signals
