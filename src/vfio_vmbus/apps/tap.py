"""A VMBus network card for the kernel's own TCP/IP stack: frames between a netvsc queue and a TAP, both ways, on one thread.

Nothing is copied on the way here: a frame is read from the TAP into the send buffer, and written to the TAP out of the receive buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from ..dataplane.worker import SPIN_NS, Worker, attention
from ..drivers.netvsc.driver import Netvsc
from ..drivers.netvsc.receive import frame_at, queue_at, rx_burst, rx_release
from ..drivers.netvsc.state import FRAME
from ..drivers.netvsc.transmit import FRAME_SIZE, tx_begin, tx_commit, tx_flush
from ..memory.access import viewer
from ..memory.block import Block
from ..memory.kernel import kernel, step
from ..memory.libc import sys_read, sys_write
from .idle import idle_round, needs_python

BURST = 64

BRIDGE = np.dtype(
    [
        ("queue", "i8"),
        ("fd", "i8"),
        ("control", "i8"),
        ("table", "i8"),
        ("from_tap", "i8"),
        ("from_tap_bytes", "i8"),
        ("to_tap", "i8"),
        ("to_tap_bytes", "i8"),
        ("tap_full", "i8"),  # frames that the TAP did not take
        ("tap_errors", "i8"),  # reads that failed
        ("retry", "i8"),  # bytes of a frame that is in place but that the ring had no room for
        ("place", "i8"),
    ]
)

bridge_at = viewer(BRIDGE)


class TapLike(Protocol):
    """A TAP: frames by read and write of a non-blocking descriptor."""

    @property
    def fd(self) -> int: ...


@dataclass(frozen=True)
class Counters:
    """Frames and bytes each way."""

    from_tap: int
    from_tap_bytes: int
    to_tap: int
    to_tap_bytes: int
    tap_full: int
    tap_errors: int


@step("i8(i8)")
def _to_tap(address: int) -> int:
    """Write what was received to the TAP. How many frames there were."""
    bridge = bridge_at(address)
    queue = queue_at(bridge.queue)
    count = rx_burst(queue, bridge.table, BURST)
    for index in range(count):
        frame = frame_at(bridge.table + index * FRAME_SIZE)
        if sys_write(bridge.fd, frame.address, frame.size) == frame.size:
            bridge.to_tap += 1
            bridge.to_tap_bytes += frame.size
        else:
            bridge.tap_full += 1
    if count > 0:
        rx_release(queue)
    return count


@step("i8(i8)")
def _from_tap(address: int) -> int:
    """Send what the TAP has, up to a burst. How many frames."""
    bridge = bridge_at(address)
    queue = queue_at(bridge.queue)
    count = 0
    while count < BURST:
        if bridge.retry == 0:
            bridge.place = tx_begin(queue, queue.longest, 0)
            if bridge.place == 0:
                break
            size = sys_read(bridge.fd, bridge.place, queue.longest)
            if size < 14:
                if size != -11:
                    bridge.tap_errors += 1
                break
            bridge.retry = size
        if tx_commit(queue, bridge.place, bridge.retry, 0) == 0:
            break
        bridge.from_tap += 1
        bridge.from_tap_bytes += bridge.retry
        bridge.retry = 0
        count += 1
    tx_flush(queue)
    return count


@kernel("void(i8)")
def _run(address: int) -> None:
    """Move frames until the worker is called or Python is needed."""
    bridge = bridge_at(address)
    empty = 0
    since = 0
    while attention(bridge.control) == 0 and not needs_python(bridge.queue):
        if _to_tap(address) + _from_tap(address) > 0:
            empty = 0
        else:
            empty, since = idle_round(bridge.control, bridge.queue, empty, since)


class TapBridge:
    """Runs from `start` (or a with statement) to `close`; NIC and TAP stay the caller's, and are touched by nobody else meanwhile.

    poll: "busy", "adaptive" or "interrupt". Raises what the queue's host did wrong from `close` and `check`.
    """

    def __init__(self, nic: Netvsc, tap: TapLike, *, poll: str = "adaptive", spin_ns: int = SPIN_NS) -> None:
        self._nic = nic
        self._table = Block(FRAME, BURST)
        self._state = Block(BRIDGE)
        self.worker = Worker("tap-bridge", self._work, self._state.address, poll=poll, spin_ns=spin_ns)
        for name, value in {
            "queue": nic.queue.address,
            "fd": tap.fd,
            "control": self.worker.control.address,
            "table": self._table.address,
        }.items():
            self._state[name] = value
        self.worker.watch(tap.fd)
        self.worker.watch(nic.queue.channel.interrupt)

    def start(self) -> None:
        self.worker.start()

    def check(self) -> None:
        """Raise what went wrong on the worker, if anything did."""
        with self.worker.paused():
            pass

    def counters(self) -> Counters:
        """The counters now."""
        return Counters(**{field.name: self._state[field.name] for field in fields(Counters)})

    def close(self) -> None:
        """Stop moving frames."""
        self.worker.stop()

    def __enter__(self) -> TapBridge:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self, address: int) -> None:
        _run(address)
        self._nic.poll()
