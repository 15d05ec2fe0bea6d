"""I/O ports: which device has which, and what the ports have that nobody has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

Read = Callable[[int, int], int]
"""(offset from the device's first port, bytes) -> value"""
Write = Callable[[int, int, int], None]
"""(offset from the device's first port, bytes, value)"""

FLOATING: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}
"""What reads where nobody drives the bus, by the bytes that are read."""


class _Device(NamedTuple):
    first: int
    read: Read
    write: Write


class Ports:
    """The space of 65536 ports. Devices are added before the guest runs; then any vCPU's thread may use it."""

    def __init__(self) -> None:
        self._at = dict[int, _Device]()

    def add(self, first: int, count: int, read: Read, write: Write) -> None:
        """Give a device `count` ports, and accesses of any size that begin there."""
        for port in range(first, first + count):
            self._at[port] = _Device(first, read, write)

    def add_bytes(self, first: int, count: int, read: Callable[[int], int], write: Callable[[int, int], None]) -> None:
        """Give an 8-bit device `count` ports: a wider access is one to each of its ports in turn, as an ISA bus makes of it."""

        def read_all(offset: int, size: int) -> int:
            value = 0
            for number in range(size):
                byte = read(offset + number) if offset + number < count else 0xFF
                value |= byte << 8 * number
            return value

        def write_all(offset: int, size: int, value: int) -> None:
            for number in range(min(size, count - offset)):
                write(offset + number, value >> 8 * number & 0xFF)

        self.add(first, count, read_all, write_all)

    def read(self, port: int, size: int) -> int:
        """What the guest reads."""
        device = self._at.get(port)
        return FLOATING[size] if device is None else device.read(port - device.first, size)

    def write(self, port: int, size: int, value: int) -> None:
        """What the guest writes; without a device it is lost."""
        device = self._at.get(port)
        if device is not None:
            device.write(port - device.first, size, value)
