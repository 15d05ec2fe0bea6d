"""Where clients of a vfio-user server come from: Unix stream sockets of its own, or inherited ones, and who may come."""

from __future__ import annotations

import os
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import UsageError

_BACKLOG: Final = 64
_LONGEST: Final = 107
"""Bytes of sun_path, less its NUL."""
_UCRED: Final = struct.Struct("iII")


@dataclass(frozen=True)
class Peer:
    """The process at the other end when it connected."""

    pid: int
    uid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """As the kernel says (SO_PEERCRED), seen from this process's namespaces."""
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return cls(pid, uid)


@dataclass(frozen=True)
class Admission:
    """Whose processes may be clients: this process's user's, root's, whom no mode of a file keeps out either, and those of `uids`."""

    uids: frozenset[int] = frozenset()

    def admits(self, peer: Peer) -> bool:
        return peer.uid in (0, os.geteuid()) or peer.uid in self.uids


class PathListener:
    """A listening socket at `path`, for whom `mode` allows. Its file goes with it, unless it is another's by then.

    A file that a server has left behind is replaced. Raises UsageError for a path that cannot be, or that is taken.
    """

    def __init__(self, path: str | os.PathLike[str], mode: int = 0o600) -> None:
        self.path = Path(path)
        if len(os.fsencode(self.path)) > _LONGEST:
            raise UsageError(f"{self.path}: {len(os.fsencode(self.path))} bytes are too long for a socket, limit {_LONGEST}")
        _remove_stale(self.path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self.socket.bind(os.fspath(self.path))
            try:
                os.chmod(self.path, mode)  # before anybody can connect
                self.socket.listen(_BACKLOG)
                made = os.stat(self.path)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise
        except OSError as error:
            self.socket.close()
            raise UsageError(f"{self.path}: cannot listen there: {error.strerror}") from None
        self._file = (made.st_dev, made.st_ino)

    def close(self) -> None:
        """Stop listening, and remove the file."""
        self.socket.close()
        with suppress(OSError):  # removed already
            now = os.lstat(self.path)
            if (now.st_dev, now.st_ino) == self._file:
                self.path.unlink()


def inherited_socket(fd: int) -> tuple[socket.socket, bool]:
    """A Unix stream socket that whoever started this process left open, and whether it listens. Raises UsageError for anything else.

    It is the caller's from then on.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise UsageError(f"descriptor {fd} is not a socket")
    except (OSError, OverflowError):
        raise UsageError(f"descriptor {fd} is not open") from None
    sock = socket.socket(fileno=fd)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        raise UsageError(f"descriptor {fd} is not a Unix stream socket")
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    if not listens:
        try:
            sock.getpeername()
        except OSError:
            sock.detach()
            raise UsageError(f"descriptor {fd} is a socket that neither listens nor is connected") from None
    sock.setblocking(False)
    os.set_inheritable(fd, False)
    return sock, listens


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens at. Raises UsageError for one where somebody does, and for what is no socket."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path}: cannot listen there: {error.strerror}") from None
    if not stat.S_ISSOCK(there.st_mode):
        raise UsageError(f"{path}: there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                path.unlink()
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full
        except OSError as error:
            raise UsageError(f"{path}: there is a socket already: {error.strerror}") from None
    raise UsageError(f"{path}: another server listens there")
