"""Capture files into memory, for the replay port."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...dataplane.pcapfile import read_frames
from ...errors import UsageError
from ...memory.block import Block
from .replay import ITEM, RECORDING
from .state import MAX_FRAME

MAX_SPAN_NS = 366 * 24 * 3600 * 1_000_000_000
"""Longest recording that can be replayed at its own pace: a year."""
_ALIGN = 64


class Recording:
    """Frames in memory with the times at which they are due. `state.address` is for the port.

    pace: None: as fast as they are taken; "recorded": as the file says; a number: so many frames a second.
    loops: how often, None: without end. Raises UsageError as `read_frames` does, and for a pace or number that cannot be.
    """

    def __init__(self, path: str | Path, *, pace: float | str | None, loops: int | None) -> None:
        if isinstance(pace, str) and pace != "recorded":
            raise UsageError(f"replay at pace {pace!r}: take 'recorded', a number of frames a second, or None")
        if isinstance(pace, int | float) and not 0.001 <= pace <= 1e9:
            raise UsageError(f"replay of {pace} frames a second: take 0.001 to 1e9")
        if loops is not None and loops < 1:
            raise UsageError(f"replay {loops} times: take 1 or more, or None for no end")
        frames = read_frames(path, MAX_FRAME)
        sizes = np.array([len(data) for _, data in frames], np.int64)
        slots = -(-sizes // _ALIGN) * _ALIGN
        places = np.cumsum(slots) - slots
        self._memory = Block("u1", int(slots.sum()))
        for (_, data), place in zip(frames, places.tolist(), strict=True):
            self._memory.array[place : place + len(data)] = np.frombuffer(data, np.uint8)
        self._index = Block(ITEM, len(frames))
        self._index.array["address"] = self._memory.address + places
        self._index.array["size"] = sizes
        self._index.array["at"], span = _schedule(path, [time for time, _ in frames], pace)
        self.state = Block(RECORDING)
        self.state["index"] = self._index.address
        self.state["count"] = len(frames)
        self.state["left"] = -1 if loops is None else loops
        self.state["paced"] = int(pace is not None)
        self.state["span"] = span


def _schedule(path: str | Path, times: list[int], pace: float | str | None) -> tuple[list[int], int]:
    """When each frame is due, in ns from the beginning of a pass, and the length of a pass."""
    if pace is None:
        return [0] * len(times), 0
    if not isinstance(pace, str):
        return [round(number * 1e9 / pace) for number in range(len(times))], round(len(times) * 1e9 / pace)
    at = np.maximum.accumulate(np.array([time - times[0] for time in times], object))  # a clock set back makes no time run back
    if at[-1] > MAX_SPAN_NS:
        raise UsageError(
            f"{path}: recorded over {at[-1] // 10**9} s; at most {MAX_SPAN_NS // 10**9} s can be replayed at that pace"
        )
    mean = int(at[-1]) // max(len(times) - 1, 1)
    return [int(moment) for moment in at], int(at[-1]) + mean
