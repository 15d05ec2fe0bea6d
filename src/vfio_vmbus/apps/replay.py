"""Send the frames of a pcap or pcapng file through a card."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dataplane.pcapfile import read_frames
from ..drivers.netvsc.driver import Netvsc
from ..drivers.netvsc.state import FRAME
from ..errors import WaitTimeout
from ..memory.block import Block

BURST = 32
PATIENCE = 5.0
"""Seconds without room before giving up."""


@dataclass(frozen=True)
class Replayed:
    """Frames and bytes sent, and how long that took."""

    frames: int
    bytes: int
    seconds: float


def replay(
    nic: Netvsc,
    path: str | Path,
    *,
    loops: int = 1,
    recorded_pace: bool = False,
    progress: Callable[[int], None] = lambda frames: None,
) -> Replayed:
    """Send all frames `loops` times, until the host has taken them: as fast as the card takes them, or at the pace of the recording.

    Raises UsageError for a file that is no capture or has frames beyond the MTU, WaitTimeout when the host takes nothing any more,
    RescindedError when it takes the card away.
    """
    frames = read_frames(path, nic.info.mtu + 18)
    sizes = np.array([len(data) for _, data in frames], np.int64)
    places = np.cumsum(sizes) - sizes
    memory = Block("u1", int(sizes.sum()))
    memory.array[:] = np.frombuffer(b"".join(data for _, data in frames), np.uint8)
    table = Block(FRAME, len(frames))
    table.array["address"] = memory.address + places
    table.array["size"] = sizes
    start = time.monotonic()
    for loop in range(loops):
        if recorded_pace:
            _paced(nic, table, [moment for moment, _ in frames])
        else:
            for first in range(0, len(frames), BURST):
                _send(nic, table, first, min(first + BURST, len(frames)))
        progress((loop + 1) * len(frames))
    _drain(nic)
    return Replayed(loops * len(frames), loops * int(sizes.sum()), time.monotonic() - start)


def _drain(nic: Netvsc) -> None:
    """Until the host has taken everything: who closes the card earlier loses the last frames."""
    deadline = time.monotonic() + PATIENCE
    while True:
        nic.queue.rx_burst()
        if nic.queue.unanswered == 0:
            return
        if time.monotonic() > deadline:
            raise WaitTimeout(f"the host to take {nic.queue.unanswered} transfers", PATIENCE)
        _rest(nic)


def _paced(nic: Netvsc, table: Block, times: list[int]) -> None:
    start = time.monotonic()
    for index, moment in enumerate(times):
        left = (moment - times[0]) / 1e9 - (time.monotonic() - start)
        if left > 0:
            time.sleep(left)
        _send(nic, table, index, index + 1)


def _send(nic: Netvsc, table: Block, first: int, last: int) -> None:
    """Send rows [first, last), waiting for room."""
    deadline = time.monotonic() + PATIENCE
    while first < last:
        sent = nic.queue.tx_burst(table.array[first:last])
        first += sent
        if sent:
            continue
        if time.monotonic() > deadline:
            raise WaitTimeout("room to send", PATIENCE)
        nic.queue.rx_burst()  # completions stand behind received frames, which nobody wants here
        _rest(nic)


def _rest(nic: Netvsc) -> None:
    """Give the host time. Raises what has become of the card."""
    nic.check()
    nic.queue.wait(0.01)
