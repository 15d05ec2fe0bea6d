"""`python tests/cli/forking.py FD PARENT`: a process that has imported all that commands need, and forks one for each connection.

A start of the command takes a second, nearly all of it imports. Whoever connects to the listening socket FD sends a datagram:
arguments, folder and numbers of descriptors as JSON, with the descriptors; and is told the command's process number, and how it ended.
It ends with the process PARENT.
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
from contextlib import redirect_stderr, suppress
from importlib import import_module
from io import StringIO

import vfio_vmbus
from vfio_vmbus.apps.lab.namespace import exit_with
from vfio_vmbus.cli.main import main

SECONDS = 120
"""A command that takes longer is killed."""
NUMBER = struct.Struct("i")


def import_all() -> None:
    for found in pkgutil.walk_packages(vfio_vmbus.__path__, "vfio_vmbus."):
        if "testing" not in found.name and not found.name.endswith("__main__"):
            import_module(found.name)
    sys.argv = ["vfio-vmbus", "net", "fwd", "--mtu", "no number"]
    with redirect_stderr(StringIO()), suppress(SystemExit):
        main()  # typer imports more when it is used
    gc.freeze()


def accept_requests(listening: socket.socket) -> None:
    """Return as the process of each request."""
    while True:
        connection, _ = listening.accept()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        with connection:
            request, fds, _, _ = socket.recv_fds(connection, 1 << 16, 16, socket.MSG_CMSG_CLOEXEC)
            if os.fork() == 0:
                listening.close()
                fork_command(connection, fds)
                become(fds, **json.loads(request))
                return
        for fd in fds:
            os.close(fd)


def fork_command(connection: socket.socket, fds: list[int]) -> None:
    """Return in a child; wait for it, and tell its number and how it ended."""
    child = os.fork()
    if child == 0:
        return
    for fd in fds:  # the command's, whose ends somebody waits for
        os.close(fd)
    connection.send(NUMBER.pack(child))
    connection.send(NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    os._exit(0)


def become(fds: list[int], arguments: list[str], folder: str, numbers: list[int]) -> None:
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
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which exit_with took
    signal.alarm(SECONDS)


if __name__ == "__main__":
    socket_fd, parent = map(int, sys.argv[1:])
    exit_with(parent)
    import_all()
    accept_requests(socket.socket(fileno=socket_fd))
    main()
