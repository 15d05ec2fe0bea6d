"""The loops of the ring's benches: nothing but calls of the project's own steps, and a clock."""

from __future__ import annotations

from vfio_vmbus.memory.access import pause
from vfio_vmbus.memory.kernel import kernel
from vfio_vmbus.memory.libc import clock_ns
from vfio_vmbus.ring.bursts import receive_rows, send_rows
from vfio_vmbus.ring.primitives import in_ready, ring_at


@kernel("i8(i8, i8, i8, i8, i8, i8)")
def write_packets(address: int, memory: int, limit: int, table: int, burst: int, packets: int) -> int:
    """Send `packets` rows of the table, `burst` of them at a time; the nanoseconds that took, or -1 for a row that is no packet."""
    ring = ring_at(address)
    begin = clock_ns(ring.scratch)
    left = packets
    while left > 0 and ring.broken == 0:
        sent = send_rows(ring, memory, limit, table, min(burst, left))
        if sent < 0:
            return -1
        if sent == 0:
            pause()
        left -= sent
    return clock_ns(ring.scratch) - begin


@kernel("i8(i8, i8, i8, i8, i8, i8)")
def read_packets(address: int, memory: int, limit: int, table: int, burst: int, packets: int) -> int:
    """Receive `packets`, up to `burst` at a time; the nanoseconds from the first one's arrival to the last one's copy."""
    ring = ring_at(address)
    while not in_ready(ring) and ring.broken == 0:
        pause()
    begin = clock_ns(ring.scratch)
    left = packets
    while left > 0 and ring.broken == 0:
        received = receive_rows(ring, memory, limit, table, min(burst, left))
        if received == 0:
            pause()
        left -= received
    return clock_ns(ring.scratch) - begin
