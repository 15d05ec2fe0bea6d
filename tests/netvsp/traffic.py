"""Traffic of honest clients, checked byte by byte, while others misbehave on the same host."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from types import TracebackType

import numpy as np

from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.drivers.netvsc.state import FRAME
from vfio_vmbus.memory.block import Block

_ROUND = 32
"""Frames that are under way at once, less than any buffer on the way holds."""
_PAUSE = 0.002
"""Seconds between rounds, in which the other threads of this process get their turn."""
_PATIENCE = 20.0


class Traffic:
    """Rounds of random frames from `sender` to `receiver`, on a thread of its own, until it is closed.

    Each frame that arrives is compared with the one that was sent. `check` raises what went wrong, loss included.
    """

    def __init__(self, sender: Netvsc, receiver: Netvsc, seed: int = 1) -> None:
        self.rounds = 0
        self.foreign: list[bytes] = []
        """Frames that came from somebody else."""
        self._sender = sender
        self._receiver = receiver
        self._random = random.Random(seed)
        self._memory = Block("u1", _ROUND * 2048)
        self._table = Block(FRAME, _ROUND)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="honest", daemon=True)

    def _main(self) -> None:
        try:
            while not self._stop.wait(_PAUSE):
                self._round()
        except BaseException as error:
            self._error = error

    def _round(self) -> None:
        sent = []
        for index in range(_ROUND):
            size = self._random.randint(14, 1514)
            data = (self._receiver.mac + self._sender.mac + b"\x08\x00" + self._random.randbytes(32) + bytes(size))[:size]
            self._memory.array[index * 2048 : index * 2048 + size] = np.frombuffer(data, np.uint8)
            self._table.array[index] = (self._memory.address + index * 2048, size, 0, 0)
            sent.append(data)
        done = 0
        deadline = time.monotonic() + _PATIENCE
        got: list[bytes] = []
        while len(got) < _ROUND:
            if done < _ROUND:
                done += self._sender.queue.tx_burst(self._table.array[done:])
            self._receiver.queue.wait(0.05)
            frames = [ctypes.string_at(int(row["address"]), int(row["size"])) for row in self._receiver.queue.rx_burst()]
            got += [data for data in frames if data[6:12] == self._sender.mac]
            self.foreign += [data for data in frames if data[6:12] != self._sender.mac]
            self._sender.queue.rx_burst()
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(got)} of {_ROUND} frames arrived in {_PATIENCE:g} s of round {self.rounds}")
        if got != sent:
            raise AssertionError(self._difference(got, sent))
        self.rounds += 1

    def _difference(self, got: list[bytes], sent: list[bytes]) -> str:
        at = next((index for index, pair in enumerate(zip(got, sent, strict=False)) if pair[0] != pair[1]), len(sent))
        texts = [f"{len(data)} bytes {data[:40].hex()}" for data in (*got[at : at + 1], *sent[at : at + 1])]
        return f"round {self.rounds}: {len(got)} frames of {len(sent)}, differing at {at}: {'; '.join(texts)}"

    def go_on(self) -> None:
        """Wait until a round that began from now on has passed. Raises what went wrong."""
        wanted = self.rounds + 2
        while self.rounds < wanted and self._thread.is_alive():
            time.sleep(0.001)
        self.check()

    def check(self) -> None:
        """Raise what went wrong, if anything has."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(2 * _PATIENCE)
