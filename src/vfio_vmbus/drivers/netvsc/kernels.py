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
    """Let the host signal (armed 1) and look once more: 1 if there is something, be it that a ring is broken. Or tell it not to (0)."""
    state = queue_at(queue)
    ring = ring_at(state.incoming)
    in_mask(ring, 1 - armed)
    if armed == 0:
        return 0
    return 1 if in_ready(ring) or ring.broken != 0 or ring_at(state.outgoing).broken != 0 else 0


@kernel("void(i8)")
def reap(queue: int) -> None:
    """`tx_reap` for Python."""
    tx_reap(queue_at(queue))
