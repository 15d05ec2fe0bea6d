"""Descriptors that come beside the bytes of a Unix socket (SCM_RIGHTS)."""

from __future__ import annotations

import array
import socket


def descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    """What came with a message: the ancillary data as recvmsg gives it."""
    fds = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
