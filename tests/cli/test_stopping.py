"""Signals that end a command."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vfio_vmbus.cli.stopping import on_stop, stoppable
from vfio_vmbus.testing.leaks import nothing_left

PATIENCE = 20.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_they_set_the_event(number: int) -> None:
    with nothing_left(), stoppable() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(PATIENCE)


def test_one_may_come_while_the_lock_is_held_that_its_call_wants() -> None:
    """As that of an Event is for a moment by whoever begins to wait for it."""
    lock = threading.Lock()
    got: list[bool] = []

    def call() -> None:
        got.append(lock.acquire(timeout=PATIENCE))
        called.set()

    called = threading.Event()
    with on_stop(call, signal.SIGHUP):
        with lock:
            os.kill(os.getpid(), signal.SIGHUP)
        assert called.wait(PATIENCE)
    assert got == [True]


def test_one_may_be_given_to_another_thread() -> None:
    """Which the main thread, where handlers run, does not notice while it waits."""
    idle = threading.Event()
    other = threading.Thread(target=idle.wait)
    with nothing_left(), stoppable() as stop:
        other.start()
        assert other.ident is not None
        timer = threading.Timer(0.05, lambda: signal.pthread_kill(other.ident, signal.SIGTERM))
        timer.start()
        assert stop.wait(PATIENCE)
        idle.set()
        other.join()
        timer.join()


def test_afterwards_all_is_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
    with on_stop(lambda: None, signal.SIGQUIT):
        assert signal.getsignal(signal.SIGQUIT) is not before[2]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)] == before
