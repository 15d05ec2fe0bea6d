"""What this process has open: descriptors, threads, memory. A test takes stock before and after; `nothing_left` does."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ..memory.registry import registered

_MEMFD = re.compile(r"/memfd:\S+")
_SETTLE_SECONDS = 5.0
"""How long threads that were told to end may take."""


@dataclass(frozen=True)
class Stock:
    """descriptors: what each leads to. mappings: of memfds, by name. registered: pieces of memory that kernels may touch."""

    descriptors: Counter[str]
    threads: Counter[str]
    mappings: Counter[str]
    registered: int

    @classmethod
    def take(cls) -> Stock:
        """What there is now."""
        links = []
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the one that lists the folder is closed again
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        with open("/proc/self/maps") as maps:
            mappings = Counter(_MEMFD.findall(maps.read()))
        descriptors = Counter(link for link in links if not link.startswith("/proc/"))
        return cls(descriptors, Counter(thread.name for thread in threading.enumerate()), mappings, registered())

    def beyond(self, before: Stock) -> dict[str, object]:
        """What there is more than `before`; empty when nothing is."""
        more = {
            "descriptors": self.descriptors - before.descriptors,
            "threads": self.threads - before.threads,
            "mappings": self.mappings - before.mappings,
            "registered": max(0, self.registered - before.registered),
        }
        return {what: found for what, found in more.items() if found}


@contextmanager
def nothing_left(*, objects: bool = True) -> Iterator[None]:
    """Raise AssertionError when the block leaves descriptors, threads or memory behind. One that raises is not looked at.

    objects: False where a test runner holds on to what was closed, and with it to private memory.
    """
    if objects:
        gc.collect()
    before = Stock.take()
    yield
    deadline = time.monotonic() + _SETTLE_SECONDS
    while left := Stock.take().beyond(before):
        if not objects:
            left.pop("registered", None)
        if not left:
            break
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind: {left}")
        gc.collect()
        time.sleep(0.01)
