"""PCI's configuration ports with one function behind them, a host bridge, and nothing else on the bus.

Linux wants to see PCI before it enters what the memory map has late (arch/x86/pci/legacy.c), persistent memory among it.
Source: PCI Local Bus Specification 3.0, section 3.2.2.3.2 (configuration mechanism #1).
"""

from __future__ import annotations

import struct
from typing import Final

PORT: Final = 0xCF8
ADDRESS_PORTS: Final = 1
DATA: Final = 0xCFC
DATA_PORTS: Final = 4

_ENABLE: Final = 1 << 31
_HEADER: Final = struct.pack("<HHHHI", 0x1B36, 0x0008, 0, 0, 0x06000000).ljust(64, b"\0")
"""A host bridge without anything (the number is that of QEMU's generic one)."""


class HostBridge:
    """The address register, and what it selects. Nothing can be changed."""

    def __init__(self) -> None:
        self._address = 0

    def read_address(self, _: int, size: int) -> int:
        return self._address if size == 4 else (1 << 8 * size) - 1

    def write_address(self, _: int, size: int, value: int) -> None:
        if size == 4:  # narrower ones are no configuration address
            self._address = value & 0x80FFFFFC

    def read_data(self, offset: int, size: int) -> int:
        none = (1 << 8 * size) - 1
        if self._address & ~0xFF != _ENABLE:  # another bus, device or function
            return none
        at = (self._address & 0xFC) + offset
        return int.from_bytes(_HEADER[at : at + size].ljust(size, b"\0"), "little") if at < 256 else none

    def write_data(self, offset: int, size: int, value: int) -> None:
        """It is all read-only."""
