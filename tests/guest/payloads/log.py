"""The guest's kernel log."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def lines(report: Callable[[Any], None], word: str) -> list[str]:
    """The lines that contain `word`."""
    found = []
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            text = os.read(fd, 8192).decode(errors="replace")  # a record a read
            if word in text:
                found.append(text.partition(";")[2].splitlines()[0])
    except BlockingIOError:
        return found
    finally:
        os.close(fd)
