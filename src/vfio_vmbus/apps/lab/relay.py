"""The plainest way between two TAPs: a Python thread for each direction, one read and one write a frame.

The yardstick for whatever else moves frames between them, and what the lab's own tests run on.
"""

import os
import select
import threading
from types import TracebackType
from typing import Self

from vfio_vmbus.apps.lab.tap import Tap

ETHERNET_BYTES = 18  # header with a VLAN tag
BURST = 64  # frames between two looks at the poll set


class Relay:
    """Passes frames both ways between two TAPs for the time of a `with` block, and counts them."""

    def __init__(self, left: Tap, right: Tap) -> None:
        self.frames = [0, 0]  # left to right, right to left
        self.dropped = [0, 0]
        self._stop = -1
        self._threads = [
            threading.Thread(target=self._pass, args=(direction, source, sink), name=f"relay-{direction}")
            for direction, (source, sink) in enumerate([(left, right), (right, left)])
        ]

    def _pass(self, direction: int, source: Tap, sink: Tap) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(source.fd, select.POLLIN)
        size = source.mtu + ETHERNET_BYTES
        while all(fd != self._stop for fd, _ in poll.poll()):
            for _ in range(BURST):
                try:
                    frame = os.read(source.fd, size)
                except BlockingIOError:
                    break
                try:
                    os.write(sink.fd, frame)
                    self.frames[direction] += 1
                except OSError:  # the other interface is down, or out of memory
                    self.dropped[direction] += 1

    def __enter__(self) -> Self:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.eventfd_write(self._stop, 1)
        for thread in self._threads:
            thread.join()
        os.close(self._stop)
