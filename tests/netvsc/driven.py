"""A driver over a scripted host, with buffers so small that everything in them comes round often."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.drivers.netvsc.state import FRAME
from vfio_vmbus.memory.block import Block
from vfio_vmbus.testing.scripted import RECEIVE_SECTION, SEND_SECTION, ScriptedDevice, ScriptedHost

RECEIVE_SECTIONS = 64
SEND_SECTIONS = 8
SMALL: dict[str, Any] = {
    "ring_pages": 3,
    "receive_buffer": RECEIVE_SECTIONS * RECEIVE_SECTION,
    "send_buffer": SEND_SECTIONS * SEND_SECTION,
    "timeout": 5.0,
}


class Driven:
    """Host and driver of a card that is up."""

    def __init__(self, host: ScriptedHost, nic: Netvsc) -> None:
        self.host = host
        self.nic = nic
        self._memory = Block("u1", 64 * 9216)
        self._table = Block(FRAME, 64)
        self.received()  # the last answer of the handshake goes back

    def send(self, frames: Sequence[tuple[bytes, int]]) -> int:
        """A burst of frames, as (bytes, checksum wish), of at most 64. How many the queue took."""
        for index, (data, wish) in enumerate(frames):
            self._memory.array[index * 9216 : index * 9216 + len(data)] = np.frombuffer(data, np.uint8)
            self._table.array[index] = (self._memory.address + index * 9216, len(data), 0, wish)
        return self.nic.queue.tx_burst(self._table.array[: len(frames)])

    def received(self, count: int | None = None) -> list[tuple[bytes, int]]:
        """A burst from the host, as (bytes, flags)."""
        rows = self.nic.queue.rx_burst(count)
        return [(ctypes.string_at(int(row["address"]), int(row["size"])), int(row["flags"])) for row in rows]


@contextmanager
def driven(host: ScriptedHost | None = None, **options: Any) -> Iterator[Driven]:
    """options: of Netvsc."""
    host = host or ScriptedHost()
    with ScriptedDevice(host) as device, Netvsc(device, **(SMALL | options)) as nic:
        made = Driven(host, nic)
        host.turn()
        host.completed.clear()
        yield made
