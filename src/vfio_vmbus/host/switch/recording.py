"""Capture files into memory, for the replay port: pcap and pcapng, read by dpkt, and nothing in them believed."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import dpkt
import numpy as np

from ...errors import UsageError
from ...memory.block import Block
from .replay import ITEM, RECORDING
from .state import HEADER, MAX_FRAME

MAX_FILE = 1 << 30
"""Bytes of the largest file; it is held in memory."""
MAX_BLOCK = 1 << 16
"""Bytes of the largest pcapng block: parsing its options takes time that grows with the square of their number."""
MAX_SPAN_NS = 366 * 24 * 3600 * 1_000_000_000
"""Longest recording that can be replayed at its own pace: a year."""
_ALIGN = 64


class _Source(io.BytesIO):
    """A file's bytes for dpkt, which does not tell the end of a file from the middle of a record."""

    cut = False
    """Did the last read get less than it wanted?"""
    torn = False
    """Did any read get less than it wanted, but not nothing?"""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise ValueError("a length that is shorter than its own header")
        data = super().read(min(size, MAX_BLOCK + 1))
        if len(data) > MAX_BLOCK:
            raise ValueError(f"a frame or block of {size} bytes; the limit is {MAX_BLOCK}")
        self.cut = len(data) < size
        self.torn |= 0 < len(data) < size
        return data


def _bytes_of(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE:
        raise UsageError(f"{path}: more than {MAX_FILE} bytes, the limit of a replay")
    return data


def _frames_in(path: Path) -> Iterator[tuple[int, bytes]]:
    """Time in ns and bytes of each frame, as dpkt finds them."""
    source = _Source(_bytes_of(path))
    reader = dpkt.pcap.UniversalReader(source)
    if reader.datalink() != dpkt.pcap.DLT_EN10MB:
        raise UsageError(f"{path}: link type {reader.datalink()}; only Ethernet ({dpkt.pcap.DLT_EN10MB}) can be replayed")
    number = 0
    for seconds, data in reader:
        number += 1
        if source.cut:
            raise UsageError(f"{path}: ends within frame {number}")
        yield int(seconds * 1_000_000_000), data
    if source.torn:
        raise UsageError(f"{path}: ends within frame {number + 1}")


def read_frames(path: str | Path, max_frame: int = MAX_FRAME) -> list[tuple[int, bytes]]:
    """All frames of a pcap or pcapng file: time in ns since 1970 (as exact as a double is) and bytes.

    Raises UsageError, in one line, for a file that cannot be read, is no capture or a damaged one, is not of Ethernet, has no
    frames, or has one that is shorter than a header or longer than `max_frame`.
    """
    path = Path(path)
    try:
        frames = list(_frames_in(path))
    except (dpkt.Error, struct.error, ValueError, ArithmeticError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not a pcap or pcapng file, or a damaged one ({error})") from error
    if not frames:
        raise UsageError(f"{path}: holds no frames")
    for number, (_, data) in enumerate(frames, 1):
        if not HEADER <= len(data) <= max_frame:
            raise UsageError(f"{path}: frame {number} has {len(data)} bytes; {HEADER} to {max_frame} can be replayed")
    return frames


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
        frames = read_frames(path)
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
