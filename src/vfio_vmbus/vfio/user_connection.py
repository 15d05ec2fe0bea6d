"""One vfio-user client on a Unix stream socket, served on the running asyncio loop: carries out what `user_core` decides."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from .user_core import Action, Close, Release, Send, ServerCore

_PIECE: Final = 1 << 16
"""Bytes taken from a client before others get their turn."""
_MOST_FDS: Final = 253
"""SCM_MAX_FD: Linux passes no more in one message, so that none is cut off for want of room."""
MAX_UNSENT: Final = 1 << 20
"""Bytes of replies that wait for a client who does not read; from there on it is not read from either."""


class UserConnection:
    """Serves a connected socket, which is its own from then on, until the client goes, breaks the protocol, or `close`.

    ended: called once, with the reason, when descriptors and socket are closed; the device is then to be released.
    """

    def __init__(self, sock: socket.socket, core: ServerCore, ended: Callable[[str], None]) -> None:
        self.core = core
        self._socket = sock
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._unsent_bytes = 0
        self._reading = False
        self._open = True
        sock.setblocking(False)
        self._read_on()

    @property
    def unsent(self) -> int:
        """Bytes of replies that the client has not made room for."""
        return self._unsent_bytes

    def close(self, reason: str = "closed by the server") -> None:
        """End the connection. Harmless when it has ended."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._carry_out(self.core.end())
        self._ended(reason)

    def _read_on(self) -> None:
        """Read as long as the client takes its replies."""
        wanted = self._unsent_bytes < MAX_UNSENT
        if wanted and not self._reading:
            self._loop.add_reader(self._socket, self._readable)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._socket)
        self._reading = wanted

    def _readable(self) -> None:
        try:
            data, control, flags, _ = self._socket.recvmsg(
                _PIECE, socket.CMSG_SPACE(4 * _MOST_FDS), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"the client is gone: {error}")
            return
        self._carry_out(self.core.receive(data, _descriptors(control), lost=bool(flags & socket.MSG_CTRUNC)))
        if not data:
            self.close("the client has closed the connection")

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(data=data, fds=fds):
                    self._send(data, fds)
                case Release(fds=fds):
                    for fd in fds:
                        os.close(fd)
                case Close(reason=reason):
                    self.close(reason)

    def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        """What finds no room waits, in order; else all of a reply goes in one piece, as QEMU takes no header in two."""
        if self._open:
            self._unsent.append((data, fds))
            self._unsent_bytes += len(data)
            self._flush()

    def _flush(self) -> None:
        """Send what waits, as far as there is room."""
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._socket.sendmsg([data], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self._unsent_bytes -= sent
                if sent < len(data):
                    self._unsent[0] = (data[sent:], ())
                else:
                    self._unsent.popleft()
            self._loop.remove_writer(self._socket)
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._socket, self._flush)
        except OSError as error:
            self.close(f"the client is gone: {error}")
            return
        self._read_on()


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    """What came with a message."""
    fds = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
