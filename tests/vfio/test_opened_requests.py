"""The `vmbus` personality through a vfio-user server's core: what a client is told, what it gets, and what it is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from tests.vfio.user_rig import GREETING, Rig
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory, require_sealed
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.vmbus_function import RECEIVE_HANDLE, SEND_HANDLE, OpenedMemory, Sizes, VmbusFunction
from vfio_vmbus.wire import opened, vfio
from vfio_vmbus.wire import vfio_user as wire

SIZES = Sizes(upstream=2 * PAGE, downstream=3 * PAGE, receive=4 * PAGE, send=2 * PAGE)
MAPPED = {0: 5 * PAGE, 3: 4 * PAGE, 4: 2 * PAGE}


class Counted:
    """A backend that counts."""

    def __init__(self) -> None:
        self.starts = self.stops = 0

    def start(self, memory: OpenedMemory, interrupt: int) -> None:
        self.starts += 1

    def stop(self) -> None:
        self.stops += 1


@pytest.fixture
def rig() -> Iterator[Rig]:
    with nothing_left(objects=False), SharedMemory(4 * PAGE) as memory:
        function = VmbusFunction("function", sizes=SIZES)
        function.backend = Counted()
        rig = Rig(function, memory)  # type: ignore[arg-type]
        assert rig.feed(GREETING)[0].errno == 0
        yield rig
        rig.carry_out(rig.core.end())
        assert not rig.given
        function.close()


def read(rig: Rig, region: int, offset: int, count: int) -> tuple[int, bytes]:
    answer = rig.ask(wire.REGION_READ, wire.RegionAccess(offset=offset, region=region, count=count).pack())
    return answer.errno, answer.payload[wire.RegionAccess.SIZE :]


def write(rig: Rig, region: int, offset: int, data: bytes) -> int:
    request = wire.RegionAccess(offset=offset, region=region, count=len(data)).pack() + data
    return rig.ask(wire.REGION_WRITE, request).errno


def test_it_is_no_pci_device(rig: Rig) -> None:
    answer = rig.ask(wire.DEVICE_GET_INFO, wire.DeviceInfo().pack())
    assert answer.payload == wire.DeviceInfo(flags=vfio.DEVICE_RESET, region_count=8, irq_count=1).pack()


@pytest.mark.parametrize("index", range(8))
def test_each_region_says_what_it_is(rig: Rig, index: int) -> None:
    answer = rig.ask(wire.DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=4096, index=index).pack())
    info = vfio.RegionInfo.unpack(answer.payload)
    sizes = MAPPED | {1: 0, 2: 0, 5: 4, 6: 4, 7: 0x2000}
    assert (answer.errno, info.index, info.size, info.offset) == (0, index, sizes[index], 0)
    assert bool(info.flags & vfio.REGION_MMAP) == (index in MAPPED) == (len(answer.fds) == 1)
    if index in MAPPED:
        areas = vfio.SparseMmap.unpack(answer.payload, info.cap_offset).areas
        assert areas == (vfio.SparseArea(offset=0, size=info.size),)
        assert require_sealed(answer.fds[0]) == info.size
        again = rig.ask(wire.DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=4096, index=index).pack())
        assert os.fstat(again.fds[0]).st_ino == os.fstat(answer.fds[0]).st_ino


def test_there_is_one_vector_and_one_doorbell(rig: Rig) -> None:
    info = vfio.IrqInfo.unpack(rig.ask(wire.DEVICE_GET_IRQ_INFO, vfio.IrqInfo(index=0).pack()).payload)
    assert (info.count, info.flags) == (1, vfio.IRQ_EVENTFD)
    answer = rig.ask(wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096, index=7).pack())
    assert wire.RegionIoFds.unpack(answer.payload).count == 1
    entry = wire.SubRegion.unpack(answer.payload, wire.RegionIoFds.SIZE)
    assert (entry.offset, entry.size) == (opened.DOORBELLS_AT, 4)
    (bell,) = answer.fds
    assert not eventfd.take(bell)
    assert write(rig, 7, opened.DOORBELLS_AT, bytes(4)) == 0
    assert eventfd.take(bell)
    for index in range(7):
        answer = rig.ask(wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096, index=index).pack())
        assert (wire.RegionIoFds.unpack(answer.payload).count, answer.fds) == (0, ())


def test_handles_are_read_and_nothing_else(rig: Rig) -> None:
    assert read(rig, 5, 0, 4) == (0, RECEIVE_HANDLE.to_bytes(4, "little"))
    assert read(rig, 6, 0, 4) == (0, SEND_HANDLE.to_bytes(4, "little"))
    assert read(rig, 6, 1, 2) == (0, SEND_HANDLE.to_bytes(4, "little")[1:3])
    for region in (5, 6):
        assert write(rig, region, 0, bytes(4)) == errno.EINVAL
        assert read(rig, region, 0, 8) == (errno.EINVAL, b"")


@pytest.mark.parametrize("region", [1, 2, 8, 1 << 31])
def test_shared_pages_are_not_there(rig: Rig, region: int) -> None:
    assert read(rig, region, 0, 4) == (errno.EINVAL, b"")
    assert write(rig, region, 0, bytes(4)) == errno.EINVAL


@pytest.mark.parametrize("region", MAPPED)
def test_memory_is_accessed_by_message_within_its_bounds(rig: Rig, region: int) -> None:
    size = MAPPED[region]
    assert write(rig, region, size - 3, b"end") == 0
    assert read(rig, region, size - 4, 4) == (0, b"\0end")
    for offset, count in ((size - 2, 3), (size, 1), (1 << 63, 8), ((1 << 64) - 4, 4)):
        assert read(rig, region, offset, count)[0] == errno.EINVAL
        assert write(rig, region, offset, bytes(count)) == errno.EINVAL
    assert rig.ask(wire.DEVICE_RESET).errno == 0
    assert read(rig, region, size - 4, 4) == (0, bytes(4))


def test_registers_take_words_and_only_doorbells_are_written(rig: Rig) -> None:
    before = read(rig, 7, 0, 0x120)
    for offset in range(0, 0x120, 4):
        assert write(rig, 7, offset, b"\xff" * 4) == 0
    assert read(rig, 7, 0, 0x120) == before
    for offset, data in ((0, b"\1"), (2, bytes(4)), (opened.DOORBELLS_AT, bytes(8)), (0x1FFE, bytes(4))):
        assert write(rig, 7, offset, data) == errno.EINVAL


def test_the_channel_opens_with_the_first_look_and_again_with_each_reset(rig: Rig) -> None:
    backend = rig.function.backend
    assert isinstance(backend, Counted)
    rig.ask(wire.DEVICE_GET_INFO, wire.DeviceInfo().pack())
    rig.ask(wire.DEVICE_RESET)
    assert backend.starts == 0
    for _ in range(3):
        read(rig, 7, opened.STATUS_AT, 4)
    assert backend.starts == 1
    for number in range(2, 5):
        rig.ask(wire.DEVICE_RESET)
        assert backend.starts == number
        assert read(rig, 7, opened.STATUS_AT, 4) == (0, bytes([opened.STATUS_OPEN, 0, 0, 0]))
    rig.function.release()
    assert backend.starts == 4
    assert read(rig, 7, opened.STATUS_AT, 4) == (0, bytes([opened.STATUS_OPEN, 0, 0, 0]))


def test_the_next_client_gets_other_memory_and_another_doorbell(rig: Rig) -> None:
    def look() -> list[int]:
        found = []
        for index in MAPPED:
            info = vfio.RegionInfo(argsz=4096, index=index)
            found.append(os.dup(rig.ask(wire.DEVICE_GET_REGION_INFO, info.pack()).fds[0]))
        bells = rig.ask(wire.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(argsz=4096, index=7).pack()).fds
        return [*found, os.dup(bells[0])]

    old = look()
    rig.function.release()
    new = look()
    assert len({os.fstat(fd).st_ino for fd in (*old[:-1], *new[:-1])}) == 2 * len(MAPPED)
    os.eventfd_write(old[-1], 1)
    assert not eventfd.take(new[-1])
    os.pwrite(old[1], b"late", 0)
    assert read(rig, 3, 0, 4) == (0, bytes(4))
    for fd in (*old, *new):
        os.close(fd)


def test_memory_that_cannot_be_had_is_an_error_of_that_request(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", no)
        assert read(rig, 0, 0, 4)[0] == errno.EMFILE
        assert rig.ask(wire.DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=4096).pack()).errno == errno.EMFILE
    assert read(rig, 0, 0, 4) == (0, bytes(4))
