"""Private memory with an address: the state records and tables that Python and kernels of one side share."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .registry import register, unregister

_LINE = 128
"""Blocks start on a pair of cache lines, so that the state of two threads never shares one."""


class Block:
    """`count` records of `dtype`, zeroed. `array` is the numpy view, `address` what kernels get."""

    def __init__(self, dtype: Any, count: int = 1) -> None:
        kind = np.dtype(dtype)
        size = kind.itemsize * count
        raw = np.zeros(size + 2 * _LINE, np.uint8)
        start = -raw.ctypes.data % _LINE
        self.array: NDArray[Any] = raw[start : start + size].view(kind)
        self.address = int(raw.ctypes.data) + start
        self.size = size
        register(self.address, size)
        weakref.finalize(self, unregister, self.address).atexit = False

    def __getitem__(self, field: str) -> int:
        return int(self.array[field][0])

    def __setitem__(self, field: str, value: int) -> None:
        self.array[field][0] = value
