"""What keeps a device within the memory of who drives it, and the one door to every way where nothing does.

Conditions and traces are those of the kernel's own no-IOMMU mode (drivers/vfio/group.c, drivers/vfio/vfio_main.c of Linux 6.12): a switch,
CAP_SYS_RAWIO, a line in the kernel's log, TAINT_USER; and a mark file that `list` and `audit` find. docs/unsafe.md is for users.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from ..errors import UnavailableError, UnsafeError
from .machine import Machine, make_state_folder

SWITCH: Final = "--enable-unsafe-noiommu-mode"
TAINT_USER: Final = 6
"""Bit of /proc/sys/kernel/tainted (include/linux/panic.h): user space asked for it."""
CAP_SYS_RAWIO: Final = 17
_INITIAL_USER_NAMESPACE: Final = "user:[4026531837]"
"""Its inode is fixed (include/uapi/linux/nsfs.h). The kernel asks for capabilities that are held there."""
MEANING: Final = "nothing keeps it within its process's memory; a mistake or an attacker there can read and overwrite all memory"
"""Of unsafe, for warnings."""
_HOW_RAWIO: Final = "run as root, or give it alone: setpriv --inh-caps +sys_rawio --ambient-caps +sys_rawio"


class Isolation(StrEnum):
    """How far a device, or who drives it, reaches."""

    ISOLATED = "isolated"
    """An IOMMU, the machine's or ours in software, lets it reach only memory that its driver mapped."""
    NO_DMA = "no-DMA"
    """It is driven through registers and cannot reach memory at all as long as nobody lets it master the bus."""
    UNSAFE = "unsafe"
    """It can reach all memory of this machine, and so can whoever drives it."""
    KERNEL = "kernel"
    """The kernel drives it."""


@dataclass(frozen=True)
class UnsafeUse:
    """Something unsafe that a process was allowed: since when (seconds since 1970), and what came of telling the kernel."""

    pid: int
    what: str
    since: float
    logged: bool
    tainted: bool


def allow_unsafe(what: str, *, enabled: bool, machine: Machine = Machine()) -> UnsafeUse:  # noqa: B008  (frozen)
    """Every unsafe way passes here before it touches anything; `what` names it, as "uio_hv_generic of network card eth1".

    enabled: was SWITCH given? Warns on stderr and in the kernel's log, taints the kernel where this process may, and leaves a mark that
    stays as long as the process lives, as does the taint: closing the device does not make undone what was done. Raises UnsafeError,
    naming the one condition that is missing.
    """
    what = " ".join(what.split())
    if not enabled:
        raise UnsafeError(f"{what} is unsafe, as nothing keeps the device within this process's memory: only with {SWITCH}")
    _check_rawio(what, machine)
    mark = _mark_of(machine.state_folder(), what)
    tainted = _taint(machine)
    logged = _log(machine, f"{what} opened by user ({_command(machine)}:{os.getpid()}): unsafe, nothing confines its DMA")
    use = UnsafeUse(os.getpid(), what, time.time(), logged, tainted)
    mark.add(use)
    taint = "The kernel is tainted now (TAINT_USER)." if tainted else "The kernel could not be tainted (CAP_SYS_ADMIN)."
    print(
        f"vfio-vmbus: WARNING: {what} is unsafe: {MEANING}. {taint}",
        file=sys.stderr,
        flush=True,
    )
    return use


def unsafe_uses(machine: Machine = Machine()) -> list[UnsafeUse]:  # noqa: B008  (frozen)
    """What living processes were allowed, as far as this user may see; marks of processes that are gone are removed where possible."""
    found: list[UnsafeUse] = []
    for folder in machine.state_folders():
        for name in machine.names(folder):
            if name.startswith("unsafe-") and name.endswith(".json"):
                found += _living(folder / name, machine)
    return sorted(found, key=lambda use: (use.since, use.what))


def holds_rawio(machine: Machine = Machine()) -> bool:  # noqa: B008  (frozen)
    """Is CAP_SYS_RAWIO effective, and not only within a user namespace?"""
    return capability(machine, CAP_SYS_RAWIO) and machine.target(machine.proc / "self/ns/user") == _INITIAL_USER_NAMESPACE


def capability(machine: Machine, bit: int) -> bool:
    """Is this capability effective in this process?"""
    for line in machine.text(machine.proc / "self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            try:
                return bool(int(value, 16) >> bit & 1)
            except ValueError:
                return False
    return False


def _check_rawio(what: str, machine: Machine) -> None:
    if holds_rawio(machine):
        return
    if capability(machine, CAP_SYS_RAWIO):
        raise UnsafeError(
            f"{what} is unsafe and needs CAP_SYS_RAWIO, which is held in a user namespace only: run as root outside of it"
        )
    raise UnsafeError(f"{what} is unsafe and needs CAP_SYS_RAWIO, which this process (uid {os.geteuid()}) lacks: {_HOW_RAWIO}")


def _taint(machine: Machine) -> bool:
    """Set TAINT_USER; is it set? What is written is or-ed to what is there (kernel/sysctl.c), so 64 alone is enough."""
    path = machine.proc / "sys/kernel/tainted"
    with suppress(UnavailableError):  # no CAP_SYS_ADMIN, or panic_on_taint's nousertaint: it may be set already
        machine.write(path, str(1 << TAINT_USER))
    return bool((machine.number(path) or 0) >> TAINT_USER & 1)


def _log(machine: Machine, text: str) -> bool:
    """A warning in the kernel's log: one write is one record, <4> its level (Documentation/ABI/testing/dev-kmsg)."""
    try:
        handle = os.open(machine.dev / "kmsg", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return False
    try:
        os.write(handle, f"<4>vfio-vmbus: {text}\n".encode(errors="replace")[:900])
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _command(machine: Machine) -> str:
    return " ".join(machine.text(machine.proc / "self/comm", 64).split()) or "?"


class _Mark:
    """This process's mark file. It is locked before it gets its name and as long as the process lives: that is how others know."""

    def __init__(self, folder: Path) -> None:
        make_state_folder(folder)
        self.path = folder / f"unsafe-{os.getpid()}.json"
        beside = self.path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        self._handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(self._handle, 0o644)
        beside.replace(self.path)
        self._uses: list[UnsafeUse] = []

    def add(self, use: UnsafeUse) -> None:
        """One write of all, so that a reader finds whole lines."""
        self._uses.append(use)
        os.pwrite(self._handle, b"".join(msgspec.json.encode(one) + b"\n" for one in self._uses), 0)


_marks: dict[tuple[int, Path], _Mark] = {}
"""By process, as a forked child has marks of its own, and folder."""


def _mark_of(folder: Path, what: str) -> _Mark:
    key = (os.getpid(), folder)
    try:
        if key not in _marks or not _marks[key].path.exists():
            _marks[key] = _Mark(folder)
    except OSError as error:
        raise UnsafeError(
            f"{what} is unsafe and must leave a mark, but {folder} cannot be written ({error.strerror}): "
            "run as root, or set XDG_RUNTIME_DIR"
        ) from error
    return _marks[key]


def _living(path: Path, machine: Machine) -> list[UnsafeUse]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return []
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        pass  # somebody has it: the process lives
    else:
        with suppress(OSError):  # another user's
            if os.path.samestat(os.fstat(handle), os.lstat(path)):  # not of a new process with that number, by now
                path.unlink()
        return []
    finally:
        os.close(handle)
    uses = []
    for line in machine.text(path).splitlines():
        try:
            uses.append(msgspec.json.decode(line.encode(errors="replace"), type=UnsafeUse))
        except msgspec.DecodeError:
            continue  # no mark of ours, or one that is being written
    return uses
