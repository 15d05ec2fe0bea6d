"""Where control sockets are: a folder for each user that nobody else may enter, in it a socket for each process, by its name."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..bus.machine import Machine, make_state_folder
from ..errors import UnavailableError, UsageError

FOLDER: Final = "control"
"""In `Machine.state_folder`, which others may look into."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_LONGEST: Final = 107
"""Bytes of sun_path, less its NUL."""
BACKLOG: Final = 16
MOST: Final = 256
"""Sockets of a user that are looked at."""


@dataclass(frozen=True)
class Place:
    """A control socket. uid: of the folder's owner."""

    path: Path
    uid: int

    @property
    def name(self) -> str:
        return self.path.name


def check_name(name: str) -> str:
    """`name` if a process can be called so. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a process: take up to 32 letters, digits, dots, dashes and underscores")
    return name


def places(machine: Machine = Machine()) -> list[Place]:  # noqa: B008  (frozen)
    """All control sockets that this user may see, stale ones included."""
    found = []
    for state in machine.state_folders():
        folder = state / FOLDER
        try:
            owner = os.lstat(folder).st_uid
        except OSError:
            continue
        found += [Place(folder / name, owner) for name in machine.names(folder)[:MOST] if _NAME.fullmatch(name)]
    return found


class ControlSocket:
    """A listening socket for a process called `name`; its file goes with it.

    Raises UnavailableError where there can be no such folder, UsageError for a name that cannot be, or that another process has.
    """

    def __init__(self, name: str, machine: Machine = Machine()) -> None:  # noqa: B008  (frozen)
        folder = machine.state_folder() / FOLDER
        self.path = folder / check_name(name)
        if len(os.fsencode(self.path)) > _LONGEST:
            raise UnavailableError(
                f"{self.path}: {len(os.fsencode(self.path))} bytes are too long for a socket, limit {_LONGEST}"
            )
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            _make(folder)
            with _locked(folder):
                self._put()
        except OSError as error:
            self.socket.close()
            raise UnavailableError(f"{self.path}: cannot listen there: {error.strerror}") from None
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """Stop listening, and remove the file."""
        self.socket.close()
        with suppress(OSError), _locked(self.path.parent):
            if os.path.samestat(os.lstat(self.path), self._made):
                self.path.unlink()

    def _put(self) -> None:
        """Give the socket its name once it listens: whoever finds one under a name that does not answer knows that its process is gone."""
        beside = self.path.with_name(f".{os.getpid()}")
        beside.unlink(missing_ok=True)
        self.socket.bind(os.fspath(beside))
        try:
            os.chmod(beside, 0o600)
            self.socket.listen(BACKLOG)
            self._made = os.lstat(beside)
            if os.path.lexists(self.path):
                if not _stale(self.path):
                    raise UsageError(f"another process is called {self.path.name} (see vfio-vmbus status)")
                self.path.unlink()
            os.link(beside, self.path)
        finally:
            beside.unlink()


def remove_stale(place: Place) -> None:
    """Remove what a process of this user has left behind. Nothing happens to what is in use, or another's."""
    if place.uid != os.geteuid():
        return
    with suppress(OSError), _locked(place.path.parent):
        if _stale(place.path):
            place.path.unlink()


def _make(folder: Path) -> None:
    make_state_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UnavailableError(f"{folder}: not a folder that is this user's alone")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else looks for stale sockets there, or gives a socket its name. Held for an instant each time. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _stale(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # its backlog is full, say
    return False
