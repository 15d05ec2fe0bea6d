"""What an application would write for a card that does nothing but send, or receive: loops over the driver's own steps."""

from __future__ import annotations

from vfio_vmbus.drivers.netvsc.receive import frame_at, queue_at, rx_burst
from vfio_vmbus.drivers.netvsc.transmit import FRAME_SIZE, tx_copy, tx_flush
from vfio_vmbus.memory.access import load64, load64_acquire, pause
from vfio_vmbus.memory.kernel import kernel

BURST = 32
"""Frames that the application deals with at a time."""


@kernel("void(i8, i8, i8, i8, i8)")
def send(queue_address: int, table: int, frame: int, size: int, stop: int) -> None:
    """Send copies of one frame, a burst at a time, until `stop` says so."""
    queue = queue_at(queue_address)
    while load64_acquire(stop) == 0:
        sent = 0
        while sent < BURST and tx_copy(queue, frame, size, 0) != 0:
            sent += 1
        tx_flush(queue)
        rx_burst(queue, table, BURST)  # nothing comes but completions
        if sent == 0:
            pause()


@kernel("i8(i8, i8, i8)")
def receive(queue_address: int, table: int, stop: int) -> int:
    """Take frames until `stop` says so, and look at the first bytes of each; the last one's."""
    queue = queue_at(queue_address)
    seen = 0
    while load64_acquire(stop) == 0:
        count = rx_burst(queue, table, BURST)
        for index in range(count):
            seen ^= load64(frame_at(table + index * FRAME_SIZE).address)
        if count == 0:
            pause()
    return seen


@kernel("void(i8)")
def use_no_sections(queue_address: int) -> None:
    """Let frames of any size go GPA-direct, as if the host's send sections were too short for all of them."""
    queue_at(queue_address).send_section = 0
