"""Send frames back where they came from, or through a function of your own, at the speed of the ring.

@numba.njit
def answer(address, size):      # of the Ethernet header; change the frame in place; 0 drops it
    ...
    return 1

with Forwarder(nic, function=answer): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np

from ..dataplane.worker import SPIN_NS, Worker, attention
from ..drivers.netvsc.driver import Netvsc
from ..drivers.netvsc.receive import frame_at, queue_at, rx_burst, tx_reap
from ..drivers.netvsc.state import FRAME
from ..drivers.netvsc.transmit import FRAME_SIZE, tx_copy, tx_flush
from ..memory.access import inline, load16, load32, store16, store32, viewer
from ..memory.block import Block
from ..memory.kernel import INTERPRETED, kernel
from .idle import idle_round, needs_python

BURST = 64

FORWARD = np.dtype(
    [("queue", "i8"), ("control", "i8"), ("table", "i8"), ("received", "i8"), ("sent", "i8"), ("bytes", "i8"), ("dropped", "i8")]
)

forward_at = viewer(FORWARD)


@dataclass(frozen=True)
class Counters:
    """Frames received and sent back, bytes of the latter; dropped: by the function, or for want of room."""

    received: int
    sent: int
    bytes: int
    dropped: int


@inline
def swap_addresses(address: int, size: int) -> int:
    """Back to the sender: destination and source change places. Always 1."""
    destination, rest = load32(address), load16(address + 4)
    store32(address, load32(address + 6))
    store16(address + 4, load16(address + 10))
    store32(address + 6, destination)
    store16(address + 10, rest)
    return 1


def _forward_kernel(function: Any) -> Any:
    """The loop around `function`. Compiled into one piece with it."""

    def run(address: int) -> None:
        state = forward_at(address)
        queue = queue_at(state.queue)
        empty = 0
        since = 0
        while attention(state.control) == 0 and not needs_python(state.queue):
            count = rx_burst(queue, state.table, BURST)
            if count == 0:
                empty, since = idle_round(state.control, state.queue, empty, since)
                continue
            empty = 0
            state.received += count
            for index in range(count):
                frame = frame_at(state.table + index * FRAME_SIZE)
                if function(frame.address, frame.size) == 0:
                    state.dropped += 1
                    continue
                if tx_copy(queue, frame.address, frame.size, 0) == 0:
                    tx_flush(queue)
                    tx_reap(queue)
                    if tx_copy(queue, frame.address, frame.size, 0) == 0:
                        state.dropped += 1
                        continue
                state.sent += 1
                state.bytes += frame.size
            tx_flush(queue)

    return run


_swap = kernel("void(i8)")(_forward_kernel(swap_addresses))


class Forwarder:
    """Runs from `start` (or a with statement) to `close` on `nic`'s queue, which nobody else touches meanwhile.

    function(address, size) -> int: compiled by numba.njit; gets each frame in place, may change it, and says whether it goes back (1)
    or not (0). By default MAC addresses are swapped. poll: "busy", "adaptive" or "interrupt".
    """

    def __init__(
        self, nic: Netvsc, *, function: Callable[[int, int], int] | None = None, poll: str = "adaptive", spin_ns: int = SPIN_NS
    ) -> None:
        self._nic = nic
        self._table = Block(FRAME, BURST)
        self._state = Block(FORWARD)
        if function is None:
            self._kernel = _swap
        else:
            made = _forward_kernel(function)
            self._kernel = made if INTERPRETED else numba.njit("void(i8)", nogil=True, error_model="numpy")(made)
        self.worker = Worker("forward", self._work, self._state.address, poll=poll, spin_ns=spin_ns)
        self._state["queue"] = nic.queue.address
        self._state["control"] = self.worker.control.address
        self._state["table"] = self._table.address
        self.worker.watch(nic.queue.channel.interrupt)

    def start(self) -> None:
        self.worker.start()

    def counters(self) -> Counters:
        """The counters now."""
        return Counters(**{field.name: self._state[field.name] for field in fields(Counters)})

    def close(self) -> None:
        """Stop."""
        self.worker.stop()

    def __enter__(self) -> Forwarder:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self, address: int) -> None:
        self._kernel(address)
        self._nic.poll()
