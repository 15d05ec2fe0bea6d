"""`ring/SIZE/burst` and `ring/SIZE/single`: packets through a ring between two processes, payload copied in and copied out.

Both ends poll, as ring.c does, the yardstick. A burst is 32 packets and shows its index once; single packets show every one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from benchmarks.cc import compile_c
from benchmarks.harness import Bar, Figures, Run, bench
from benchmarks.machine import ROOT, two_cores
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory

DATA_PAGES = 512
BURST = 32
SLOT = 2048  # bytes from one payload to the next in private memory
RUN_BYTES = 3 << 28  # of payload in one run, at most
PACKETS = {"burst": 6_000_000, "single": 2_000_000}  # in one run, at most; so that each lasts some 0.03 s
RUNS = 3  # of one sample: the fastest counts, as whatever else runs on these cores only slows them down


class Ends:
    """A writer and a reader process over one ring, which wait for work on their standard input."""

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        writer, reader = two_cores()
        self._ends = [self._start("write", writer), self._start("read", reader)]

    def _start(self, role: str, core: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.ring", role, str(self._shared.fd), str(core)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, pass_fds=[self._shared.fd])

    def mpps(self, size: int, burst: int, packets: int) -> float:
        """Million packets a second, from the first one that the reader saw to the last one that it copied."""
        for end in self._ends:
            _pipe(end.stdin).write(f"{size} {burst} {packets}\n")
            _pipe(end.stdin).flush()
        answers = [_pipe(end.stdout).readline() for end in self._ends]
        if not all(answers):
            raise RuntimeError(f"an end of the ring stopped: {[end.poll() for end in self._ends]}")
        return packets / int(answers[1]) * 1e3

    def close(self) -> None:
        for end in self._ends:
            with end:
                _pipe(end.stdin).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def ends() -> Iterator[Ends]:
    with SharedMemory((1 + DATA_PAGES) * PAGE) as shared:
        os.pwrite(shared.fd, b"\1", 8)  # interrupt mask: the reader polls
        os.pwrite(shared.fd, b"\1", 64)  # feature bits: pending_send_sz is known
        both = Ends(shared)
        try:
            yield both
        finally:
            both.close()


def _c_mpps(size: int, burst: int, packets: int) -> float:
    command = [str(compile_c("ring.c")), *map(str, two_cores()), str(size), str(burst), str(packets)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(run: Run, size: int, mode: str) -> Figures:
    burst = BURST if mode == "burst" else 1
    packets = min(PACKETS[mode], RUN_BYTES // size)
    both = run.shared(ends)
    both.mpps(size, burst, packets // 10)
    samplers = {
        "ours": lambda: max(both.mpps(size, burst, packets) for _ in range(RUNS)),
        "yardstick": lambda: max(_c_mpps(size, burst, packets) for _ in range(RUNS)),
    }
    return run.measure_in_turn(samplers).figures()


for _size in (64, 256, 1500):
    for _mode, _bar in (("burst", 0.9), ("single", 1.0)):

        @bench(f"ring/{_size}/{_mode}", unit="Mpps", bar=Bar("ratio", at_least=_bar))
        def _ring(run: Run, size: int = _size, mode: str = _mode) -> Figures:
            return _measure(run, size, mode)


def serve(role: str, fd: int, core: int) -> None:
    """One end: for each line "size burst packets" of standard input, pass packets and print the nanoseconds that took."""
    from benchmarks.ring_kernels import read_packets, write_packets
    from vfio_vmbus.memory.block import Block
    from vfio_vmbus.memory.mapping import Mapping, Piece
    from vfio_vmbus.ring.bursts import PACKET
    from vfio_vmbus.ring.ends import IncomingRing, OutgoingRing

    os.sched_setaffinity(0, {core})
    with Mapping([Piece(fd, 0, (1 + DATA_PAGES) * PAGE)], wrap_from=PAGE) as mapping:
        end = OutgoingRing(mapping) if role == "write" else IncomingRing(mapping)
        memory, table = Block("u1", BURST * SLOT), Block(PACKET, BURST)
        memory.array[:] = 1
        for line in sys.stdin:
            size, burst, packets = map(int, line.split())
            table.array[:] = [(at * SLOT, size, 0, 6, 0, 16) for at in range(BURST)]
            if role == "write":
                took = write_packets(end.address, memory.address, table.address, burst, packets)
            else:
                took = read_packets(end.address, memory.address, memory.size, table.address, burst, packets)
            end.check()
            print(took, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
