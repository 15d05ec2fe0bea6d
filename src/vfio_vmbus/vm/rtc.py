"""The real-time clock, MC146818: the time of day in UTC, and 114 bytes that the guest may keep something in.

Linux reads the time once while it starts; without an answer it tries for 5 s. No alarm and no interrupt; setting the time has no effect.
Source: Motorola MC146818; drivers/rtc/rtc-mc146818-lib.c for what Linux reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PORT: Final = 0x70
PORTS: Final = 2

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 10, 11, 12, 13
CENTURY: Final = 0x32

_A_DIVIDER: Final = 0x26
"""Runs at 32768 Hz; no update in progress, ever: a value is right whenever it is read."""
_B_24_HOURS: Final = 0x02
_D_VALID: Final = 0x80


class Rtc:
    """Two ports: an index, and what it selects. now: seconds since 1970."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._index = 0
        self._kept = bytearray(128)

    def read(self, port: int) -> int:
        """A byte of port 0 or 1."""
        if port == 0:
            return 0xFF  # the index cannot be read
        index = self._index
        if index == REGISTER_A:
            return _A_DIVIDER
        if index == REGISTER_B:
            return _B_24_HOURS
        if index == REGISTER_C:
            return 0
        if index == REGISTER_D:
            return _D_VALID
        value = self._time().get(index)
        return self._kept[index] if value is None else _bcd(value)

    def write(self, port: int, value: int) -> None:
        """Store a byte to port 0 or 1."""
        if port == 0:
            self._index = value & 0x7F  # the highest bit masks NMIs, of which there are none
        elif self._index > REGISTER_D and self._index != CENTURY:
            self._kept[self._index] = value

    def _time(self) -> dict[int, int]:
        now = time.gmtime(self._now())
        return {
            SECONDS: min(now.tm_sec, 59),
            MINUTES: now.tm_min,
            HOURS: now.tm_hour,
            WEEKDAY: (now.tm_wday + 1) % 7 + 1,  # 1 is Sunday
            DAY: now.tm_mday,
            MONTH: now.tm_mon,
            YEAR: now.tm_year % 100,
            CENTURY: now.tm_year // 100,
        }


def _bcd(value: int) -> int:
    return value // 10 << 4 | value % 10
