"""Frames of capture files, pcap and pcapng, read by dpkt; nothing in them is believed."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import dpkt

from ..errors import UsageError

MAX_FILE = 1 << 30
"""Bytes of the largest file; it is held in memory."""
MAX_BLOCK = 1 << 16
"""Bytes of the largest pcapng block: parsing its options takes time that grows with the square of their number."""
HEADER = 14
"""Bytes of an Ethernet header."""


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


def read_frames(path: str | Path, max_frame: int) -> list[tuple[int, bytes]]:
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
