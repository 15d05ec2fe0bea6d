"""Eventfds that are shared with the other side, who can empty them, fill them, and make them block or not at any moment."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

EVENT_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK
_EOPNOTSUPP = errno.EOPNOTSUPP


def make() -> int:
    """A new eventfd, non-blocking for a start."""
    return os.eventfd(0, EVENT_FLAGS)


def is_eventfd(fd: int) -> bool:
    """Is it an eventfd, and open?"""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return False


def take(fd: int) -> bool:
    """Empty an eventfd; was there anything in it? Never waits, even if the other side has made it a blocking one.

    Between a poll and a read the other side may have emptied it, so a plain read could wait for good (before Linux 5.8 it still can).
    """
    try:
        return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != _EOPNOTSUPP:
            raise
    os.set_blocking(fd, False)
    with suppress(BlockingIOError):
        return os.eventfd_read(fd) > 0
    return False


def ring(fd: int) -> None:
    """Add one to an eventfd, never waiting. One that is full has rung already."""
    from ..memory.signal import signal_now  # which loads Numba: whoever only waits needs none of it

    signal_now(fd)
