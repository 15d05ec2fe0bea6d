"""The worker: its kernel runs without Python, and lets go of its state whenever asked, busy, asleep or broken."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from vfio_vmbus.dataplane.worker import Worker, attention, control_at, sleep
from vfio_vmbus.errors import UsageError, WaitTimeout
from vfio_vmbus.memory.access import viewer
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import kernel
from vfio_vmbus.memory.registry import OutOfBounds

STATE = np.dtype([("control", "i8"), ("rounds", "i8")])
state_at = viewer(STATE)
DEADLINE = 20.0


@kernel("void(i8)")
def count(address: int) -> None:
    """Counts as fast as it can; sleeps between counts unless it may spin."""
    state = state_at(address)
    while attention(state.control) == 0:
        state.rounds += 1
        if control_at(state.control).spin_ns == 0:
            sleep(state.control, -1)


class Rig:
    def __init__(self, poll: str, run: Callable[[int], object] = count) -> None:
        self.state = Block(STATE)
        self.worker = Worker("counter", run, self.state.address, poll=poll, keep=self)
        self.state["control"] = self.worker.control.address

    @property
    def rounds(self) -> int:
        return self.state["rounds"]


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)


@pytest.fixture(params=["busy", "interrupt"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    rig.worker.start()
    eventually(lambda: rig.rounds > 0, "a first round")
    yield rig
    rig.worker.stop()


def test_a_pause_owns_the_state_and_ends(rig: Rig) -> None:
    for _ in range(20):
        with rig.worker.paused():
            before = rig.rounds
            time.sleep(0.002)
            assert rig.rounds == before
            rig.state["rounds"] = 0  # nobody else writes now, so this is not lost
        eventually(lambda: rig.rounds > 0, "a round after the pause")


def test_an_exception_in_the_block_lets_the_worker_go_on(rig: Rig) -> None:
    with suppress(ZeroDivisionError), rig.worker.paused():
        rig.state["rounds"] = 0
        raise ZeroDivisionError
    eventually(lambda: rig.rounds > 0, "a round after the pause")


def test_a_watched_doorbell_wakes_a_sleeper_and_is_never_read() -> None:
    rig = Rig("interrupt")
    doorbell = os.eventfd(0)
    rig.worker.watch(doorbell)
    rig.worker.start()
    for ring in range(1, 20):
        eventually(lambda: rig.worker.control["sleeps"] == rig.rounds >= ring, "sleep")  # noqa: B023 - called at once
        before = rig.rounds
        os.eventfd_write(doorbell, 1)
        eventually(lambda: rig.rounds > before, "a round after the doorbell")  # noqa: B023 - called at once
    assert os.eventfd_read(doorbell) == 19
    rig.worker.unwatch(doorbell)
    os.close(doorbell)
    rig.worker.stop()


@pytest.mark.parametrize("poll", ["busy", "adaptive", "interrupt"])
@pytest.mark.parametrize("started", [True, False])
def test_stop_leaves_no_thread_and_no_descriptor(poll: str, started: bool) -> None:
    fds, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        rig = Rig(poll)
        if started:
            rig.worker.start()
        rig.worker.stop()
        rig.worker.stop()
        assert not rig.worker.running
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == (fds, threads)


def test_stop_ends_a_worker_that_someone_holds(rig: Rig) -> None:
    with rig.worker.paused():
        rig.worker.stop()
    assert not rig.worker.running


def test_what_the_kernel_raises_is_raised_to_whoever_asks() -> None:
    def run(_: int) -> None:
        raise OutOfBounds("access of 8 bytes at 0x10")

    rig = Rig("busy", run)
    rig.worker.start()
    for _ in range(2):
        with pytest.raises(OutOfBounds, match="0x10"), rig.worker.paused():
            pytest.fail("a failed worker's state is nobody's")
    assert not rig.worker.running
    with pytest.raises(OutOfBounds, match="0x10"):
        rig.worker.stop()
    rig.worker.stop()


def test_a_kernel_that_does_not_let_go_is_a_time_out_not_a_hang() -> None:
    let_go = threading.Event()

    def run(_: int) -> None:
        let_go.wait()

    rig = Rig("busy", run)
    rig.worker.start()
    with pytest.raises(WaitTimeout, match=r"waited 0\.05 s for worker counter"), rig.worker.paused(timeout=0.05):
        pytest.fail("it was not parked")
    with pytest.raises(WaitTimeout, match="worker counter to end"):
        rig.worker.stop(timeout=0.05)
    let_go.set()
    rig.worker.stop()


def test_one_owner_at_a_time(rig: Rig) -> None:
    outcome: list[BaseException] = []

    def other() -> None:
        try:
            with rig.worker.paused(timeout=0.02):
                pass
        except WaitTimeout as error:
            outcome.append(error)

    with rig.worker.paused():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        before = rig.rounds
        time.sleep(0.002)
        assert rig.rounds == before, "the other's time-out must not set the worker free"
    assert "another holder of worker counter" in str(outcome[0])


def test_owners_take_turns(rig: Rig) -> None:
    def add() -> None:
        for _ in range(25):
            with rig.worker.paused():
                value = rig.state["rounds"]
                time.sleep(0)
                rig.state["rounds"] = value + (1 << 32)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rig.rounds >> 32 == 100


def test_orders_of_calls_that_cannot_work() -> None:
    rig = Rig("busy")
    with rig.worker.paused():
        assert not rig.worker.running, "before the start there is nobody to park"
    rig.worker.start()
    with pytest.raises(UsageError, match="started before"):
        rig.worker.start()
    rig.worker.stop()
    rig.worker.wake()  # nobody is there to be woken, and its descriptor may be someone else's by now
    with rig.worker.paused():
        assert not rig.worker.running, "nor after the end"
    with pytest.raises(UsageError, match="started before"):
        rig.worker.start()


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="'lazy': take one of busy, adaptive, interrupt"):
        Rig("lazy")
    with pytest.raises(UsageError, match="-1 ns"):
        Worker("counter", count, 0, spin_ns=-1)


def test_a_worker_that_nobody_stopped_does_not_keep_the_process(tmp_path: Path) -> None:
    script = tmp_path / "forgets.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_worker import Rig, eventually\n"
        "rigs = [Rig('busy'), Rig('interrupt')]\n"
        "for rig in rigs:\n"
        "    rig.worker.start()\n"
        "    eventually(lambda: rig.rounds > 0, 'a round')\n"
        "print('end')\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")
