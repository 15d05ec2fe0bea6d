"""The host's process, as the driver's process sees it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import IO, TypeVar

from ..channel.device import VmbusDevice
from ..channel.opening import open_device
from ..errors import LocalError, WaitTimeout
from ..testing.attacker import Outcome
from ..testing.judge import Finding
from ..vfio.user.client import UserDevice
from . import messages

_ANSWER_SECONDS = 60.0
"""The first start compiles the host's data path."""
_EXIT_SECONDS = 10.0

R = TypeVar("R")


class HostProcess:
    """Requests, one at a time. As the `HostSide` of a raid it asks the judge over there. Made by `host_process`.

    Raises LocalError when the process has died, WaitTimeout when it does not answer.
    """

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self._control = control
        self._process = process
        self._said = said
        self._lock = Lock()
        self.pid = process.pid
        self.ready = messages.Ready(b"", ())

    def set_up(self, mac: bytes, tap: int | None) -> None:
        """Start the host; see `messages.SetUp`."""
        self.ready = self._call(messages.SetUp(mac), messages.Ready, tap)

    def attach(self, *, attacker: bool = False) -> VmbusDevice:
        """The card, or the attackers', over a socket of its own."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._call(messages.Attach(attacker), messages.Done, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        return open_device(UserDevice(ours))

    def watch(self) -> None:
        self._call(messages.Watch(), messages.Done)

    def gone(self) -> bool:
        return self._call(messages.AskGone(), messages.Gone).gone

    def finding(self, outcome: Outcome, *, lawful: bool) -> Finding:
        request = messages.AskFinding(outcome.refused[:3], outcome.failed, outcome.unanswered, lawful)
        found = self._call(request, messages.Found)
        return Finding(found.bytes_touched, found.evidence)

    def replay(self, path: str, pace: float) -> None:
        """See `messages.Replay`."""
        self._call(messages.Replay(path, pace), messages.Done)

    def stop_replay(self) -> None:
        self._call(messages.StopReplay(), messages.Done)

    def _call(self, request: messages.Request, expected: type[R], fd: int | None = None) -> R:
        with self._lock:
            try:
                socket.send_fds(self._control, [messages.encode(request)], [] if fd is None else [fd])
                data = self._control.recv(messages.PACKET_LIMIT)
            except TimeoutError:
                raise WaitTimeout(f"{type(request).__name__} by the host's process", _ANSWER_SECONDS) from None
            except OSError:
                data = b""
        if not data:
            raise self._died()
        reply: messages.Reply = messages.decode_reply(data)
        if isinstance(reply, messages.Failure):
            raise reply.exception()
        if not isinstance(reply, expected):
            raise LocalError(f"the host's process: {reply!r} is no answer to {request!r}")
        return reply

    def _died(self) -> LocalError:
        try:
            status: object = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = "none yet"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return LocalError(f"the host's process ended (status {status}): {said[-1] if said else 'no word'}")


@contextmanager
def host_process(mac: bytes = b"", tap: int | None = None) -> Iterator[HostProcess]:
    """A process of its own for the embedded host, with a card of this MAC address (b"": a random one), and a TAP on its switch."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as said:
        with theirs:
            command = [sys.executable, "-m", "vfio_vmbus.demo.hostmain", str(os.getpid())]
            process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=said)
        try:
            ours.settimeout(_ANSWER_SECONDS)
            host = HostProcess(ours, process, said)
            host.set_up(mac, tap)
            yield host
        finally:
            ours.close()
            try:
                process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
