"""Waiting for a file that the kernel makes when it is ready, without being asked.

Nobody announces the files of sysfs: inotify tells of files in /dev, and of some in sysfs on some kernels, so it wakes us early where it
can, and we look again anyway.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from ..errors import WaitTimeout

FoundT = TypeVar("FoundT")

_WATCHED: Final = 0x100 | 0x80 | 0x4
"""IN_CREATE, IN_MOVED_TO, IN_ATTRIB (permissions that udev sets)."""
_LOOK_SECONDS: Final = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


def wait_for(look: Callable[[], FoundT | None], near: Path, awaited: str, seconds: float) -> FoundT:
    """What `look` finds, as soon as it is not None. near: a folder in which something changes then; it need not be there yet.

    Raises WaitTimeout after `seconds`.
    """
    end = time.monotonic() + seconds
    watch = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            if watch >= 0:  # before the look, so that nothing comes in between
                _libc.inotify_add_watch(watch, os.fsencode(_nearest(near)), _WATCHED)
            found = look()
            if found is not None:
                return found
            left = end - time.monotonic()
            if left <= 0:
                raise WaitTimeout(awaited, seconds)
            if watch >= 0:
                select.select([watch], [], [], min(left, _LOOK_SECONDS))
                with suppress(BlockingIOError):
                    os.read(watch, 65536)
            else:
                time.sleep(min(left, _LOOK_SECONDS))
    finally:
        if watch >= 0:
            os.close(watch)


def _nearest(folder: Path) -> Path:
    """The folder, or the first one above it that is there."""
    return next((above for above in (folder, *folder.parents) if above.is_dir()), Path("/"))
