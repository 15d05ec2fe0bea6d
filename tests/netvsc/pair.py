"""Two drivers on one host, each with a card, and frames between them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfio_vmbus.channel.offered import OfferedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.drivers.netvsc.state import FRAME
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.netvsp.vsp import Netvsp
from vfio_vmbus.memory.block import Block
from vfio_vmbus.wire import oid

PATIENCE = 30.0
SMALL: dict[str, Any] = {"ring_pages": 16, "receive_buffer": 2 << 20, "send_buffer": 1 << 19}
_ROOM = 9216
_BURST = 64


@dataclass
class End:
    """One of the two: the card at the host, the client's device, its driver, and memory to send from."""

    card: Netvsp
    device: OfferedDevice
    nic: Netvsc

    def __post_init__(self) -> None:
        self._memory = Block("u1", _BURST * _ROOM)
        self._table = Block(FRAME, _BURST)

    def send(self, frames: Sequence[bytes], wish: int = 0) -> None:
        """Send all of them, in bursts. AssertionError when that takes too long."""
        deadline = time.monotonic() + PATIENCE
        for start in range(0, len(frames), _BURST):
            burst = frames[start : start + _BURST]
            for index, data in enumerate(burst):
                self._memory.array[index * _ROOM : index * _ROOM + len(data)] = np.frombuffer(data, np.uint8)
                self._table.array[index] = (self._memory.address + index * _ROOM, len(data), 0, wish)
            done = 0
            while done < len(burst):
                done += self.nic.queue.tx_burst(self._table.array[done : len(burst)])
                assert time.monotonic() < deadline, f"{done} of {len(burst)} frames sent"

    def received(self) -> list[tuple[bytes, int]]:
        """What is there now: (bytes, flags)."""
        rows = self.nic.queue.rx_burst()
        return [(ctypes.string_at(int(row["address"]), int(row["size"])), int(row["flags"])) for row in rows]

    def receive(self, count: int) -> list[tuple[bytes, int]]:
        """Wait for so many frames. AssertionError when they do not come."""
        deadline = time.monotonic() + PATIENCE
        frames: list[tuple[bytes, int]] = []
        while len(frames) < count:
            self.nic.queue.wait(0.1)
            frames += self.received()
            self.nic.poll()
            assert time.monotonic() < deadline, f"{len(frames)} of {count} frames came"
        return frames

    def nothing_comes(self, host: EmbeddedHost) -> None:
        """Whatever was on its way has arrived, and it was no frame."""
        for _ in range(3):
            with host.switch.worker.paused():
                pass
            assert self.received() == []


@dataclass
class Pair:
    """Frames from `left` reach `right`, and back."""

    host: EmbeddedHost
    left: End
    right: End

    def frame(self, size: int = 60, *, back: bool = False, target: bytes | None = None, fill: int = 7) -> bytes:
        """From left to right, or back."""
        source, destination = (self.right, self.left) if back else (self.left, self.right)
        return ((target or destination.nic.mac) + source.nic.mac + b"\x88\xb5").ljust(size, bytes([fill]))[:size]


@contextmanager
def pair(*, poll: str = "adaptive", card: dict[str, Any] | None = None, **options: Any) -> Iterator[Pair]:
    """card: options of both cards. options: of both drivers."""
    with ExitStack() as stack:
        host = stack.enter_context(EmbeddedHost(poll=poll))
        ends = []
        for name in ("left", "right"):
            vsp = host.add_nic(name, **(card or {}))
            device = stack.enter_context(open_device(host.attach(vsp)))
            filters = oid.PACKET_TYPE_DIRECTED | oid.PACKET_TYPE_BROADCAST | oid.PACKET_TYPE_ALL_MULTICAST
            nic = stack.enter_context(Netvsc(device, **(SMALL | {"packet_filter": filters} | options)))
            ends.append(End(vsp, device, nic))
        yield Pair(host, *ends)
