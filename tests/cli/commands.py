"""`vfio-vmbus` as a process: `started`, or started and waited for, `run`.

Most are forked from a process that has everything imported (`forking`), since there are many; `fresh` ones are started as a shell would.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Self

from tests.cli import forking
from tests.cli.forking import NUMBER, SECONDS

ROOT = Path(__file__).resolve().parents[2]


@cache
def _forking() -> bytes:
    """The address of the process that forks them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind("")  # the kernel finds a name
        listening.listen()
        command = [sys.executable, "-P", forking.__file__, str(listening.fileno()), str(os.getpid())]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()])
        atexit.register(process.wait)
        atexit.register(process.terminate)
        return listening.getsockname()


class Forked:
    """What tests use of subprocess.Popen, for a command that was forked."""

    def __init__(self, arguments: Sequence[str], cwd: str | Path, pass_fds: Sequence[int]) -> None:
        (stdin, to), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
        self.stdin, self.stdout, self.stderr = os.fdopen(to, "w", 1), os.fdopen(out), os.fdopen(err)
        request = {"arguments": arguments, "folder": os.fspath(cwd), "numbers": [0, 1, 2, *pass_fds]}
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(_forking())
        socket.send_fds(self._connection, [json.dumps(request).encode()], [stdin, stdout, stderr, *pass_fds])
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        self.pid = self._read()
        self.returncode: int | None = None

    def _read(self) -> int:
        return int(NUMBER.unpack(self._connection.recv(NUMBER.size))[0])

    def poll(self) -> int | None:
        """How it ended, None: it has not."""
        return self.wait() if self.returncode is None and select.select([self._connection], [], [], 0)[0] else self.returncode

    def wait(self, timeout: float = SECONDS) -> int:
        """How it ended. It is killed after `SECONDS`."""
        if self.returncode is None:
            self.returncode = self._read()
        return self.returncode

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """What it says until it ends."""
        self.stdin.close()
        said = self.stdout.read(), self.stderr.read()
        self.wait()
        return said

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        for file in (self.stdin, self.stdout, self.stderr, self._connection):
            file.close()


Process = subprocess.Popen[str] | Forked


@contextmanager
def started(*arguments: object, fresh: bool = False, cwd: str | Path = ROOT, pass_fds: Sequence[int] = ()) -> Iterator[Process]:
    """A command at work, killed in the end. Its input and output are ours."""
    words = [str(argument) for argument in arguments]
    process: Process
    if fresh:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "vfio_vmbus", *words]
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1, cwd=cwd, pass_fds=pass_fds
        )
    else:
        process = Forked(words, cwd, pass_fds)
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: object, fresh: bool = False, cwd: str | Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What a command said, and how it ended."""
    with started(*arguments, fresh=fresh, cwd=cwd) as process:
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode is not None
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What was said on stderr, which must be one line, and all that was said."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("vfio-vmbus: ")
    return done.stderr
