"""Ctrl-C and SIGTERM end a command in an orderly way: everything is given back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_OVER = b"\0"
"""No signal has this number."""


@contextmanager
def on_stop(call: Callable[[], object], *others: signal.Signals) -> Iterator[None]:
    """Within the block these signals, and the others that are named, have this called, and do nothing else.

    It is called on a thread of its own, which hears of them by Python's wake-up pipe. A handler comes in the middle of whatever the
    main thread does, which may hold the very lock that `call` wants, such as that of an Event that it is about to wait for; or it
    does not come: the kernel may give a signal to any thread (it does after Ctrl-Z and fg), and the main one waits on.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, *others)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def heed() -> None:
        while (number := os.read(reading, 1)) != _OVER:
            if number[0] in numbers:
                call()

    thread = threading.Thread(target=heed, name="signals", daemon=True)
    thread.start()
    told_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(told_before)
        os.write(writing, _OVER)
        thread.join()
        os.close(reading)
        os.close(writing)


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that they set."""
    stop = threading.Event()
    with on_stop(stop.set):
        yield stop
