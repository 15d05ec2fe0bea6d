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


def check(address: int, size: int) -> None:
    """Raise OutOfBounds unless [address, address + size) lies in one registered piece of memory."""
    index = bisect_right(_starts, address) - 1
    if size < 0 or index < 0 or address + size > _ends[_starts[index]]:
        raise OutOfBounds(f"access of {size} bytes at {address:#x} is outside registered memory")
