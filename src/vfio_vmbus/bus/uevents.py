"""Waiting until the kernel's devices change: its uevents (NETLINK_KOBJECT_UEVENT, include/uapi/linux/netlink.h), which everyone
may receive."""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from types import TracebackType
from typing import Final

_NETLINK_KOBJECT_UEVENT: Final = 15
_FROM_THE_KERNEL: Final = 1
_SUBSYSTEMS: Final = (
    b"SUBSYSTEM=vmbus",
    b"SUBSYSTEM=pci",
    b"SUBSYSTEM=uio",
    b"SUBSYSTEM=vfio",
    b"SUBSYSTEM=net",
    b"SUBSYSTEM=block",
)
_LONGEST: Final = 8192


class Uevents:
    """Notice changes of devices. Where the kernel gives no uevents (a container's network namespace, for one), only time passes."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        with suppress(OSError):
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
            )
            self._socket.bind((0, _FROM_THE_KERNEL))

    def wait(self, seconds: float) -> bool:
        """Until devices of interest change (True), or so long. An event lost for want of room counts as one."""
        sockets = [] if self._socket is None else [self._socket]
        ready, _, _ = select.select(sockets, [], [], seconds)
        return self._drain() if ready else False

    def _drain(self) -> bool:
        assert self._socket is not None
        found = False
        while True:
            try:
                message = self._socket.recv(_LONGEST)
            except BlockingIOError:
                return found
            except OSError:  # ENOBUFS: there were more than the socket holds
                return True
            found |= concerns_us(message)

    def close(self) -> None:
        """Take no more."""
        if self._socket is not None:
            self._socket.close()

    def __enter__(self) -> Uevents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def concerns_us(message: bytes) -> bool:
    """Is this uevent ("ACTION@PATH", then KEY=VALUE, each ended by a NUL) of a kind of device that `list` shows?"""
    return any(part.startswith(_SUBSYSTEMS) for part in message.split(b"\0"))
