"""The way to a vfio-user server that listens."""

from __future__ import annotations

import os
import socket
import struct

from ...errors import UnavailableError, UsageError, WaitTimeout


def connect(path: str | os.PathLike[str], timeout: float) -> socket.socket:
    """A connection to the server that listens at `path`. Raises UnavailableError, WaitTimeout, UsageError for a path that cannot be."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(timeout))
        sock.connect(os.fspath(path))
    except BlockingIOError:
        sock.close()
        raise WaitTimeout(f"a connection to {os.fspath(path)}", timeout) from None
    except OSError as error:
        sock.close()
        if error.errno is None:
            raise UsageError(f"{os.fspath(path)}: {error}") from error
        raise UnavailableError(f"{os.fspath(path)}: {error.strerror}: is a vfio-user server listening there?") from error
    return sock


def timeval(seconds: float) -> bytes:
    """A struct timeval that is not zero, which would be no timeout at all."""
    microseconds = max(1, round(seconds * 1e6))
    return struct.pack("@ll", *divmod(microseconds, 1_000_000))
