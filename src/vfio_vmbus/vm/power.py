"""Where a guest powers off and resets: ACPI's fixed registers, the reset port, and the two ways of old PCs.

Sources: ACPI specification 6.5, section 4.8.3 (PM1 registers); the port numbers are in `acpi`'s tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .acpi import PM1_CONTROL, PM1_EVENT, RESET_PORT, S5_TYPE
from .ports import Ports

_SCI_ENABLED: Final = 1 << 0
_SLEEP_ENABLE: Final = 1 << 13
_KEYBOARD: Final = 0x64
_PULSE_RESET: Final = 0xFE
_FAST: Final = 0x92


class Power:
    """power_off, reset: called when the guest wants that, on its vCPU's thread."""

    def __init__(self, ports: Ports, power_off: Callable[[], None], reset: Callable[[], None]) -> None:
        self._power_off = power_off
        self._reset = reset
        self._enable = 0
        ports.add(PM1_EVENT, 4, self._read_event, self._write_event)
        ports.add(PM1_CONTROL, 2, self._read_control, self._write_control)
        ports.add_bytes(RESET_PORT, 1, lambda _: 0, lambda _, value: self._reset_if(value & 0x04))
        ports.add_bytes(_FAST, 1, lambda _: 0x02, lambda _, value: self._reset_if(value & 0x01))
        # There is no keyboard; but who wants a reset of its controller first waits until it could take a command.
        ports.add_bytes(_KEYBOARD, 1, lambda _: 0, lambda _, value: self._reset_if(value == _PULSE_RESET))

    def _reset_if(self, wanted: int) -> None:
        if wanted:
            self._reset()

    def _read_event(self, offset: int, size: int) -> int:
        """No event has happened; which of them may interrupt is kept."""
        value = self._enable << 16
        return value >> 8 * offset & (1 << 8 * size) - 1

    def _write_event(self, offset: int, size: int, value: int) -> None:
        if offset == 2 and size == 2:
            self._enable = value

    def _read_control(self, offset: int, size: int) -> int:
        return _SCI_ENABLED >> 8 * offset

    def _write_control(self, offset: int, size: int, value: int) -> None:
        value <<= 8 * offset
        if value & _SLEEP_ENABLE and value >> 10 & 7 == S5_TYPE:
            self._power_off()
