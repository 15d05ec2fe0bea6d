"""How fast a card sends and receives: kernels that do nothing else, for a while."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..dataplane.worker import SPIN_NS, Worker, attention
from ..drivers.netvsc.driver import Netvsc
from ..drivers.netvsc.receive import queue_at, rx_burst
from ..drivers.netvsc.state import FRAME
from ..drivers.netvsc.transmit import tx_copy, tx_flush
from ..errors import UsageError
from ..memory.access import viewer
from ..memory.block import Block
from ..memory.kernel import kernel
from .idle import idle_round, needs_python

BURST = 64

LOAD = np.dtype(
    [("queue", "i8"), ("control", "i8"), ("table", "i8"), ("frame", "i8"), ("size", "i8"), ("sent", "i8"), ("received", "i8")]
)

load_at = viewer(LOAD)


@kernel("void(i8)")
def _send(address: int) -> None:
    """Send the same frame as fast as the host takes it."""
    load = load_at(address)
    queue = queue_at(load.queue)
    empty = 0
    since = 0
    while attention(load.control) == 0 and not needs_python(load.queue):
        count = 0
        while count < BURST and tx_copy(queue, load.frame, load.size, 0) != 0:
            count += 1
        tx_flush(queue)
        rx_burst(queue, load.table, BURST)
        load.sent += count
        if count > 0:
            empty = 0
        else:
            empty, since = idle_round(load.control, load.queue, empty, since)


@kernel("void(i8)")
def _receive(address: int) -> None:
    """Take what comes, and give it back at once."""
    load = load_at(address)
    queue = queue_at(load.queue)
    empty = 0
    since = 0
    while attention(load.control) == 0 and not needs_python(load.queue):
        count = rx_burst(queue, load.table, BURST)
        load.received += count
        if count > 0:
            empty = 0
        else:
            empty, since = idle_round(load.control, load.queue, empty, since)


@dataclass(frozen=True)
class Rate:
    """Frames of `size` bytes in `seconds`."""

    size: int
    frames: int
    seconds: float

    @property
    def mpps(self) -> float:
        """Million frames a second."""
        return self.frames / self.seconds / 1e6

    @property
    def gbit_per_s(self) -> float:
        """Of Ethernet frames, without preamble and FCS."""
        return self.mpps * self.size * 8 / 1000


def measure_sending(nic: Netvsc, frame: bytes, seconds: float) -> Rate:
    """Send `frame` over and over. Counts what the card took."""
    if not 14 <= len(frame) <= nic.info.mtu + 18:
        raise UsageError(f"a frame of {len(frame)} bytes; take 14 to {nic.info.mtu + 18}")
    load, frames = _run(nic, _send, "sent", frame, seconds)
    return Rate(len(frame), frames, load)


def measure_receiving(nic: Netvsc, size: int, seconds: float) -> Rate:
    """Count what comes, frames of `size` bytes each."""
    load, frames = _run(nic, _receive, "received", bytes(size), seconds)
    return Rate(size, frames, load)


def _run(nic: Netvsc, run: object, counted: str, frame: bytes, seconds: float) -> tuple[float, int]:
    table = Block(FRAME, BURST)
    memory = Block("u1", len(frame))
    memory.array[:] = np.frombuffer(frame, np.uint8)
    load = Block(LOAD)

    def work(address: int) -> None:
        run(address)  # type: ignore[operator]
        nic.poll()

    worker = Worker("measure", work, load.address, poll="adaptive", spin_ns=SPIN_NS)
    for name, value in {
        "queue": nic.queue.address,
        "control": worker.control.address,
        "table": table.address,
        "frame": memory.address,
        "size": len(frame),
    }.items():
        load[name] = value
    worker.watch(nic.queue.channel.interrupt)
    worker.start()
    try:
        start = time.monotonic()
        before = load[counted]
        time.sleep(seconds)
        frames = load[counted] - before
        elapsed = time.monotonic() - start
    finally:
        worker.stop()
    return elapsed, frames
