"""How much memory this machine has left, as the host wants to know it. Pages of 4096 bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import UnavailableError

_MEMINFO = Path("/proc/meminfo")
_KIB_PER_PAGE = 4
_PAGES_PER_MIB = 256

_FLOORS = ((128, 8, 1), (512, 40, 2), (2048, 104, 3), (8192, 232, 4))
"""(below so many MiB of memory, MiB, shift): the floor is so many MiB and the memory shifted by so much."""
_LAST_FLOOR = (488, 5)


@dataclass(frozen=True)
class Pressure:
    """total, available: of the machine. committed: what its processes have been promised. swap: all of it."""

    total: int
    available: int
    committed: int
    swap: int


def floor(total: int) -> int:
    """Pages that a machine with `total` pages keeps whatever the host asks: Linux's compute_balloon_floor (hv_balloon.c)."""
    base, shift = _LAST_FLOOR
    for mib, its_base, its_shift in _FLOORS:
        if total < mib * _PAGES_PER_MIB:
            base, shift = its_base, its_shift
            break
    return base * _PAGES_PER_MIB + (total >> shift)


def read_pressure(path: Path = _MEMINFO) -> Pressure:
    """From /proc/meminfo. Raises UnavailableError where that is not to be read or has not what it takes."""
    try:
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        total, available, committed, swap = (
            int(rows[name].split()[0]) // _KIB_PER_PAGE for name in ("MemTotal", "MemAvailable", "Committed_AS", "SwapTotal")
        )
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UnavailableError(f"{path} does not say how much memory there is: {error!r}") from error
    return Pressure(total, available, committed, swap)
