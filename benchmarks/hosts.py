"""A host with a switch and one card for benches: `Here`, in this process, or `There`, in another, which serves the card by vfio-user.

`python -m benchmarks.hosts SOCKET` is the other process. It answers lines on its standard input: "sink", "generator SIZE" (a port of that
kind), "count" (frames that the port has sent or taken so far), "remove" (the port).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.machine import ROOT, two_cores
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.serving import HostServer
from vfio_vmbus.host.switch.port import Port
from vfio_vmbus.vfio.device import Device
from vfio_vmbus.vfio.user.client import UserDevice

PEER = bytes.fromhex("02000000aa01")  # a station behind the switch
Count = Callable[[], int]


class Here:
    """The host in this process, its worker on the second core. A context manager. mac: of the card."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.host = self._stack.enter_context(EmbeddedHost())
        self.card = self.host.add_nic("card")
        self.mac = self.card.mac
        worker = next(thread for thread in threading.enumerate() if thread.name == self.host.switch.name)
        assert worker.native_id is not None
        assert worker.ident is not None
        os.sched_setaffinity(worker.native_id, {two_cores()[1]})
        self._clock = time.pthread_getcpuclockid(worker.ident)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def attach(self) -> Device:
        """The card's device."""
        return self.host.attach(self.card)

    def ran(self) -> float:
        """Seconds that the switch's worker has run so far."""
        return time.clock_gettime(self._clock)

    @contextmanager
    def sink(self) -> Iterator[Count]:
        """A port that takes everything, and how many frames it has had."""
        with self._port(self.host.switch.add_sink()) as count:
            yield count

    @contextmanager
    def generator(self, size: int) -> Iterator[Count]:
        """A port that sends frames of `size` bytes to the card as fast as it takes them, and how many came back."""
        with self._port(self.host.switch.add_generator(PEER, self.mac, size=size)) as count:
            yield count

    @contextmanager
    def _port(self, port: Port) -> Iterator[Count]:
        try:
            yield lambda: port.counters().tx_frames
        finally:
            self.host.switch.remove(port)


class There:
    """The host in another process, its worker on the second core. A context manager."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self.path = Path(folder) / "card"
            command = [sys.executable, "-m", "benchmarks.hosts", str(self.path)]
            pipe = subprocess.PIPE
            self._process = stack.enter_context(
                subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
            )
            assert self._process.stdin is not None
            stack.callback(self._process.stdin.close)
            self.mac = bytes.fromhex(self._line())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def attach(self) -> Device:
        return UserDevice(self.path)

    def ran(self) -> float:
        """The worker is nearly all that runs there. (The clock of one thread is for its own process only.)"""
        return time.clock_gettime(~self._process.pid << 3 | 2)

    @contextmanager
    def sink(self) -> Iterator[Count]:
        with self._port("sink") as count:
            yield count

    @contextmanager
    def generator(self, size: int) -> Iterator[Count]:
        with self._port(f"generator {size}") as count:
            yield count

    @contextmanager
    def _port(self, words: str) -> Iterator[Count]:
        self._ask(words)
        try:
            yield lambda: int(self._ask("count"))
        finally:
            self._ask("remove")

    def _ask(self, words: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process with the host ended with status {self._process.wait()}, see its words above")
        return line.strip()


def _serve(path: str) -> None:
    with Here() as here, HostServer(here.host) as server, ExitStack() as ports:
        server.listen(path, here.card)
        print(here.mac.hex(), flush=True)
        count: Count = int
        for line in sys.stdin:
            match line.split():
                case ["sink"]:
                    count = ports.enter_context(here.sink())
                case ["generator", size]:
                    count = ports.enter_context(here.generator(int(size)))
                case ["remove"]:
                    ports.close()
            print(count(), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
