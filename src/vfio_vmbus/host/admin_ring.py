"""The carrier of a PCI function's client: messages in the admin ring, doorbell registers, interrupt vectors. docs/pci-personality.md."""

from __future__ import annotations

import asyncio
from collections import deque

from ..errors import ProtocolError
from ..memory.mapping import Piece
from ..ring.pair import RingPair
from ..vfio import eventfd
from ..vfio.function import PciFunction
from ..vfio.registers import ERROR_PROTOCOL
from ..wire.ring import PACKET_INBAND
from ..wire.table import Side
from .carrier import Carried
from .vsp import guarded

_BUDGET = 64
"""Messages taken before other clients get their turn."""
_RETRY_SECONDS = 0.001


class AdminRing:
    """Stands behind `function`, as its `Backend`."""

    def __init__(self, function: PciFunction) -> None:
        self.function = function
        self.name = function.name
        self.domain = function.domain
        self.channels = function.channels
        self.targets = len(function.vectors.fds)
        self._loop = asyncio.get_running_loop()
        self._carried: Carried | None = None
        self._ring: RingPair | None = None
        self._outbox: deque[bytes] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._doorbell = function.doorbell(0)

    @property
    def failed(self) -> bool:
        return self.function.failed

    # What the connection asks.

    def begin(self, carried: Carried) -> None:
        self._carried = carried
        self.function.backend = self
        self._loop.add_reader(self._doorbell, self.flush)

    def contact(self, target: int) -> None:
        """Messages go through the ring, whatever processor the client names."""

    def send(self, message: bytes) -> None:
        self._outbox.append(message)

    def flush(self) -> None:
        """The doorbell was rung, or there is more to do: go on."""
        carried = self._carried
        if carried is not None:  # else it was ended since this was called for, and the descriptor may be another's
            eventfd.take(self._doorbell)
            guarded(lambda: self._serve(carried), self.name, carried.fail)()

    def doorbell(self, relid: int) -> int:
        return self.function.doorbell(relid)

    def interrupt(self, relid: int, target: int) -> int:
        return self.function.vectors.fds[target]

    def fail(self, error: Exception) -> None:
        self.function.fail(ERROR_PROTOCOL)

    def end(self) -> None:
        if self._carried is None:
            return
        self._loop.remove_reader(self._doorbell)
        self.stop()
        self._carried = None
        self.function.backend = None

    # What the function asks.

    def start(self, pieces: list[Piece], downstream: int) -> None:
        """The client's ring is at `pieces`. Raises RingError for indices that cannot be."""
        self._ring = RingPair(pieces, downstream, Side.HOST, self.function.vectors.fds[0], f"{self.name}, admin ring")
        self._loop.call_soon(self.flush)

    def stop(self) -> None:
        """Let go of everything of the client's: channels, GPADLs, the ring."""
        if self._carried is not None:
            self._carried.reset()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._outbox.clear()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def revoke(self, iova: int, size: int) -> None:
        """The client takes memory away."""
        if self._carried is not None:
            self._carried.revoke(iova, size)

    # The ring.

    def _serve(self, carried: Carried) -> None:
        """Take what is in the ring, a number of messages at a time."""
        for _ in range(_BUDGET):
            if self._ring is None or not self._send_kept():
                return
            packet = self._ring.incoming.receive()
            if packet is None:
                if not self._ring.incoming.unmask():
                    return
                continue
            if packet.packet_type != PACKET_INBAND:
                raise ProtocolError(f"packet type {packet.packet_type} in the admin ring, need {PACKET_INBAND} (in-band)")
            carried.receive(packet.payload)
        self._loop.call_soon(self.flush)

    def _send_kept(self) -> bool:
        """Send what waits. False while the client's ring is full: then later."""
        while self._outbox and self._ring is not None:
            if not self._ring.outgoing.send(self._outbox[0]):
                if self._retry is None:
                    self._retry = self._loop.call_later(_RETRY_SECONDS, self._try_again)
                return False
            self._outbox.popleft()
        return True

    def _try_again(self) -> None:
        self._retry = None
        self.flush()
