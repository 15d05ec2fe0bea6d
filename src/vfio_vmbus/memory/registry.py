"""The memory that interpreted kernels may touch: every owner of memory registers it, every checked access looks here."""

from __future__ import annotations

from bisect import bisect_right, insort


class OutOfBounds(Exception):
    """A kernel would have left its memory. Never caught: it is a defect of this project, found by its tests."""


_starts: list[int] = []
_ends: dict[int, int] = {}


def register(address: int, size: int) -> None:
    """Let interpreted kernels touch [address, address + size)."""
    if address in _ends:
        raise OutOfBounds(f"memory at {address:#x} is registered already")
    _ends[address] = address + size  # before the start, which other threads look up first
    insort(_starts, address)


def unregister(address: int) -> None:
    """Forget the memory that was registered at `address`."""
    _starts.remove(address)
    del _ends[address]


def _inside(address: int, size: int) -> bool:
    index = bisect_right(_starts, address) - 1
    start = _starts[index] if 0 <= index < len(_starts) else address + 1
    return start <= address and address + size <= _ends.get(start, 0)


def check(address: int, size: int) -> None:
    """Raise OutOfBounds unless [address, address + size) lies in one registered piece of memory.

    Another thread may register memory between our looks at the lists, and move what we found: so no is only no the third time.
    """
    if size < 0 or not (_inside(address, size) or _inside(address, size) or _inside(address, size)):
        raise OutOfBounds(f"access of {size} bytes at {address:#x} is outside registered memory")


def registered() -> int:
    """How many pieces of memory are registered."""
    return len(_ends)
