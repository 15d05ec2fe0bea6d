"""Ctrl-C and SIGTERM end a command in an orderly way: everything is given back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_stop(call: Callable[[], object], *others: signal.Signals) -> Iterator[None]:
    """Within the block these signals, and the others that are named, call this, and nothing else."""
    numbers = (signal.SIGINT, signal.SIGTERM, *others)
    before = {number: signal.signal(number, lambda *_: call()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that they set."""
    stop = threading.Event()
    with on_stop(stop.set):
        yield stop
