"""The queue's data plane as compiled functions that Python calls: bursts in, bursts out."""

from __future__ import annotations

from ...memory.kernel import kernel
from ...ring.primitives import in_mask, in_ready, ring_at
from .receive import frame_at, queue_at, rx_burst, rx_release, tx_reap
from .transmit import FRAME_SIZE, tx_copy, tx_flush


@kernel("i8(i8, i8, i8)")
def receive_burst(queue: int, table: int, capacity: int) -> int:
    """`rx_burst` for Python."""
    return rx_burst(queue_at(queue), table, capacity)


@kernel("i8(i8, i8, i8)")
def transmit_burst(queue: int, table: int, count: int) -> int:
    """Send copies of up to `count` frames of the table, and show them to the host. How many there was room for."""
    state = queue_at(queue)
    done = 0
    while done < count:
        frame = frame_at(table + done * FRAME_SIZE)
        if tx_copy(state, frame.address, frame.size, frame.checksum) == 0:
            break
        done += 1
    tx_flush(state)
    return done


@kernel("i8(i8)")
def release(queue: int) -> int:
    """`rx_release` for Python."""
    return rx_release(queue_at(queue))


@kernel("i8(i8, i8)")
def arm(queue: int, armed: int) -> int:
    """Let the host signal (armed 1) and look once more: 1 if there is something. Or tell it not to (0)."""
    ring = ring_at(queue_at(queue).incoming)
    in_mask(ring, 1 - armed)
    return 1 if armed != 0 and in_ready(ring) else 0


@kernel("void(i8)")
def reap(queue: int) -> None:
    """`tx_reap` for Python."""
    tx_reap(queue_at(queue))
