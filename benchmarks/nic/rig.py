"""An embedded host with a switch, a card on it, and an application that drives the card: two threads on two cores."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import numpy as np

from benchmarks.hosts import PEER, Here, There
from benchmarks.machine import two_cores
from benchmarks.nic import kernels
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.drivers.netvsc.state import FRAME, QUEUE
from vfio_vmbus.host.switch.template import udp_frame
from vfio_vmbus.iommu.domain import Domain
from vfio_vmbus.iommu.translation import DOMAIN
from vfio_vmbus.memory.block import Block
from vfio_vmbus.vfio.inprocess import InProcessDevice

SETTLE = 0.1  # seconds from the start of traffic to the slice that is counted
_KEPT = np.uint64(0xFFFFFFFF_00000000)  # of a frame's second word: what is not address


class Rig:
    """One host, and one driver of its card at a time. A context manager.

    mode: "isolated"; "open", without isolation, see `child`; "across", isolated, with the host in a process of its own.
    """

    def __init__(self, mode: str) -> None:
        self._stack = ExitStack()
        self._host: Here | There = self._stack.enter_context(There() if mode == "across" else Here())
        self._open = mode == "open"
        self._stop = Block("i8")
        self._table = Block(FRAME, kernels.BURST)
        self._core, _ = two_cores()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def measure(self, what: str, size: int, seconds: float) -> tuple[float, float]:
        """Million frames a second, and the part of the time that both threads ran. What: see `child`."""
        if what in ("tx", "gpa-direct"):
            return self._send(size, seconds, gpa_direct=what == "gpa-direct")
        loops = {"rx": self._receive, "python": self._turn_round}
        return loops[what](size, seconds)

    def _send(self, size: int, seconds: float, gpa_direct: bool) -> tuple[float, float]:
        frame = Block("u1", size)
        frame.array[:] = np.frombuffer(udp_frame(self._host.mac, PEER, size), np.uint8)
        with self._host.sink() as count, self._nic(9000 if size > 1514 else 1500) as nic:
            if gpa_direct:
                kernels.use_no_sections(nic.queue.address)
            return self._run(
                lambda: kernels.send(nic.queue.address, self._table.address, frame.address, size, self._stop.address),
                count,
                seconds,
            )

    def _receive(self, size: int, seconds: float) -> tuple[float, float]:
        with self._nic(1500) as nic, self._host.generator(size):
            return self._run(
                lambda: kernels.receive(nic.queue.address, self._table.address, self._stop.address),
                lambda: nic.counters().rx_frames,
                seconds,
            )

    def _turn_round(self, size: int, seconds: float) -> tuple[float, float]:
        """Each frame goes back to the generator, from the card's own address."""
        addresses = PEER + self._host.mac
        first, second = (np.uint64(int.from_bytes(part, "little")) for part in (addresses[:8], addresses[8:]))

        def loop() -> None:
            queue, stop, base = nic.queue, self._stop.array, nic.queue.receive_buffer.address
            memory = (ctypes.c_uint64 * (nic.queue.receive_buffer.size // 8)).from_address(base)
            words = np.ctypeslib.as_array(memory)
            while not stop[0]:
                frames = queue.rx_burst(kernels.BURST)
                if len(frames):
                    at = (frames["address"] - base) >> 3  # of 8 bytes each, and frames begin on such a word
                    words[at] = first
                    at += 1
                    words[at] = (words[at] & _KEPT) | second
                    queue.tx_burst(frames)

        with self._nic(1500) as nic, self._host.generator(size) as count:
            return self._run(loop, count, seconds)

    @contextmanager
    def _nic(self, mtu: int) -> Iterator[Netvsc]:
        """A driver of the card."""
        function = self._host.attach()
        with open_device(function) as device, Netvsc(device, mtu=mtu) as nic:
            if self._open:
                assert isinstance(function, InProcessDevice)
                _note_delta(function.function.domain, nic.queue.address)
            yield nic

    def _run(self, loop: Callable[[], object], counted: Callable[[], int], seconds: float) -> tuple[float, float]:
        """Run the application's loop on its core, and look at it for a while."""

        def work() -> None:
            os.sched_setaffinity(0, {self._core})
            loop()

        self._stop.array[0] = 0
        thread = threading.Thread(target=work, name="application")
        thread.start()
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        time.sleep(SETTLE)
        before, begin, ran = counted(), time.perf_counter(), [time.clock_gettime(clock), self._host.ran()]
        time.sleep(seconds)
        frames, elapsed = counted() - before, time.perf_counter() - begin
        ran = [now - at for now, at in zip((time.clock_gettime(clock), self._host.ran()), ran, strict=True)]
        self._stop.array[0] = 1
        thread.join()
        return frames / elapsed / 1e6, min(ran) / elapsed


def _note_delta(domain: Domain, queue: int) -> None:
    """For a process without isolation, see `child`."""
    iova = ctypes.c_int64.from_address(queue + QUEUE.fields["pool_iova"][1]).value  # type: ignore[index]
    pool = next(each for each in domain.maps if each.iova <= iova < each.end)
    delta = ctypes.c_int64.from_address(domain.address + DOMAIN.fields["hint"][1])  # type: ignore[index]
    delta.value = pool.address - pool.iova
