"""The process's side: a thread that answers what comes by the control socket, one request after the other."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Final, Protocol

from .. import __version__
from ..bus.machine import Machine
from ..bus.policy import unsafe_uses
from ..errors import ProtocolError, UsageError, VfioVmbusError
from ..vfio.user.listener import Admission, Peer
from .messages import LONGEST_REQUEST, Answer, Client, Command, Device, Port, Report, Status, line_of, parse_request
from .places import ControlSocket

log = logging.getLogger("vfio_vmbus.control")

MOST_CLIENTS: Final = 16
PATIENCE: Final = 10.0
"""Seconds that a client may take to ask, and to take its answer."""
_JOIN_SECONDS: Final = 15.0


class Subject(Protocol):
    """What a process has to tell of, and can do. Called in the control thread only."""

    def devices(self) -> tuple[Device, ...]: ...

    def clients(self) -> tuple[Client, ...]: ...

    def ports(self) -> tuple[Port, ...]: ...

    def carry_out(self, command: Command) -> str:
        """Do it, and say so in a line. Raises VfioVmbusError; UsageError where the command makes no sense here."""


class ControlServer:
    """Runs from the moment it is made until `close`; a with statement closes it. kind: what the process does. name: None: KIND-PID.

    It takes this user's processes and root's. Raises as ControlSocket.
    """

    def __init__(self, kind: str, subject: Subject, *, name: str | None = None, machine: Machine = Machine()) -> None:  # noqa: B008
        self.kind = kind
        self.name = name if name is not None else f"{kind}-{os.getpid()}"
        self._subject = subject
        self._machine = machine
        self._since = time.time()
        self._talking: dict[asyncio.Task[None], socket.socket] = {}
        self._socket = ControlSocket(self.name, machine)
        self._socket.socket.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more. A command that is being carried out ends first."""
        with suppress(RuntimeError):  # the loop has ended: closed before
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_JOIN_SECONDS)
        self._socket.close()

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._listen()
        await self._stop.wait()
        self._loop.remove_reader(self._socket.socket)
        for task in self._talking:
            task.cancel()
        await asyncio.gather(*self._talking, return_exceptions=True)
        for connection in self._talking.values():  # also of those that were cancelled before they began
            connection.close()

    def _listen(self) -> None:
        if not self._stop.is_set():
            self._loop.add_reader(self._socket.socket, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):  # who came has gone
            return
        except OSError as error:  # no descriptors are left: they may be later
            log.warning("%s: %s", self.name, error)
            self._loop.remove_reader(self._socket.socket)
            self._loop.call_later(1, self._listen)
            return
        peer = Peer.of(connection)
        if not Admission().admits(peer) or len(self._talking) >= MOST_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._talk(connection, peer))
        self._talking[task] = connection
        task.add_done_callback(lambda task: self._talking.pop(task).close())

    async def _talk(self, connection: socket.socket, peer: Peer) -> None:
        """One client, until it goes, or has no manners."""
        rest = b""
        try:
            while True:
                async with asyncio.timeout(PATIENCE):  # not wait_for, which up to Python 3.11 may lose the cancelling
                    line, rest = await self._line(connection, rest)
                if not line:
                    return
                answer = line_of(self._answer(line, peer))
                async with asyncio.timeout(PATIENCE):
                    await self._loop.sock_sendall(connection, answer)
        except (OSError, ValueError, TimeoutError) as error:
            log.info("%s: process %d: %s", self.name, peer.pid, error)

    async def _line(self, connection: socket.socket, data: bytes) -> tuple[bytes, bytes]:
        """The next line, or what there is when no more comes; and what came behind it. Raises ValueError for one that does not end."""
        while b"\n" not in data[: LONGEST_REQUEST + 1]:
            if len(data) > LONGEST_REQUEST:
                raise ValueError(f"a request of more than {LONGEST_REQUEST} bytes")
            more = await self._loop.sock_recv(connection, LONGEST_REQUEST)
            if not more:
                return data, b""
            data += more
        line, _, rest = data.partition(b"\n")
        return line + b"\n", rest

    def _answer(self, line: bytes, peer: Peer) -> Answer:
        try:
            request = parse_request(line)
            if isinstance(request, Status):
                return Answer(report=self.report())
            log.info("%s: process %d of user %d asks for %s", self.name, peer.pid, peer.uid, request)
            return Answer(done=self._subject.carry_out(request))
        except (VfioVmbusError, OSError) as error:
            return Answer(refused=str(error), wrong_use=isinstance(error, UsageError | ProtocolError))
        except Exception as error:
            log.exception("%s: defect of the control socket", self.name)
            return Answer(refused=f"a defect here: {error!r}")

    def report(self) -> Report:
        """What this process would tell."""
        return Report(
            name=self.name,
            kind=self.kind,
            pid=os.getpid(),
            since=self._since,
            clock=time.monotonic_ns(),
            release=__version__,
            unsafe=tuple(use for use in unsafe_uses(self._machine) if use.pid == os.getpid()),
            devices=self._subject.devices(),
            clients=self._subject.clients(),
            ports=self._subject.ports(),
        )
