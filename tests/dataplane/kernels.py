"""The helpers of kernels, compiled so that tests can call them."""

from __future__ import annotations

from vfio_vmbus.dataplane.checksum import fill_ipv4, fill_l4
from vfio_vmbus.dataplane.rndis import parse, write_header
from vfio_vmbus.memory.kernel import kernel


@kernel("i8(i8, i8, i8, i8, i8)")
def parse_message(out: int, base: int, at: int, limit: int, longest: int) -> int:
    return parse(out, base, at, limit, longest)


@kernel("void(i8, i8, i8, i8, i8)")
def write_message(message: int, size: int, total: int, kind: int, info: int) -> None:
    write_header(message, size, total, kind, info)


@kernel("i8(i8, i8)")
def fill_l3_checksum(frame: int, size: int) -> int:
    return fill_ipv4(frame, size)


@kernel("i8(i8, i8)")
def fill_l4_checksum(frame: int, size: int) -> int:
    return fill_l4(frame, size)
