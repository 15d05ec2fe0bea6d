"""The loops of the ring's benches: nothing but calls of the project's own steps, and a clock."""

from __future__ import annotations

from typing import Any

from vfio_vmbus.memory.access import inline
from vfio_vmbus.memory.kernel import kernel
from vfio_vmbus.memory.libc import clock_ns
from vfio_vmbus.memory.signal import SCRATCH
from vfio_vmbus.ring.bursts import packet_at, receive_rows, send_rows, take
from vfio_vmbus.ring.primitives import in_header, in_next, in_ready, rest, ring_at


@kernel("i8(i8, i8, i8, i8, i8)")
def write_packets(address: int, memory: int, table: int, burst: int, packets: int) -> int:
    """Send `packets` rows of the table, `burst` of them at a time; the nanoseconds that took."""
    ring = ring_at(address)
    begin = clock_ns(ring.signal + SCRATCH)
    left = packets
    while left > 0 and ring.broken == 0:
        sent = send_rows(ring, memory, table, min(burst, left))
        if sent == 0:
            rest()
        left -= sent
    return clock_ns(ring.signal + SCRATCH) - begin


@inline
def _read_bursts(ring: Any, memory: int, limit: int, table: int, burst: int, left: int) -> None:
    while left > 0 and ring.broken == 0:
        received = receive_rows(ring, memory, limit, table, min(burst, left))
        if received == 0:
            rest()
        left -= received


@inline
def _read_singles(ring: Any, memory: int, table: int, left: int) -> None:
    row = packet_at(table)
    while left > 0 and ring.broken == 0:
        if not in_ready(ring):
            rest()
            continue
        header = in_header(ring)
        if header < 0:
            break
        take(ring, header, row, memory, 0)
        in_next(ring, header)
        left -= 1


@kernel("i8(i8, i8, i8, i8, i8, i8)")
def read_packets(address: int, memory: int, limit: int, table: int, burst: int, packets: int) -> int:
    """Receive `packets`, up to `burst` at a time; the nanoseconds from the first one's arrival to the last one's copy."""
    ring = ring_at(address)
    while not in_ready(ring) and ring.broken == 0:
        rest()
    begin = clock_ns(ring.signal + SCRATCH)
    if burst == 1:
        _read_singles(ring, memory, table, packets)
    else:
        _read_bursts(ring, memory, limit, table, burst, packets)
    return clock_ns(ring.signal + SCRATCH) - begin
