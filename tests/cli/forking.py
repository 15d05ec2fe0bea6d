"""`python tests/cli/forking.py FD`: a process that has imported all that commands need, and forks one for each request.

A start of the command takes a second, nearly all of it imports. A request is a datagram at the socket FD: arguments, folder,
environment and numbers of descriptors as JSON, with the descriptors; the first of them is told the command's process number, and how it
ended.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import pkgutil
import signal
import socket
import struct
import sys
from contextlib import suppress
from importlib import import_module

import vfio_vmbus
from vfio_vmbus.cli.main import main

SECONDS = 120
"""A command that takes longer is killed."""
TOLD = struct.Struct("i")


def import_all() -> None:
    for found in pkgutil.walk_packages(vfio_vmbus.__path__, "vfio_vmbus."):
        if "testing" not in found.name and not found.name.endswith("__main__"):
            import_module(found.name)


def wait_for_requests(control: socket.socket) -> None:
    """Return as the process of each request; end when nobody is left to make one."""
    while True:
        request, fds, _, _ = socket.recv_fds(control, 1 << 17, 16, socket.MSG_CMSG_CLOEXEC)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG if request else 0)[0]:
                pass
        if not request:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            fork_command(*fds)
            become(fds[1:], **json.loads(request))
            return
        for fd in fds:
            os.close(fd)


def fork_command(told: int, *fds: int) -> None:
    """Return in a child; wait for it, and tell its number and how it ended."""
    child = os.fork()
    if child == 0:
        os.close(told)
        return
    for fd in fds:  # the command's, whose ends somebody waits for
        os.close(fd)
    os.write(told, TOLD.pack(child))
    os.write(told, TOLD.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    os._exit(0)


def become(fds: list[int], arguments: list[str], folder: str, environment: dict[str, str], numbers: list[int]) -> None:
    """A process like one that was started, with these descriptors at these numbers."""
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(above, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(fd, mode, buffering, closefd=False) for fd, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    sys.argv = ["vfio-vmbus", *arguments]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.alarm(SECONDS)


if __name__ == "__main__":
    import_all()
    gc.freeze()
    wait_for_requests(socket.socket(fileno=int(sys.argv[1])))
    main()
