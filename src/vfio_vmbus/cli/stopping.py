"""Ctrl-C and SIGTERM end a command in an orderly way: everything is given back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_stop(call: Callable[[], object], *others: signal.Signals) -> Iterator[None]:
    """Within the block these signals, and the others that are named, have this called, and do nothing else.

    It is called on a thread of its own: a signal's handler comes in the middle of whatever the main thread does, which may hold the
    very lock that `call` wants, such as that of an Event that it is about to wait for.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, *others)
    wake = os.eventfd(0, os.EFD_CLOEXEC)
    over = False

    def heed() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # one that came here would not wake the main thread
        while os.read(wake, 8) and not over:  # which goes on when a signal interrupts it, unlike eventfd_read
            call()

    thread = threading.Thread(target=heed, name="signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, lambda *_: os.eventfd_write(wake, 1)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        over = True
        os.eventfd_write(wake, 1)
        thread.join()
        os.close(wake)


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that they set."""
    stop = threading.Event()
    with on_stop(stop.set):
        yield stop
