"""Write what a card receives to a pcap file."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dpkt

from ..drivers.netvsc.driver import Netvsc
from ..errors import UsageError


@dataclass(frozen=True)
class Captured:
    """Frames and bytes written (bytes of frames, without the file's headers)."""

    frames: int
    bytes: int


def capture(
    nic: Netvsc,
    path: str | Path,
    *,
    frames: int | None = None,
    seconds: float | None = None,
    snaplen: int = 65535,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda frames: None,
) -> Captured:
    """Write received frames with the time of their arrival here until `frames` or `seconds` are over, or `stop` says so.

    Raises UsageError for a file that cannot be written, PeerError when the host breaks the protocol or takes the card away.
    """
    try:
        with open(path, "wb") as file:
            return _write(nic, dpkt.pcap.Writer(file, snaplen=snaplen, nano=True), frames, seconds, snaplen, stop, progress)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _write(
    nic: Netvsc,
    writer: Any,
    limit: int | None,
    seconds: float | None,
    snaplen: int,
    stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> Captured:
    deadline = None if seconds is None else time.monotonic() + seconds
    count = size = 0
    while not stop() and (deadline is None or time.monotonic() < deadline):
        nic.poll()
        burst = nic.queue.rx_burst()
        if not len(burst):
            nic.check()
            nic.queue.wait(0.1)
            continue
        now = time.time()
        for address, length, _, _ in burst.tolist():
            if limit is not None and count >= limit:
                break
            writer.writepkt(ctypes.string_at(address, min(length, snaplen)), ts=now)
            count += 1
            size += length
        progress(count)
        if limit is not None and count >= limit:
            break
    return Captured(count, size)
