"""QEMU's control socket (QMP: docs/interop/qmp-spec.rst of QEMU): one JSON object a line."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class Qmp:
    def __init__(self, where: Path | socket.socket, timeout: float = 30.0) -> None:
        """where: the socket, or its path. Raises OSError when nothing listens there."""
        self.events: list[dict[str, Any]] = []
        self._socket = where if isinstance(where, socket.socket) else socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            if isinstance(where, Path):
                self._socket.connect(str(where))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")
        self._next()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """What a command returns. Raises QmpError with QEMU's words."""
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while True:
            message = self._next()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(message["error"]["desc"])
            else:
                return message["return"]

    def human(self, line: str) -> str:
        """What the human monitor prints for a command."""
        return self.command("human-monitor-command", **{"command-line": line})

    def event(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event from now on, or that came before, that is `wanted`; it is taken."""
        while True:
            for number, event in enumerate(self.events):
                if wanted(event):
                    return self.events.pop(number)
            message = self._next()
            if "event" in message:
                self.events.append(message)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise QmpError("QEMU has closed its control socket")
        return json.loads(line)
