"""A bare Python relay between two TAPs, one thread a direction: `python relay.py FD FD`, until stdin ends.

A program of its own, without the project's code; relayed.py measures TCP through it.
"""

from __future__ import annotations

import errno
import os
import sys
import threading

FRAME_LIMIT = 16384  # bytes; more than a frame of MTU 9000


def relay(fd_a: int, fd_b: int) -> None:
    """Pass frames both ways between two TAPs, one read and one write a frame, until stdin ends."""
    for source, sink in ((fd_a, fd_b), (fd_b, fd_a)):
        os.set_blocking(source, True)
        threading.Thread(target=_pass, args=(source, sink), daemon=True).start()
    sys.stdin.buffer.read()


def _pass(source: int, sink: int) -> None:
    while True:
        frame = os.read(source, FRAME_LIMIT)
        try:
            os.write(sink, frame)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOBUFS):  # the other side is down, or short of memory
                raise


if __name__ == "__main__":
    relay(int(sys.argv[1]), int(sys.argv[2]))
