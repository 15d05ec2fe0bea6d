"""`Server`: our vfio-user server in a process of its own, which tests watch and ask."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .process import PATIENCE, SOURCES, Program, RigError


class Server:
    """Serves the card nic0 at `path` and an Edu at `edu_path`, both in `folder`. A context manager.

    tap: a TAP that is the other port of the card's switch.
    """

    def __init__(self, folder: Path, tap: int = -1) -> None:
        self.path = folder / "vu0"
        self.edu_path = folder / "vu1"
        self.program: Program
        self._log = folder / "server.log"
        self._tap = tap
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), *([self._tap] if self._tap >= 0 else [])]
            script = str(Path(__file__).with_name("server_program.py"))
            command = [sys.executable, script, str(self.path), str(self.edu_path), str(theirs.fileno()), str(self._tap)]
            self.program = Program("the server", command, self._log, SOURCES, fds)
        self._socket = ours
        self._socket.settimeout(PATIENCE)
        self._lines = ours.makefile("rb")
        self.event("listening")
        self.event("listening")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.program.end()
        self._lines.close()
        self._socket.close()

    def event(self, kind: str, place: Path | None = None) -> dict[str, Any]:
        """The next event of this kind (of this place); those before it are forgotten."""
        while True:
            message = self._events.pop(0) if self._events else self._next()
            if message.get("event") == kind and place in (None, Path(message["place"])):
                return message

    def status(self) -> dict[str, Any]:
        """What its clients did so far: see server_program.py."""
        self._socket.sendall(b"\n")
        while True:
            message = self._next()
            if "status" in message:
                return message["status"]
            self._events.append(message)

    def _next(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise RigError(f"the server said nothing for {PATIENCE:.0f} s\n{self.program.tail()}") from None
        if not line:
            raise RigError(f"the server is gone\n{self.program.tail()}")
        return json.loads(line)
