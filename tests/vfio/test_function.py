"""The PCI function by itself: registers against a model, a backend that misbehaves, and what it costs in descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_vmbus.errors import DmaError, ProtocolError, RingError, UsageError, WaitTimeout
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory.mapping import PAGE, Piece
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import Stock, nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.function import PciFunction, Vectors

IOVA = 1 << 32
RW = READ | WRITE


class Notes:
    """A backend that notes what it is told, and raises what it is told to."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.start_raises: Exception | None = None
        self.stop_raises: Exception | None = None

    def start(self, pieces: list[Piece], downstream: int) -> None:
        self.heard.append(("start", sum(piece.size for piece in pieces), downstream))
        if self.start_raises:
            raise self.start_raises

    def revoke(self, iova: int, size: int) -> None:
        self.heard.append(("revoke", iova, size))

    def stop(self) -> None:
        self.heard.append("stop")
        if self.stop_raises:
            raise self.stop_raises


@contextmanager
def function() -> Iterator[tuple[PciFunction, Notes]]:
    with nothing_left(objects=False), SharedMemory(8 * PAGE) as memory:
        made = PciFunction("function")
        made.backend = notes = Notes()
        made.domain.map(IOVA, memory.fd, 0, 8 * PAGE, RW)
        try:
            yield made, notes
        finally:
            notes.stop_raises = None
            made.close()
            made.close()


def write(made: PciFunction, offset: int, value: int, size: int = 4) -> None:
    made.write(offset, value.to_bytes(size, "little"))


def read(made: PciFunction, offset: int, size: int = 4) -> int:
    return int.from_bytes(made.read(offset, size), "little")


def start(made: PciFunction, iova: int = IOVA, upstream: int = 2, downstream: int = 2) -> tuple[int, int]:
    write(made, reg.REG_ADMIN_IOVA, iova, 8)
    write(made, reg.REG_ADMIN_UPSTREAM, upstream)
    write(made, reg.REG_ADMIN_DOWNSTREAM, downstream)
    write(made, reg.REG_CONTROL, reg.CONTROL_START)
    return status(made)


def status(made: PciFunction) -> tuple[int, int]:
    return read(made, reg.REG_STATUS), read(made, reg.REG_ERROR)


RUNNING = (reg.STATUS_RUNNING, reg.ERROR_NONE)


class Model:
    """The register table of `registers`, written down a second time."""

    WORDS = (0x30, 0x34, 0x38, 0x3C)

    def __init__(self) -> None:
        self.words = dict.fromkeys(self.WORDS, 0)
        self.state = (0, 0)

    def write(self, offset: int, value: int) -> None:
        if offset in self.words:
            self.words[offset] = value
        elif (offset, value) == (0x24, 2):
            self.__init__()  # type: ignore[misc]
        elif (offset, value) == (0x24, 1):
            self.state = self.start()

    def start(self) -> tuple[int, int]:
        iova, upstream, downstream = self.words[0x30] + (self.words[0x34] << 32), self.words[0x38], self.words[0x3C]
        if self.state[0] & 1:
            return 2, 4
        if upstream < 2 or downstream < 2 or upstream + downstream > 64:
            return 2, 1
        if iova % 4096 or not (iova >= IOVA and iova + 4096 * (upstream + downstream) <= IOVA + 8 * 4096):
            return 2, 2
        return 1, 0

    def read(self, offset: int) -> int:
        table = {
            0x00: 0x53424D56,
            0x04: 1,
            0x0C: reg.CHANNELS,
            0x10: 65,
            0x14: 64,
            0x20: self.state[0],
            0x28: self.state[1],
            **self.words,
        }
        return table.get(offset, 0)


offsets = st.one_of(
    st.sampled_from([0x24, *Model.WORDS]),
    st.integers(0, 0x20).map(lambda n: 4 * n),
    st.integers(0, reg.BAR0_SIZE // 4 - 1).map(lambda n: 4 * n),
)
values = st.one_of(
    st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 6, 62, 63, PAGE, IOVA & 0xFFFFFFFF, IOVA >> 32]), st.integers(0, (1 << 32) - 1)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(offsets, values, values, st.booleans()), max_size=40))
def test_registers_are_those_of_the_table(steps: list[tuple[int, int, int, bool]]) -> None:
    with function() as (made, _):
        model = Model()
        start(made)
        for offset, value in ((0x30, 0), (0x34, 1), (0x38, 2), (0x3C, 2), (0x24, 1)):
            model.write(offset, value)
        for offset, low, high, wide in steps:
            if wide and offset % 8 == 0:
                write(made, offset, low | high << 32, 8)
                model.write(offset, low)
                model.write(offset + 4, high)
            else:
                write(made, offset, low)
                model.write(offset, low)
            for at in range(0, 0x48, 8):
                assert read(made, at, 8) == model.read(at) | model.read(at + 4) << 32, hex(at)
            assert read(made, offset) == model.read(offset)


def test_the_backend_gets_the_ring_and_is_told_to_let_go() -> None:
    with function() as (made, notes):
        assert start(made, IOVA, 2, 5) == RUNNING
        assert notes.heard == [("start", 7 * PAGE, 2 * PAGE)]
        made.fail(reg.ERROR_PROTOCOL)
        assert status(made) == (reg.STATUS_FAILED, reg.ERROR_PROTOCOL)
        made.reset()
        assert notes.heard[1:] == ["stop", "stop"]
        assert status(made) == (0, 0)


@pytest.mark.parametrize("error", [RingError("indices"), DmaError("sealed"), UsageError("size"), ProtocolError("other")])
def test_a_backend_that_refuses_a_ring_is_a_failed_function(error: Exception) -> None:
    with function() as (made, notes):
        notes.start_raises = error
        assert start(made) == (reg.STATUS_FAILED, reg.ERROR_ADMIN_MEMORY)
        notes.start_raises = None
        assert start(made) == RUNNING


def test_a_backend_that_cannot_let_go_still_shows_as_failed() -> None:
    with function() as (made, notes):
        assert start(made) == RUNNING
        signal = eventfd.make()
        made.vectors.lead_to(0, signal)
        notes.stop_raises = WaitTimeout("the worker", 5)
        with pytest.raises(WaitTimeout):
            made.fail(reg.ERROR_PROTOCOL)
        assert status(made) == (reg.STATUS_FAILED, reg.ERROR_PROTOCOL)
        assert eventfd.take(signal)
        os.close(signal)


def test_memory_in_use_is_revoked_from_whoever_uses_it() -> None:
    with function() as (made, notes):
        assert start(made) == RUNNING
        with SharedMemory(PAGE) as other:
            made.domain.map(IOVA + 8 * PAGE, other.fd, 0, PAGE, RW)
        made.domain.unmap(IOVA + 8 * PAGE, PAGE)
        assert notes.heard[1:] == [("revoke", IOVA + 8 * PAGE, PAGE)]
        assert status(made) == RUNNING
        made.domain.unmap(IOVA, 8 * PAGE)
        assert notes.heard[2:] == ["stop"]
        assert status(made) == (reg.STATUS_FAILED, reg.ERROR_ADMIN_MEMORY)


def test_release_forgets_maps_interrupts_and_registers() -> None:
    with function() as (made, _):
        assert start(made) == RUNNING
        signal = eventfd.make()
        made.vectors.lead_to(0, signal)
        made.release()
        assert made.domain.maps == ()
        assert status(made) == (0, 0)
        made.fail(reg.ERROR_PROTOCOL)
        assert not eventfd.take(signal)
        os.close(signal)


def test_registers_of_doorbells_that_nobody_hears_cost_nothing() -> None:
    with function() as (made, _):
        before = Stock.take()
        for offset in range(reg.REG_DOORBELLS, reg.BAR0_SIZE, 4):
            write(made, offset, 1)
        assert Stock.take().beyond(before) == {}
        bell = made.doorbell(5)
        write(made, reg.REG_DOORBELLS + 20, 0)
        assert eventfd.take(bell)
        write(made, reg.REG_DOORBELLS + 16, 1, 8)
        assert eventfd.take(bell)
        for number in (-1, made.channels, 1 << 40):
            with pytest.raises(UsageError, match="doorbell"):
                made.doorbell(number)


def test_a_doorbell_that_is_full_may_be_rung() -> None:
    with function() as (made, _):
        bell = made.doorbell(0)
        os.eventfd_write(bell, (1 << 64) - 2)
        write(made, reg.REG_DOORBELLS, 1)
        assert eventfd.take(bell)


@pytest.mark.parametrize("room", range(0, 70, 13))
def test_a_function_that_runs_out_of_descriptors_leaves_none(room: int) -> None:
    with nothing_left():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.eventfd(0)
        used = [os.dup(lowest)]
        while used[-1] < max(int(name) for name in os.listdir("/proc/self/fd")) - 1:
            used.append(os.dup(lowest))  # no holes: the next descriptor is the next number
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used[-1] + 1 + room, hard))
            with pytest.raises(OSError, match="Too many open files"):
                Vectors(100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in (lowest, *used):
                os.close(fd)


@pytest.mark.parametrize("blocking", [False, True])
def test_emptying_an_eventfd_never_waits(blocking: bool) -> None:
    fd = eventfd.make()
    os.set_blocking(fd, blocking)
    assert not eventfd.take(fd)
    os.eventfd_write(fd, 3)
    assert eventfd.take(fd)
    assert not eventfd.take(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        eventfd.take(fd)
    assert not eventfd.is_eventfd(fd)
