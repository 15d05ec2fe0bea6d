"""An eventfd is signalled whatever its other holder did to it, and nobody waits."""

from __future__ import annotations

import os
from signal import alarm

import pytest

from vfio_vmbus.memory.kernel import step
from vfio_vmbus.memory.signal import signal, signal_now, signal_record
from vfio_vmbus.testing.leaks import nothing_left

FULL = (1 << 64) - 2
"""As much as a counter holds by write(2)."""


@step("void(i8, i8)")
def _signal(fd: int, record: int) -> None:
    signal(fd, record)


def _by_kernel(fd: int) -> None:
    record = signal_record()
    _signal(fd, record.address)


@pytest.fixture(params=[_by_kernel, signal_now], ids=["kernel", "python"])
def ring(request: pytest.FixtureRequest):
    return request.param


@pytest.mark.parametrize("blocking", [False, True])
def test_it_counts(ring, blocking: bool) -> None:
    fd = os.eventfd(0, 0 if blocking else os.EFD_NONBLOCK)
    with nothing_left(objects=False):
        for _ in range(1000):  # more than the completion ring has places
            ring(fd)
    assert os.eventfd_read(fd) == 1000
    os.close(fd)


def test_a_full_counter_that_blocks_holds_nobody_up(ring) -> None:
    fd = os.eventfd(0, 0)
    os.eventfd_write(fd, FULL)
    for _ in range(3):
        ring(fd)
    assert os.eventfd_read(fd) == FULL + 1
    ring(fd)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # what the child does touches no other thread's locks
def test_nor_does_it_hold_up_a_process_that_was_forked(ring) -> None:
    fd = os.eventfd(0, 0)
    os.eventfd_write(fd, FULL)
    child = os.fork()
    if child == 0:
        alarm(60)  # whoever waits is killed
        try:
            ring(fd)
            ring(fd)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.eventfd_read(fd) == FULL + 1
    os.close(fd)
