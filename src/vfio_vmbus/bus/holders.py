"""Who holds device nodes and sockets open, by /proc/*/fd; of other users' processes only root is told.

Source: Documentation/filesystems/proc.rst, Documentation/driver-api/uio-howto.rst, Documentation/driver-api/vfio.rst of Linux 6.12.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .machine import Machine, number

_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
_COMMAND_LIMIT: Final = 200


@dataclass(frozen=True)
class Holder:
    """A process that has something open. command: as it was started, cut to 200 characters."""

    path: str
    pid: int
    user: str
    command: str


@dataclass(frozen=True)
class Held:
    """Who has the nodes open; unseen: how many processes would not tell."""

    holders: list[Holder] = field(default_factory=list)
    unseen: int = 0


@dataclass(frozen=True)
class UnixSocket:
    """A Unix socket that somebody listens at."""

    path: str
    inode: int


def nodes_of(here: Path, machine: Machine) -> list[str]:
    """The nodes through which user space drives the device at `here`: /dev/uioN, /dev/vfio/GROUP, /dev/vfio/noiommu-GROUP,
    /dev/vfio/devices/vfioN."""
    found = [f"uio{n}" for name in machine.names(here / "uio") if (n := number(name.removeprefix("uio"))) is not None]
    group = machine.target(here / "iommu_group")
    if group is not None and group.isdecimal() and machine.target(here / "driver") is not None:
        found += [f"vfio/{group}", f"vfio/noiommu-{group}"]
    found += [f"vfio/devices/{name}" for name in machine.names(here / "vfio-dev")]
    return [str(machine.dev / name) for name in found if os.path.lexists(machine.dev / name)]


def of_nodes(paths: Iterable[str], machine: Machine = Machine()) -> Held:  # noqa: B008  (frozen)
    """Who has any of these paths open."""
    wanted = set(paths)
    return _search(lambda target: target if target in wanted else None, machine) if wanted else Held()


def of_sockets(sockets: Iterable[UnixSocket], machine: Machine = Machine()) -> Held:  # noqa: B008  (frozen)
    """Who has these sockets."""
    by_inode = {str(socket.inode): socket.path for socket in sockets}

    def path_of(target: str) -> str | None:
        found = _SOCKET.fullmatch(target)
        return by_inode.get(found[1]) if found else None

    return _search(path_of, machine) if by_inode else Held()


def listening(machine: Machine = Machine()) -> list[UnixSocket]:  # noqa: B008  (frozen)
    """The Unix stream sockets with a path that somebody listens at (/proc/net/unix: flags 00010000, state 01)."""
    found = []
    for line in machine.text(machine.proc / "net/unix", 1 << 22).splitlines()[1:]:
        fields = line.split(maxsplit=7)
        inode = number(fields[6]) if len(fields) == 8 else None
        if inode is not None and fields[3] == "00010000" and fields[4] == "0001" and fields[7].startswith("/"):
            found.append(UnixSocket(fields[7], inode))
    return found


def _search(match: Callable[[str], str | None], machine: Machine) -> Held:
    """match: the path that a link in /proc/PID/fd stands for, or None."""
    held: list[Holder] = []
    unseen = 0
    for pid in machine.names(machine.proc):
        if not pid.isdecimal():
            continue
        try:
            links = os.listdir(machine.proc / pid / "fd")
        except PermissionError:
            unseen += 1
            continue
        except OSError:
            continue  # it has ended
        paths = {path for name in links if (path := match(_link(machine.proc / pid / "fd" / name))) is not None}
        held += [Holder(path, int(pid), user_of(machine.proc / pid), command_of(pid, machine)) for path in sorted(paths)]
    return Held(sorted(held, key=lambda holder: (holder.path, holder.pid)), unseen)


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def user_of(process: Path) -> str:
    """The name of the user who runs it, or his number."""
    try:
        uid = os.stat(process).st_uid
    except OSError:
        return "?"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def command_of(pid: str, machine: Machine) -> str:
    """Its command line, made printable; of one without, its name."""
    text = machine.text(machine.proc / pid / "cmdline", 4096).replace("\0", " ").strip()
    text = text or machine.text(machine.proc / pid / "comm", 64).strip()
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:_COMMAND_LIMIT]
