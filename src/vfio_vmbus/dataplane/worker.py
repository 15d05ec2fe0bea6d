"""A thread that runs a data-plane kernel without the GIL, and the way to take its state away from it for a moment.

The kernel loops in compiled code until the word `attention` is set; it sleeps on an epoll instance, to which the worker's own
eventfd belongs, so that it is reached when it sleeps, too. Every descriptor there is edge-triggered, and no eventfd is ever read: a
doorbell is shared with a client, who could otherwise empty it between our poll and our read, and leave us blocked for good.
"""

from __future__ import annotations

import atexit
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import UsageError, WaitTimeout
from ..memory.access import inline, load64_acquire, viewer
from ..memory.block import Block
from ..memory.libc import sys_epoll_wait

EVENTS = 128
"""How many descriptors one wake-up can report; more stay pending and end the next sleep at once."""

CONTROL = np.dtype(
    [
        ("attention", "i8"),  # not 0: the kernel is to return
        ("epoll", "i8"),  # descriptor of what it sleeps on
        ("spin_ns", "i8"),  # how long it looks in vain before it sleeps; BUSY: it never does
        ("sleeps", "i8"),  # how often it slept
        ("scratch", "i8", (2,)),  # for system calls
        ("events", "i8", (2 * EVENTS,)),
    ]
)
"""What a worker and its kernel share."""

BUSY = 1 << 62
SPIN_NS = 50_000
"""About what waking up by an eventfd costs: looking longer than that before sleeping gains nothing on average."""
POLICIES = ("busy", "adaptive", "interrupt")

_ATTENTION: int = CONTROL.fields["attention"][1]  # type: ignore[index]
_SCRATCH: int = CONTROL.fields["scratch"][1]  # type: ignore[index]
_EVENTS: int = CONTROL.fields["events"][1]  # type: ignore[index]

control_at = viewer(CONTROL)


@inline
def attention(control: int) -> int:
    """Not 0 when the kernel has to return to its thread."""
    return load64_acquire(control + _ATTENTION)


@inline
def scratch_of(control: int) -> int:
    """16 bytes for system calls of the worker's own thread."""
    return control + _SCRATCH


@inline
def sleep(control: int, timeout_ms: int) -> None:
    """Sleep until a watched descriptor becomes ready, or for `timeout_ms` (-1: without end). Not at all if attention is set."""
    state = control_at(control)
    state.sleeps += 1
    sys_epoll_wait(state.epoll, control + _EVENTS, EVENTS, timeout_ms)


class Worker:
    """A thread that runs `run(address)`, a kernel which returns when its `attention` is set.

    name: of the thread, and in messages. keep: whatever must live as long as the thread runs (the owner of the state).
    poll: "busy" never sleeps, "adaptive" looks for work for `spin_ns` first, "interrupt" sleeps as soon as there is none.
    Raises UsageError for another policy.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[int], Any],
        address: int,
        *,
        poll: str = "adaptive",
        spin_ns: int = SPIN_NS,
        keep: object = None,
    ) -> None:
        if poll not in POLICIES:
            raise UsageError(f"poll policy {poll!r}: take one of {', '.join(POLICIES)}")
        if not 0 <= spin_ns < BUSY:
            raise UsageError(f"spinning for {spin_ns} ns: take 0 to {BUSY - 1} ns")
        self.name = name
        self._run = run
        self._address = address
        self._keep = keep
        self.control = Block(CONTROL)
        self.control["spin_ns"] = {"busy": BUSY, "adaptive": spin_ns, "interrupt": 0}[poll]
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.control["epoll"] = self._epoll.fileno()
        self.watch(self._wake)
        self._thread: threading.Thread | None = None
        self._exclusive = threading.Lock()  # who may hold the worker parked: one at a time
        self._changed = threading.Condition()  # guards what follows
        self._parked = False
        self._hold = False
        self._stop = False
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Is there a thread, parked or not, that has not failed?"""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    def watch(self, fd: int) -> None:
        """Wake the kernel from its sleep when `fd` becomes readable (edge-triggered; nobody reads it on this account)."""
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, fd: int) -> None:
        """No more of that; before `fd` is closed."""
        if not self._epoll.closed:
            self._epoll.unregister(fd)

    def start(self) -> None:
        """Start the thread. Raises UsageError when it was started before."""
        if self._thread is not None or self._stop:
            raise UsageError(f"worker {self.name} was started before")
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        atexit.register(self.stop)  # a kernel must not run on while the interpreter frees the memory under it
        self._thread.start()

    def _main(self) -> None:
        try:
            while self._proceed():
                self._run(self._address)
        except BaseException as failure:  # raised again by whoever asks next
            self._failure = failure
        with self._changed:
            self._parked = True
            self._changed.notify_all()

    def _proceed(self) -> bool:
        """On the worker's thread, outside of the kernel: parked while someone holds it. False: end."""
        with self._changed:
            while self._hold and not self._stop:
                self._parked = True
                self._changed.notify_all()
                self._changed.wait()
            self._parked = False
            return not self._stop

    def _call(self) -> None:
        """Make the kernel return."""
        self.control["attention"] = 1
        self.wake()

    def wake(self) -> None:
        """End the kernel's sleep: there is work that no watched descriptor tells of. Nothing happens after `stop`."""
        with self._changed:
            if not self._epoll.closed:
                os.eventfd_write(self._wake, 1)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def paused(self, timeout: float = 5.0) -> Iterator[None]:
        """Own all of the data plane's state for the length of the block: the kernel is not running. Does not nest.

        Raises what the kernel raised, or WaitTimeout if it (or another owner) does not let go in time. Where no thread runs, before
        `start` and after `stop`, the state is the caller's anyway.
        """
        deadline = time.monotonic() + timeout
        if not self._exclusive.acquire(timeout=timeout):
            raise WaitTimeout(f"another holder of worker {self.name}", timeout)
        try:
            if self._thread is not None:
                self._park(deadline, timeout)
            yield
        finally:
            self._release()
            self._exclusive.release()

    def _park(self, deadline: float, timeout: float) -> None:
        with self._changed:
            self._hold = True
            self._call()
            while not self._parked:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise WaitTimeout(f"worker {self.name} to finish its burst", timeout)
        self._raise_failure()

    def _release(self) -> None:
        with self._changed:
            self._hold = False
            if not self._stop:
                self.control["attention"] = 0
            self._changed.notify_all()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread and close the descriptors; idempotent. Raises what the kernel raised, or WaitTimeout."""
        with self._changed:
            if self._stop and self._epoll.closed:
                return
            self._stop = True
            self._call()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise WaitTimeout(f"worker {self.name} to end", timeout)
        atexit.unregister(self.stop)
        with self._changed:
            self._epoll.close()
            os.close(self._wake)
        self._raise_failure()
