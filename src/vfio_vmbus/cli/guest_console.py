"""The guest's serial console at this end: a raw terminal with an escape key, a pipe, or a file."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import UnavailableError

ESCAPE: Final = 0x01
"""Ctrl-A, as QEMU's."""
HINT: Final = "Console: Ctrl-A x ends the machine, Ctrl-A h shows the keys."
KEYS: Final = "Ctrl-A x  end the machine\nCtrl-A h  this help\nCtrl-A Ctrl-A  send Ctrl-A to the guest"
_ROOM: Final = 1 << 20
"""Bytes of output that may wait; the guest waits when there are more."""
_PART: Final = 4096
"""Bytes written at a time: what poll promises of a pipe (PIPE_BUF). Read at a time, too."""
_GUEST_FULL: Final = 4096
"""Bytes of input that the guest has not taken, above which none more is read."""


class GuestOutput:
    """A `vm.console.Console` into a descriptor, which stays the caller's. name: of it, for people.

    A reader that does not read makes the guest wait, and nobody else; after `close` what the guest says is lost. When nothing can be
    written any more, `on_failure` is called once.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.on_failure: Callable[[], None] = lambda: None
        self._error: OSError | None = None
        self._fd = fd
        self._name = name
        self._waiting = bytearray()
        self._change = threading.Condition()
        self._closing = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="guest-output", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """The guest's output. Waits while there is no room."""
        with self._change:
            self._change.wait_for(lambda: len(self._waiting) < _ROOM or self._over)
            if not self._over:
                self._waiting += data
                if len(self._waiting) == len(data):  # else the writer is awake: the guest says one byte at a time
                    self._change.notify_all()

    def close(self, patience: float) -> None:
        """End, once all is written, or after `patience` seconds."""
        with self._change:
            self._closing = True
            self._deadline = time.monotonic() + patience
            self._change.notify_all()
        self._thread.join(patience + 1)  # the rest is lost where a write does not return

    def check(self) -> None:
        """Raises what became of it: BrokenPipeError, UnavailableError."""
        if isinstance(self._error, BrokenPipeError):
            raise self._error
        if self._error is not None:
            raise UnavailableError(f"{self._name} cannot be written: {self._error.strerror}")

    @property
    def _over(self) -> bool:
        return self._closing or self._error is not None

    def _run(self) -> None:
        while part := self._next():
            try:
                written = self._put(part)
            except OSError as error:
                with self._change:
                    self._error = error
                    self._change.notify_all()
                self.on_failure()
                return
            if not written and time.monotonic() >= self._deadline:
                return
            with self._change:
                del self._waiting[:written]
                self._change.notify_all()

    def _next(self) -> bytes:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closing)
            return bytes(self._waiting[:_PART])

    def _put(self, part: bytes) -> int:
        """Write some of it; 0 while whoever reads does not."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        return os.write(self._fd, part) if poller.poll(100) else 0


class Keys:
    """What is typed: bytes for the guest, and commands behind the escape key."""

    def __init__(self) -> None:
        self._escaped = False

    def take(self, data: bytes) -> tuple[bytes, str]:
        """What goes to the guest, and the letters of commands, "x" and "h"; whatever else follows the escape key is "h"."""
        out, commands = bytearray(), ""
        for byte in data:
            if not self._escaped:
                self._escaped = byte == ESCAPE
                if not self._escaped:
                    out.append(byte)
                continue
            self._escaped = False
            if byte == ESCAPE:
                out.append(byte)
            else:
                commands += "x" if byte in b"xX" else "h"
        return bytes(out), commands


class GuestInput:
    """Reads a descriptor for the guest until its end, or `close`. feed: takes bytes; waiting: how many the guest has not taken yet.

    keys: where it is a person's; command: called with each command.
    """

    def __init__(
        self,
        fd: int,
        feed: Callable[[bytes], None],
        waiting: Callable[[], int],
        keys: Keys | None = None,
        command: Callable[[str], None] = lambda letter: None,
    ) -> None:
        self._fd = fd
        self._feed = feed
        self._waiting = waiting
        self._keys = keys
        self._command = command
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="guest-input", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._stop, select.POLLIN)
        while not self._full(poller):
            poller.register(self._fd, select.POLLIN)
            ready = dict(poller.poll())
            poller.unregister(self._fd)
            if self._stop in ready:
                return
            try:
                data = os.read(self._fd, _PART)
            except OSError:  # the terminal has gone
                return
            if not data:
                return
            commands = ""
            if self._keys is not None:
                data, commands = self._keys.take(data)
            self._feed(data)
            for letter in commands:
                self._command(letter)

    def _full(self, poller: select.poll) -> bool:
        """Wait until the guest has taken enough of what it got. True when it is over meanwhile."""
        while self._waiting() > _GUEST_FULL:
            if poller.poll(10):
                return True
        return False


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Every key goes to whoever reads, until the block ends, however it does; and while the process is stopped it is as it was."""
    before = termios.tcgetattr(fd)

    def restore() -> None:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

    def make_raw(*_: object) -> None:
        if os.tcgetpgrp(fd) == os.getpgrp():  # else it is somebody else's just now
            tty.setraw(fd, termios.TCSADRAIN)

    def suspend(*_: object) -> None:
        restore()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)  # it stops here, and goes on after SIGCONT
        signal.signal(signal.SIGTSTP, suspend)
        make_raw()

    handlers = {signal.SIGTSTP: suspend, signal.SIGCONT: make_raw}
    others = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        make_raw()
        yield
    finally:
        for number, handler in others.items():
            signal.signal(number, handler)
        restore()


def say(text: str) -> None:
    """Lines for a person whose terminal is raw."""
    print(text.replace("\n", "\r\n"), end="\r\n", file=sys.stderr, flush=True)
