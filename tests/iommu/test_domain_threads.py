"""Kernels look up while maps come and go: they see the old table or the new one, and never memory that is gone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
from iommu_kernels import LOOKER, look_on

from vfio_vmbus.dataplane.worker import Worker
from vfio_vmbus.errors import IsolationFault
from vfio_vmbus.iommu.domain import Domain
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import INTERPRETED
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left

PAGES = 64
BASE = 1 << 32
STEPS = 100 if INTERPRETED else 400
REFUSALS = 300 if INTERPRETED else 20_000
DEADLINE = 30.0


class Rig:
    """A domain, two workers that look all its pages up, and memory whose pages begin and end with their numbers."""

    def __init__(self) -> None:
        self.memory = SharedMemory(PAGES * PAGE)
        with self.memory.map() as mapping:
            for page in range(PAGES):
                for at in (0, PAGE - 8):
                    mapping.write(page * PAGE + at, page.to_bytes(8, "little"))
        self.domain = Domain("client")
        self.domain.quiesce = self.paused
        self.states = [Block(LOOKER) for _ in range(2)]
        self.workers = []
        for state in self.states:
            worker = Worker("looker", look_on, state.address, keep=self)
            state["control"] = worker.control.address
            state["domain"] = self.domain.address
            state["base"] = BASE
            state["pages"] = PAGES
            self.workers.append(worker)

    @contextmanager
    def paused(self) -> Iterator[None]:
        with ExitStack() as stack:
            for worker in self.workers:
                stack.enter_context(worker.paused())
            yield

    def sum(self, field: str) -> int:
        return sum(state[field] for state in self.states)

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()
        self.domain.quiesce = ExitStack
        self.domain.close()
        self.memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with nothing_left(objects=False):
        rig = Rig()
        for worker in rig.workers:
            worker.start()
        yield rig
        rig.close()


def test_maps_come_and_go_under_kernels(rig: Rig) -> None:
    chance = random.Random(1)
    mapped: dict[int, int] = {}
    for _ in range(STEPS):
        page, count = chance.randrange(PAGES), chance.randrange(1, 5)
        overlapping = [at for at, size in mapped.items() if at < page + count and page < at + size]
        if overlapping:
            at = chance.choice(overlapping)
            assert rig.domain.unmap(BASE + at * PAGE, mapped[at] * PAGE) == mapped.pop(at) * PAGE
        elif page + count <= PAGES:
            rig.domain.map(BASE + page * PAGE, rig.memory.fd, page * PAGE, count * PAGE, READ)
            mapped[page] = count
    hits, end = rig.sum("hits"), time.monotonic() + DEADLINE
    while rig.sum("hits") == hits and time.monotonic() < end:
        time.sleep(0.001)
    assert rig.sum("hits") > hits
    assert rig.sum("misses") > 0
    assert rig.sum("wrong") == 0


def test_every_fault_of_a_kernel_and_of_threads_is_counted_once(rig: Rig) -> None:
    """And whoever reads the list meanwhile sees whole ones: in each of them the address says the length."""
    state = rig.states[0]

    def refuse() -> None:
        for number in range(1, REFUSALS // 20 + 1):
            with pytest.raises(IsolationFault):
                rig.domain.translate(number * PAGE, number, READ)

    threads = [threading.Thread(target=refuse) for _ in range(2)]
    with rig.workers[0].paused():
        state["refusals"] = REFUSALS
    for thread in threads:
        thread.start()
    end = time.monotonic() + DEADLINE
    while state["refusals"] > 0 or any(thread.is_alive() for thread in threads):
        assert time.monotonic() < end
        faults = rig.domain.faults()
        assert all(fault.iova == fault.size * PAGE for fault in faults)
        kernels = [fault.size for fault in faults if fault.direction == "write"]
        assert all(after == before + 1 for before, after in pairwise(kernels))
    for thread in threads:
        thread.join()
    assert rig.domain.fault_count == REFUSALS + 2 * (REFUSALS // 20)
    assert [fault.size for fault in rig.domain.faults() if fault.direction == "write"][-1] == REFUSALS


def test_the_other_direction_is_refused_while_one_is_granted(rig: Rig) -> None:
    rig.domain.map(BASE, rig.memory.fd, 0, PAGES * PAGE, READ)
    with pytest.raises(IsolationFault):
        rig.domain.translate(BASE, PAGE, WRITE)
    assert rig.sum("wrong") == 0
