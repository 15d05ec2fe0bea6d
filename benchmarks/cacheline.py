"""How far the two cores are apart right now: the round trip of one cache line between two threads.

On virtual machines that moves between a near state (some 80-145 ns) and a far one (300-750 ns), and whatever
hands packets from core to core is about three times slower in the far one: a figure says little without it.
Independent of the project's own memory access, so that the probe stays what it is while the project changes.
"""

from __future__ import annotations

import mmap
import threading
import time
from statistics import median
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from benchmarks.machine import pinned, two_cores

TRIPS = 2_000  # in a batch: some 0.2-1.5 ms
BATCHES = 11
PATIENCE = 400_000_000  # looks without an answer before the other thread counts as lost: 0.1 s and more


@intrinsic
def _load(_typing: Any, address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(address), generate


@intrinsic
def _store(_typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(address, value), generate


@numba.njit("int64(int64, int64, int64, int64)", nogil=True)
def _rally(address: int, first: int, strokes: int, patience: int) -> int:
    """Wait for `first` at the address and answer with the number after it; then for the one after that, ...

    Returns the strokes played, fewer than asked when the other side kept silent.
    """
    for stroke in range(strokes):
        wanted = first + 2 * stroke
        looks = 0
        while _load(address) != wanted:
            looks += 1
            if looks > patience:
                return stroke
        _store(address, wanted + 1)
    return strokes


def round_trip_ns() -> float | None:
    """The median of several batches, in ns; None with only one core, or when the other does not answer."""
    near, far = two_cores()
    if near == far:
        return None
    line = mmap.mmap(-1, mmap.PAGESIZE)
    word = np.frombuffer(line, dtype=np.int64)
    address = int(word.ctypes.data)
    total = TRIPS * BATCHES

    def answer() -> None:
        with pinned(far):
            _rally(address, 1, total, PATIENCE)

    other = threading.Thread(target=answer, name="cacheline")
    other.start()
    times: list[int] = []
    try:
        with pinned(near):
            for batch in range(BATCHES):
                begin = time.perf_counter_ns()
                if _rally(address, 2 * TRIPS * batch, TRIPS, PATIENCE) != TRIPS:
                    return None
                times.append(time.perf_counter_ns() - begin)
    finally:
        other.join()
        del word
        line.close()
    return round(median(times) / TRIPS, 1)
