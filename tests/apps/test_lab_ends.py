"""Whatever ends a lab, its processes, interfaces and file descriptors go with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from vfio_vmbus.apps.lab import Lab, NamespaceSpec, probe
from vfio_vmbus.apps.lab import lab as lab_module
from vfio_vmbus.errors import LocalError, UnavailableError, UsageError, WaitTimeout

HOLDER = """
import os, sys, time
from vfio_vmbus.apps.lab import Lab
with Lab.pair() as lab:
    print(*[namespace.pid for namespace in lab.namespaces], flush=True)
    {then}
"""
FORK = "child = os.fork(); child and print(child, flush=True)"  # it keeps copies of all sockets open


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if (reason := probe()) is not None:
        pytest.skip(f"no lab on this machine: {reason}")


def fds() -> set[str]:
    return {f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}" for fd in os.listdir("/proc/self/fd") if _open(fd)}


def _open(fd: str) -> bool:
    with suppress(OSError):
        return bool(os.readlink(f"/proc/self/fd/{fd}"))
    return False


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ended(pids: list[int]) -> bool:
    """Waits for processes that are not our children to end; a minute is for ever."""
    until = time.monotonic() + 60
    while any(map(lives, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(map(lives, pids))


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that has a lab, waits for its standard input to end, and prints its workers' ids."""
    code = HOLDER.format(then="sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def worker_ids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(pid) for pid in process.stdout.readline().split()]


def test_leaving_a_lab_leaves_no_fd_and_no_process() -> None:
    before = fds()
    pids = []
    for _ in range(3):
        with Lab.pair() as lab:
            left, right = lab.namespaces
            left.http_serve(1000)
            left.ping(right.address, count=1, timeout=0.01)
            pids += [left.pid, right.pid]
            assert len(fds()) > len(before)
    assert fds() == before
    assert not any(map(lives, pids))


def test_calls_that_fail_leave_no_fd() -> None:
    with Lab(NamespaceSpec("only", "10.77.0.1/24")) as lab:
        (only,) = lab.namespaces
        before = fds()
        inside = len(os.listdir(f"/proc/{only.pid}/fd"))
        for _ in range(5):
            with pytest.raises(UsageError):
                only.http_get("nonsense")
            assert only.ping("10.77.0.9", count=1, timeout=0.01).received == 0
        assert fds() == before
        until = time.monotonic() + 60
        while len(os.listdir(f"/proc/{only.pid}/fd")) > inside and time.monotonic() < until:
            time.sleep(0.01)  # a worker's thread closes its socket after the answer was read
        assert len(os.listdir(f"/proc/{only.pid}/fd")) <= inside


def test_an_exception_in_the_block_ends_the_lab_too() -> None:
    before = fds()
    lab = Lab.pair()
    pids = []

    def fail() -> None:
        with lab:
            pids.extend(namespace.pid for namespace in lab.namespaces)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(pids) == 2
    assert fds() == before
    assert not any(map(lives, pids))


def test_workers_end_when_their_parent_is_killed(holder: subprocess.Popen[str]) -> None:
    pids = worker_ids(holder)
    assert all(map(lives, pids))
    holder.kill()
    assert ended(pids)


def test_workers_end_with_their_parent_though_another_process_holds_its_sockets() -> None:
    code = HOLDER.format(then=f"{FORK}; time.sleep(3600)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        pids = worker_ids(process)
        (child,) = worker_ids(process)
        try:
            process.kill()
            assert ended(pids)
            assert lives(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_ctrl_c_ends_the_parent_with_its_lab_in_order() -> None:
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job would not
    code = heeds + HOLDER.format(then="time.sleep(3600)")
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        pids = worker_ids(process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    assert ended(pids)
    assert errors.count("Traceback") == 1
    assert errors.strip().endswith("KeyboardInterrupt")


def test_a_lab_outlives_the_thread_that_made_it() -> None:
    lab = Lab.pair()
    thread = threading.Thread(target=lab.__enter__)
    thread.start()
    thread.join()
    with closing(lab):
        assert len(lab.namespaces) == 2
        for namespace in lab.namespaces:
            assert namespace.ping(namespace.address, count=1).received == 1


def test_the_death_of_a_worker_is_told_and_leaves_the_other() -> None:
    with Lab.pair() as lab:
        left, right = lab.namespaces
        killer = threading.Timer(0.05, os.kill, (left.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(LocalError, match=r"namespace left: its worker ended \(status -9\): no word"):
            left.ping(right.address, count=1, timeout=3600)
        killer.join()
        with pytest.raises(LocalError, match="namespace left: its worker ended"):
            left.ping(right.address)
        assert right.ping(right.address, count=1).received == 1


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_module, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(lab_module, "EXIT_SECONDS", 0.1)
    before = fds()
    with Lab(NamespaceSpec("only", "10.77.0.1/24")) as lab:
        (only,) = lab.namespaces
        os.kill(only.pid, signal.SIGSTOP)
        with pytest.raises(WaitTimeout, match=r"waited 0\.2 s for Ping in namespace only"):
            only.ping(only.address, count=1, interval=0, timeout=0.1)
    assert not lives(only.pid)
    assert fds() == before


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("/bin/false", r"cannot do its work here: namespace only: its worker ended \(status 1\): no word"),
        ("/nowhere/python", "cannot be started: /nowhere/python: No such file or directory"),
        ("", "cannot be started: no path to Python"),
    ],
)
def test_a_worker_that_does_not_start(monkeypatch: pytest.MonkeyPatch, program: str, says: str) -> None:
    before = fds()
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(UnavailableError, match=says), Lab(NamespaceSpec("only", "10.77.0.1/24")):
        pass
    assert fds() == before
