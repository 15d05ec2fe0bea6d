"""The process's side: a thread that answers what comes by the control socket, one request after the other."""

from __future__ import annotations

import asyncio
import logging
import os
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
from .places import BACKLOG, ControlSocket

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
        self._talking: set[asyncio.StreamWriter] = set()
        self._socket = ControlSocket(self.name, machine)
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
        server = await asyncio.start_unix_server(self._talk, sock=self._socket.socket, limit=LONGEST_REQUEST, backlog=BACKLOG)
        await self._stop.wait()
        server.close()
        for writer in self._talking:
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until it goes, or has no manners."""
        peer = Peer.of(writer.get_extra_info("socket"))
        if not Admission().admits(peer) or len(self._talking) >= MOST_CLIENTS:
            writer.transport.abort()
            return
        self._talking.add(writer)
        writer.transport.set_write_buffer_limits(0)  # so that an answer is taken before the next request is looked at
        try:
            while line := await asyncio.wait_for(reader.readline(), PATIENCE):
                writer.write(line_of(self._answer(line, peer)))
                await asyncio.wait_for(writer.drain(), PATIENCE)
        except (OSError, ValueError, TimeoutError) as error:  # ValueError: a line that does not end
            log.info("%s: process %d: %s", self.name, peer.pid, error)
        finally:
            self._talking.discard(writer)
            writer.transport.abort()

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
