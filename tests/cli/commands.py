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
from tests.cli.forking import SECONDS, TOLD

ROOT = Path(__file__).resolve().parents[2]


@cache
def _forking() -> socket.socket:
    """Where requests go."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-P", forking.__file__, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


class Forked:
    """What tests use of subprocess.Popen, for a command that was forked."""

    def __init__(self, arguments: Sequence[str], cwd: str | Path, pass_fds: Sequence[int]) -> None:
        self._told, tell = os.pipe()
        (stdin, to), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
        self.stdin, self.stdout, self.stderr = os.fdopen(to, "w", 1), os.fdopen(out), os.fdopen(err)
        place = {"folder": os.fspath(cwd), "environment": dict(os.environ)}
        request = {"arguments": arguments, "numbers": [0, 1, 2, *pass_fds], **place}
        socket.send_fds(_forking(), [json.dumps(request).encode()], [tell, stdin, stdout, stderr, *pass_fds])
        for fd in (tell, stdin, stdout, stderr):
            os.close(fd)
        self.pid = self._read()
        self.returncode: int | None = None

    def _read(self) -> int:
        return int(TOLD.unpack(os.read(self._told, TOLD.size))[0])

    def poll(self) -> int | None:
        """How it ended, None: it has not."""
        return self.wait() if self.returncode is None and select.select([self._told], [], [], 0)[0] else self.returncode

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
        for file in (self.stdin, self.stdout, self.stderr):
            file.close()
        os.close(self._told)


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
