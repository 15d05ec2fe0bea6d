"""The guest's console at this end: what is typed, readers that do not read, and a terminal that is always left as it was."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.cli.guest_console import GuestInput, GuestOutput, Keys
from vfio_vmbus.errors import UnavailableError
from vfio_vmbus.testing.leaks import nothing_left

DEADLINE = 60.0


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    open_ones = set(ends)
    try:
        yield ends
    finally:
        for fd in open_ones:
            with suppress(OSError):  # the test has closed it
                os.close(fd)


# Keys.


@pytest.mark.parametrize(
    ("typed", "sent", "commands"),
    [
        (b"ls\r", b"ls\r", ""),
        (b"\x03\x1a\x1c", b"\x03\x1a\x1c", ""),  # the guest's business
        (b"\x01x", b"", "x"),
        (b"\x01X", b"", "x"),
        (b"a\x01\x01b", b"a\x01b", ""),
        (b"\x01h", b"", "h"),
        (b"\x01?", b"", "h"),
        (b"\x01", b"", ""),
        (b"\x01\x01\x01x\x01\x01", b"\x01\x01", "x"),
        ("é\x01xü".encode(), "éü".encode(), "x"),
    ],
)
def test_what_is_typed(typed: bytes, sent: bytes, commands: str) -> None:
    assert Keys().take(typed) == (sent, commands)


@given(st.lists(st.binary(max_size=8)))
def test_it_does_not_matter_how_fast_it_is_typed(parts: list[bytes]) -> None:
    keys = Keys()
    taken = [keys.take(part) for part in parts]
    assert (b"".join(sent for sent, _ in taken), "".join(letters for _, letters in taken)) == Keys().take(b"".join(parts))


# Output.


def test_everything_is_written_in_order() -> None:
    with nothing_left(), pipe() as (reader, writer):
        output = GuestOutput(writer, "pipe")
        said = bytes(range(256)) * 100
        taken = bytearray()
        for at in range(0, len(said), 7):
            output.write(said[at : at + 7])
        while len(taken) < len(said):
            taken += os.read(reader, 1 << 16)
        output.close(10)
        output.check()
        assert bytes(taken) == said


def test_who_does_not_read_makes_the_guest_wait_and_not_the_end() -> None:
    with nothing_left(), pipe() as (reader, writer):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        output = GuestOutput(writer, "pipe")
        through = threading.Event()

        def guest() -> None:
            for _ in range(3):
                output.write(bytes(1 << 20))
            through.set()

        thread = threading.Thread(target=guest)
        thread.start()
        eventually(lambda: select.select([reader], [], [], 0)[0], "some output")
        assert not through.is_set()
        output.close(0.01)
        assert through.wait(DEADLINE), "a vCPU waits for ever"
        thread.join()
        output.write(b"nobody hears that")


def test_the_last_words_are_waited_for() -> None:
    with nothing_left(), pipe() as (reader, writer):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        output = GuestOutput(writer, "pipe")
        output.write(b"x" * 100_000)
        closing = threading.Thread(target=output.close, args=(DEADLINE,))
        closing.start()
        taken = 0
        while taken < 100_000:
            taken += len(os.read(reader, 1 << 16))
        closing.join()
        assert taken == 100_000


def test_a_reader_that_goes_ends_the_machine() -> None:
    with nothing_left(), pipe() as (reader, writer):
        output = GuestOutput(writer, "pipe")
        failed = threading.Event()
        output.on_failure = failed.set
        os.close(reader)
        output.write(b"hello")
        assert failed.wait(DEADLINE)
        output.write(bytes(2 << 20))  # does not wait
        output.close(10)
        with pytest.raises(BrokenPipeError):
            output.check()


def test_a_full_disk_is_said() -> None:
    with nothing_left():
        fd = os.open("/dev/full", os.O_WRONLY)
        output = GuestOutput(fd, "console.log")
        output.write(b"hello")
        output.close(10)
        with pytest.raises(UnavailableError, match=r"console\.log cannot be written: No space left"):
            output.check()
        os.close(fd)


# Input.


def test_input_goes_to_the_guest_until_it_ends() -> None:
    with nothing_left(), pipe() as (reader, writer):
        taken: list[bytes] = []
        source = GuestInput(reader, taken.append, lambda: 0)
        os.write(writer, b"ls\n\x01x")
        eventually(lambda: b"".join(taken) == b"ls\n\x01x", "the input, as it is no person's")
        os.close(writer)
        source.close()


def test_a_person_commands() -> None:
    with nothing_left(), pipe() as (reader, writer):
        taken: list[bytes] = []
        commands: list[str] = []
        source = GuestInput(reader, taken.append, lambda: 0, Keys(), commands.append)
        os.write(writer, b"ls\r\x01h\x01x")
        eventually(lambda: commands == ["h", "x"], "two commands")
        assert b"".join(taken) == b"ls\r"
        source.close()


def test_a_guest_that_does_not_read_gets_no_more() -> None:
    with nothing_left(), pipe() as (reader, writer):
        taken: list[bytes] = []
        read_by_guest = 0
        source = GuestInput(reader, taken.append, lambda: sum(map(len, taken)) - read_by_guest)
        os.write(writer, b"x" * 40_000)
        eventually(lambda: sum(map(len, taken)) > 4096, "some input")
        assert sum(map(len, taken)) <= 4096 + 4096
        read_by_guest = 40_000
        eventually(lambda: sum(map(len, taken)) == 40_000, "all of it")
        source.close()


def test_input_can_be_left_while_the_guest_does_not_read() -> None:
    with nothing_left(), pipe() as (reader, writer):
        os.write(writer, b"x" * 10_000)
        source = GuestInput(reader, lambda data: None, lambda: 1 << 20)
        source.close()
    with nothing_left(), pipe() as (reader, writer):
        GuestInput(reader, lambda data: None, lambda: 0).close()


# The terminal. A shell, as far as terminals are concerned, starts a job in the foreground and says what becomes of it.

_SHELL = """
import os, signal, subprocess, sys, termios
tell = os.fdopen(int(sys.argv[1]), "w", buffering=1)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
cooked = termios.tcgetattr(0)
job = subprocess.Popen([sys.executable, "-c", sys.argv[2]], process_group=0, restore_signals=True,
                       preexec_fn=lambda: signal.signal(signal.SIGTTOU, signal.SIG_DFL))
os.tcsetpgrp(0, job.pid)
print("job", job.pid, file=tell)
while True:
    _, status = os.waitpid(job.pid, os.WUNTRACED)
    kept = "as before" if termios.tcgetattr(0) == cooked else "changed"
    if os.WIFSTOPPED(status):
        os.tcsetpgrp(0, os.getpgrp())
        print("stopped", kept, file=tell)
        os.tcsetpgrp(0, job.pid)
        os.kill(job.pid, signal.SIGCONT)
    else:
        print("ended", kept, os.waitstatus_to_exitcode(status), file=tell)
        break
"""

_JOB = """
import signal, sys, threading
from vfio_vmbus.cli.guest_console import raw_terminal
from vfio_vmbus.cli.stopping import on_stop
over = threading.Event()
with on_stop(over.set, signal.SIGHUP, signal.SIGQUIT), raw_terminal(0):
    print("raw", flush=True)
    {body}
"""


class Shell:
    """A terminal, with a job in it that makes it raw."""

    def __init__(self, body: str) -> None:
        self.terminal, theirs = os.openpty()
        reports, tell = os.pipe()
        self._reports = os.fdopen(reports)
        # start_new_session and TIOCSCTTY: the terminal is the shell's, and its job not an orphan, which could not be stopped.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SHELL, str(tell), _JOB.format(body=body)],
            stdin=theirs,
            stdout=theirs,
            start_new_session=True,
            pass_fds=(tell,),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        os.close(tell)
        self.job = int(self.told().split()[1])
        self.until(b"raw")

    def told(self) -> str:
        assert select.select([self._reports], [], [], DEADLINE)[0], "the shell says nothing"
        return self._reports.readline().strip()

    def until(self, what: bytes) -> None:
        seen = b""
        while what not in seen:
            assert select.select([self.terminal], [], [], DEADLINE)[0], f"never {what!r}: {seen!r}"
            seen += os.read(self.terminal, 4096)

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reports.close()
        os.close(self.terminal)


@contextmanager
def shell(body: str) -> Iterator[Shell]:
    found = Shell(body)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_the_terminal_is_as_before_after_a_signal(number: int) -> None:
    with shell("while not over.wait(0.1): pass") as found:
        assert found.raw
        os.kill(found.job, number)
        assert found.told() == "ended as before 0"


@pytest.mark.parametrize(("body", "status"), [("pass", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_the_terminal_is_as_before_however_it_ends(body: str, status: int) -> None:
    with shell(body) as found:
        assert found.told() == f"ended as before {status}"


def test_keys_are_the_guests_not_signals() -> None:
    with shell("import os; print(os.read(0, 1), flush=True)\n    while not over.wait(0.1): pass") as found:
        os.write(found.terminal, b"\x03")
        found.until(b"b'\\x03'")
        os.kill(found.job, signal.SIGTERM)
        assert found.told() == "ended as before 0"


def test_while_it_is_stopped_the_terminal_is_as_before() -> None:
    with shell("while not over.wait(0.1): pass") as found:
        for _ in range(2):
            os.kill(found.job, signal.SIGTSTP)
            assert found.told() == "stopped as before"
            eventually(lambda: found.raw, "raw again")
        os.kill(found.job, signal.SIGSTOP)  # which nobody can prepare for
        assert found.told().startswith("stopped")
        eventually(lambda: found.raw, "raw again")
        os.kill(found.job, signal.SIGTERM)
        assert found.told() == "ended as before 0"


def test_a_console_file_that_cannot_be_written(tmp_path: Path) -> None:
    from vfio_vmbus.cli.vm import _output

    with pytest.raises(UnavailableError, match=r"--console .*: No such file"), _output(str(tmp_path / "none" / "log")):
        pass
