"""`nic/*`: frames through driver, embedded host and switch, isolation on; the yardstick is a memif pair of DPDK.

The driver's loop and the switch's worker are two threads of one process (`child`), each on a core of its own. Of the frames,
one side makes a copy: the driver when it sends, the host when the driver receives; memif copies on both sides. Every frame's
headers are looked at on the other side.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from statistics import median
from types import TracebackType
from typing import Self

from benchmarks.harness import Bar, Figures, Run, bench
from benchmarks.machine import BUILD, ROOT
from benchmarks.memif import Memif
from vfio_vmbus.errors import UnavailableError

SIZES = (64, 256, 1500)
BARS = {64: Bar("ratio", at_least=0.2), 256: None, 1500: Bar("ratio", at_least=0.25)}
ACROSS_SIZES = (64, 1500)
GPA_DIRECT_SIZES = (64, 1500, 9000)
"""Where isolation costs: one look-up a frame, three at 9000 bytes. Frames in sections of the send buffer need none."""
PAIRS = 4
"""Slices with isolation and without in a sample there: the difference is little, so each is compared with its neighbour in time."""
SHORT_SLICE = 0.1

SLICE = 0.5  # seconds that one sample looks at
WARM_UP = 0.05
OWN_CORES = 0.9  # of the slice; with less the machine was shared, and the note says so


class Child:
    """The process to be measured, which sleeps except while `mpps` measures. A context manager."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self.shares: list[float] = []
        """What part of the time both threads had their cores to themselves, a sample each."""

    def __enter__(self) -> Self:
        environment = dict(os.environ)
        if self._mode == "open":  # other code than the sources say, so its kernels are kept apart
            environment["XDG_CACHE_HOME"] = str(BUILD / "without-isolation")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.nic.child", self._mode],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt at the terminal is the bench's to handle
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def mpps(self, what: str, size: int, seconds: float = SLICE) -> float:
        """Million frames a second, see `child`. Raises UnavailableError on a machine so busy that none passed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what} {size} {seconds}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if not answer:
            raise RuntimeError(f"the process with driver and host ended with status {self._process.wait()}, see its words above")
        figure, share = map(float, answer)
        if figure == 0:
            raise UnavailableError(f"no frame passed within {seconds:g} s: other processes have the cores")
        self.shares.append(share)
        return figure

    def warm_up(self, what: str, size: int) -> None:
        """Once unmeasured; what was noted of other samples is forgotten."""
        self.mpps(what, size, WARM_UP)
        self.shares.clear()

    def remark(self) -> str:
        """A word about a machine that had other things to do, or ""."""
        share = median(self.shares)
        return "" if share >= OWN_CORES else f"other processes had {1 - share:.0%} of the cores meanwhile"


def isolated() -> Child:
    return Child("isolated")


def across() -> Child:
    return Child("across")


def without_isolation() -> Child:
    return Child("open")


for _size in SIZES:
    for _what in ("tx", "rx"):

        @bench(f"nic/{_what}/{_size}", unit="Mpps", bar=BARS[_size])
        def _nic(run: Run, what: str = _what, size: int = _size) -> Figures:
            ours = run.shared(isolated)
            ours.warm_up(what, size)
            samplers = {
                "ours": lambda: ours.mpps(what, size),
                "yardstick": lambda: run.shared(Memif).mpps(size),
            }
            return run.measure_in_turn(samplers).figures(ours.remark())


for _size in ACROSS_SIZES:
    for _what in ("tx", "rx"):

        @bench(f"nic/across/{_what}/{_size}", unit="Mpps", bar=Bar("ratio", at_least=0.95))
        def _across(run: Run, what: str = _what, size: int = _size) -> Figures:
            """Driver and host in two processes, by vfio-user; the yardstick is the same within one."""
            ours, yardstick = run.shared(across), run.shared(isolated)
            ours.warm_up(what, size)
            yardstick.warm_up(what, size)
            samplers = {"ours": lambda: ours.mpps(what, size), "yardstick": lambda: yardstick.mpps(what, size)}
            return run.measure_in_turn(samplers).figures(ours.remark())


@bench("nic/isolation-cost", unit="fraction", bar=Bar("value", at_most=0.15))
def isolation_cost(run: Run) -> Figures:
    """What is lost in the worst case, against a process whose look-ups are a bare addition."""
    on, off = run.shared(isolated), run.shared(without_isolation)
    for size in GPA_DIRECT_SIZES:
        on.warm_up("gpa-direct", size)
        off.warm_up("gpa-direct", size)
    lost = run.measure_in_turn({str(size): partial(_lost, on, off, size) for size in GPA_DIRECT_SIZES}).medians
    each = ", ".join(f"{loss:.3f} at {size}" for size, loss in lost.items())
    words = [f"GPA-direct, bytes: {each}", on.remark()]
    return Figures(max(0.0, *lost.values()), note="; ".join(filter(None, words)))


def _lost(on: Child, off: Child, size: int) -> float:
    """The fraction that isolation takes."""
    return median(1 - on.mpps("gpa-direct", size, SHORT_SLICE) / off.mpps("gpa-direct", size, SHORT_SLICE) for _ in range(PAIRS))


@bench("nic/python-burst32", unit="Mpps", bar=Bar("value", at_least=2))
def python_burst(run: Run) -> Figures:
    """Frames of 64 bytes from a generator, received, readdressed with numpy in the receive buffer, sent back, counted there."""
    ours = run.shared(isolated)
    ours.warm_up("python", 64)
    return run.measure_in_turn({"ours": lambda: ours.mpps("python", 64)}).figures(ours.remark())
