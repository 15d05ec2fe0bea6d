"""A program that the rig runs: it ends with the rig, and what it said is at hand when something fails."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SOURCES = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
"""Environment of a Python program that is to find this project, installed or not."""

PATIENCE = 120.0
"""Seconds that anything of the rig may take on a loaded machine."""


class RigError(Exception):
    """The rig's programs did not do what they are there for; the message has the end of what they said."""


class Program:
    """A child process whose output goes to `log`. `end` is harmless when it has ended."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, fds: Sequence[int] = ()
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # it does not outlive a rig that is killed
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                pass_fds=fds,
                start_new_session=True,  # an interrupt at the terminal is the rig's to handle
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status once it has ended; raises RigError when it does not."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RigError(f"{self.name} did not end within {timeout:.0f} s\n{self.tail()}") from None

    def kill(self, number: int = signal.SIGKILL) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        """SIGTERM, and SIGKILL when that is not enough."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def until(self, what: str, attempt: Callable[[], T | None], timeout: float = PATIENCE) -> T:
        """The first result of `attempt` that is not None; raises RigError when the program ends or time is up."""
        deadline = time.monotonic() + timeout
        while True:
            result = attempt()
            if result is not None:
                return result
            if not self.running:
                raise RigError(f"{self.name} ended with {self._process.returncode} before {what}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RigError(f"{self.name}: not {what} within {timeout:.0f} s\n{self.tail()}")
            time.sleep(0.02)

    def tail(self, lines: int = 30) -> str:
        """The last lines of what it said."""
        return tail(self.log, lines)


def tail(log: Path, lines: int = 30) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    return f"--- the end of {log.name}:\n" + "\n".join(text.splitlines()[-lines:])
