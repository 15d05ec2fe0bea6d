"""The yardstick of the demo's TCP: two namespaces with a TAP each, and nothing but relay.py between them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from vfio_vmbus.apps.lab import Lab
from vfio_vmbus.errors import UnavailableError

SLICE = 1.0  # seconds that one sample sends
_PATIENCE = 5.0  # seconds for the relay to end


class RelayedTaps:
    """A lab of two namespaces at one MTU (bytes), relayed; sleeps except while `gbit_per_s` measures.

    A context manager; raises UnavailableError where the machine forbids namespaces or TAPs.
    """

    def __init__(self, mtu: int) -> None:
        self._lab = Lab.pair(mtu)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._lab)
            self._left, self._right = self._lab.namespaces
            taps = (self._left.tap.fd, self._right.tap.fd)
            program = [sys.executable, "-I", str(Path(__file__).with_name("relay.py")), *map(str, taps)]
            self._relay = subprocess.Popen(program, stdin=subprocess.PIPE, pass_fds=taps, start_new_session=True)
            stack.callback(self._end)
            self._port = self._right.tcp_serve()
            self.gbit_per_s(0.1)  # neighbours found, both ends running
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def gbit_per_s(self, seconds: float = SLICE) -> float:
        """TCP payload through the relay in Gbit/s, one connection, counted where it arrives."""
        if self._relay.poll() is not None:
            raise UnavailableError(f"the relay ended with status {self._relay.returncode}")
        return self._left.tcp_send(self._right.address, self._port, seconds).gbit_per_s

    def _end(self) -> None:
        assert self._relay.stdin is not None
        self._relay.stdin.close()
        try:
            self._relay.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._relay.kill()
            self._relay.wait()
