"""`vfio-vmbus vm` as a person and as a script meet it: at a terminal, in pipes, and where it cannot be."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

READY = b"\x02ready"
PATIENCE = 300.0
CTRL_A = b"\x01"
_PDEATHSIG = 1


class Command:
    """A command, forked from this process, which has everything imported. terminal: its standard input and output are one."""

    def __init__(self, *arguments: str, terminal: bool = False) -> None:
        self.out = self.err = b""
        error, theirs_err = os.pipe()
        if terminal:
            self._input, theirs = os.openpty()
            output, inside, outside = self._input, theirs, theirs
        else:
            inside, self._input = os.pipe()
            output, outside = os.pipe()
        self._streams = {output: "out", error: "err"}
        self._before = termios.tcgetattr(inside) if terminal else None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(arguments, inside, outside, theirs_err, terminal)
        self._terminal = inside if terminal else -1
        for fd in {inside, outside, theirs_err} - {self._terminal}:
            os.close(fd)
        self._number = 0

    @property
    def terminal(self) -> str:
        return "as before" if termios.tcgetattr(self._terminal) == self._before else "changed"

    @staticmethod
    def _become(arguments: tuple[str, ...], inside: int, outside: int, error: int, terminal: bool) -> None:
        status = 99
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)  # what fails here leaves no guest behind
            for fd, number in ((inside, 0), (outside, 1), (error, 2)):
                os.dup2(fd, number)
            os.closerange(3, 1024)
            if terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            sys.argv = ["vfio-vmbus", *arguments]
            from vfio_vmbus.cli.main import main

            main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def type(self, data: bytes) -> None:
        os.write(self._input, data)

    def until(self, what: bytes, where: str = "out") -> None:
        end = time.monotonic() + PATIENCE
        while what not in getattr(self, where):
            if "err" not in self._streams.values() or time.monotonic() > end:
                raise AssertionError(f"never {what!r}: {self.out[-1000:]!r} {self.err!r}")
            self._take(1)

    def ask(self, command: str) -> str:
        """What a command says in the guest's shell (tests/guest/shell.py)."""
        self._number += 1
        self.type(f"{self._number} {command}\n".encode())
        begin, end = f"\x02{self._number}".encode(), f"\x03{self._number} ".encode()
        self.until(end)
        return self.out.partition(begin)[2].partition(end)[0].decode().strip()

    def wait(self) -> int:
        """Its exit status, once it has ended and all that it said was read."""
        end = time.monotonic() + PATIENCE
        while "err" in self._streams.values():
            assert time.monotonic() < end, f"it does not end: {self.out[-1000:]!r} {self.err!r}"
            self._take(1)
        while self._take(0):
            pass
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _take(self, seconds: float) -> bool:
        """What is there to read now, or within this time. False when there is nothing."""
        ready = select.select(list(self._streams), [], [], seconds)[0]
        for fd in ready:
            data = os.read(fd, 1 << 16)
            name = self._streams[fd]
            setattr(self, name, getattr(self, name) + data)
            if not data:
                del self._streams[fd]
                os.close(fd)
        return bool(ready)


def run(*arguments: str) -> tuple[int, str, str]:
    """A command to its end: exit status, what it said on stdout and on stderr."""
    command = Command(*arguments)
    status = command.wait()
    return status, command.out.decode(), command.err.decode()


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


class Guests:
    """Commands that begin guests of this kernel, with a shell image."""

    def __init__(self, kernel: str, image: str) -> None:
        self._common = ("vm", "--kernel", kernel, "--initrd", image, "--poll", "interrupt")

    def start(self, *arguments: str, words: str = "", **options: Any) -> Command:
        return Command(*self._common, "--cmdline", f"quiet mitigations=off {words}".strip(), *arguments, **options)

    def ready(self, *arguments: str, **options: Any) -> Command:
        command = self.start(*arguments, **options)
        command.until(READY)
        return command


def report_of(name: str) -> Any:
    status, out, err = run("status", name, "--json")
    assert status == 0, err
    return json.loads(out)["processes"][0]


def at_a_terminal(report: Callable[[Any], None], kernel: str, image: str) -> dict[str, Any]:
    """A person's guest: seen by `status`, changed by `control`, ended by the escape key."""
    if not os.path.ismount("/dev/pts"):
        os.makedirs("/dev/pts", exist_ok=True)
        subprocess.run(["mount", "-t", "devpts", "devpts", "/dev/pts"], check=True)
    guest = Guests(kernel, image).ready("--nic", "none,mac=00:15:5d:00:00:07", "--name", "person", terminal=True)
    assert b"Ctrl-A x ends the machine" in guest.err
    report("ready")
    find = "grep -l 00:15:5d:00:00:07 /sys/class/net/*/address | cut -d/ -f5"
    seen: dict[str, Any] = {"status": report_of("person")}
    eth = guest.ask(find)
    guest.ask(f"ip link set {eth} up")

    def carrier() -> str:
        return guest.ask(f"cat /sys/class/net/{eth}/carrier")

    eventually(lambda: carrier() == "1", "a carrier")
    assert run("control", "person", "link", "nic0", "down")[0] == 0
    eventually(lambda: carrier() == "0", "no carrier")
    assert run("control", "person", "link", "nic0", "up")[0] == 0
    eventually(lambda: carrier() == "1", "a carrier again")
    report("link")
    assert run("control", "person", "mtu", "nic0", "1400")[0] == 0
    eventually(lambda: guest.ask(f"cat /sys/class/net/{guest.ask(find)}/mtu") == "1400", "the new MTU")
    report("mtu")
    assert run("control", "person", "rescind", "nic0")[0] == 0
    eventually(lambda: guest.ask(find) == "", "no card")
    assert run("control", "person", "offer", "nic0")[0] == 0
    eventually(lambda: guest.ask(find), "the card again")
    before = guest.ask("ls /sys/class/net | wc -w")
    assert run("control", "person", "offer", "nic1")[0] == 0
    eventually(lambda: int(guest.ask("ls /sys/class/net | wc -w")) == int(before) + 1, "one more card")
    report("hot-plugged")
    guest.type(CTRL_A + b"h")
    guest.until(b"send Ctrl-A to the guest", "err")
    guest.type(CTRL_A + b"x")
    seen["ended"] = guest.wait()
    seen["said"] = guest.err.decode()
    seen["terminal"] = guest.terminal
    return seen


def in_pipes(report: Callable[[Any], None], kernel: str, image: str, folder: str) -> dict[str, Any]:
    """A script's guests: orderly ends, panics, time-outs, signals, and kernels that know no Hyper-V."""
    guests, found = Guests(kernel, image), {}
    guest = guests.ready("--nic", "tap=vm0", "--max-version", "4.0", "--name", "script")
    found["version"] = report_of("script")["clients"][0]["version"]
    found["tap"] = Path("/sys/class/net/vm0").exists()
    found["taken"] = run("vm", "--kernel", kernel, "--nic", "tap=vm0")
    guest.type(b"1 poweroff -f\n")
    found["power-off"] = guest.wait(), guest.err.decode()
    report("power-off")
    guest = guests.ready()
    guest.type(b"1 echo c >/proc/sysrq-trigger\n")
    found["panic"] = guest.wait(), guest.err.decode()
    report("panic")
    log = Path(folder) / "console.log"
    guest = guests.start("--nic", "none", "--console", str(log), words="nopv")
    eventually(lambda: log.exists() and READY in log.read_bytes(), "a guest without Hyper-V")
    os.kill(guest.pid, signal.SIGTERM)
    found["signal"] = guest.wait(), guest.err.decode()
    log.unlink()
    report("signal")
    guest = guests.ready("--nic", "none", words="nopv")
    guest.type(b"1 poweroff -f\n")
    found["no Hyper-V"] = guest.wait(), guest.err.decode()
    report("no Hyper-V")
    found["time-out"] = run("vm", "--kernel", kernel, "--timeout", "0.2", "--cmdline", "quiet")
    return found


def refused(report: Callable[[Any], None], kernel: str, image: str) -> dict[str, Any]:
    """What is no guest: exit status, stdout, stderr of each."""
    wrong = {
        "no bzImage": ("--kernel", image),
        "too much memory": ("--kernel", kernel, "--memory", "1T"),
    }
    return {name: run("vm", *arguments) for name, arguments in wrong.items()}
