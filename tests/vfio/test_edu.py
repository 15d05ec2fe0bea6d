"""The educational device: its registers, its interrupts and its copies, over a real socket."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vfio.raw_client import RawClient
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing import edu
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.wire import vfio
from vfio_vmbus.wire import vfio_user as wire

INTX, MSI = vfio.IRQ_INTX, vfio.IRQ_MSI
TRIGGER_EVENTFD, UNMASK, MASK, STOP = 0x24, 0x11, 0x09, 0x21


@pytest.fixture
def client(tmp_path: Path) -> Iterator[RawClient]:
    with nothing_left(objects=False), edu.serving_edu(tmp_path / "edu"), RawClient(tmp_path / "edu") as client:
        yield client


@pytest.fixture
def event() -> Iterator[int]:
    fd = eventfd.make()
    yield fd
    os.close(fd)


def irqs(me: RawClient, flags: int, index: int, count: int = 1, fds: tuple[int, ...] = ()) -> int:
    return me.ask(wire.DEVICE_SET_IRQS, vfio.IrqSet(flags=flags, index=index, count=count).pack(), fds)[0]


def test_registers(client: RawClient) -> None:
    assert client.read(0, edu.REG_ID, 4) == 0x010000ED
    client.write(0, edu.REG_LIVENESS, 0x12345678)
    assert client.read(0, edu.REG_LIVENESS, 4) == 0xEDCBA987
    for number in (0, 1, 5, 12, 13, 33, 34, 0xFFFFFFFF):
        client.write(0, edu.REG_FACTORIAL, number)
        assert client.read(0, edu.REG_FACTORIAL, 4) == math.factorial(min(number, 40)) & 0xFFFFFFFF
    for register in (edu.REG_DMA_SOURCE, edu.REG_DMA_TARGET, edu.REG_DMA_COUNT):
        client.write(0, register, 0x123456789ABCDEF0, 8)
        client.write(0, register + 4, 0x11111111)
        assert client.read(0, register, 8) == 0x111111119ABCDEF0
        assert client.read(0, register + 4, 4) == 0x11111111


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (2, 4), (0x82, 4), (0x84, 8), (0x80, 2), (0x80, 16)])
def test_widths_that_registers_do_not_have(client: RawClient, offset: int, size: int) -> None:
    assert client.ask(wire.REGION_READ, wire.RegionAccess(offset=offset, count=size).pack()) == (22, b"")
    assert client.ask(wire.REGION_WRITE, wire.RegionAccess(offset=offset, count=size).pack() + bytes(size)) == (22, b"")


def test_it_is_found_as_a_pci_device(client: RawClient) -> None:
    assert client.read(7, 0, 4) == 0x11E81234
    assert client.read(7, 8, 4) == 0x00FF0010
    client.write(7, 0x10, 0xFFFFFFFF)
    assert client.read(7, 0x10, 4) == 0xFFF00000
    assert client.read(7, 0x34, 1) == 0x40
    assert client.read(7, 0x40, 4) == 0x00800005
    assert client.read(7, 0x3D, 1) == 1
    found = {}
    for index in range(5):
        info = vfio.IrqInfo.unpack(client.ask(wire.DEVICE_GET_IRQ_INFO, vfio.IrqInfo(index=index).pack())[1])
        found[index] = (info.count, info.flags)
    assert found == {0: (1, 7), 1: (1, 9), 2: (0, 0), 3: (0, 0), 4: (0, 0)}


def test_msi(client: RawClient, event: int) -> None:
    client.write(0, edu.REG_IRQ_RAISE, 1)
    assert irqs(client, TRIGGER_EVENTFD, MSI, fds=(event,)) == 0
    client.write(0, edu.REG_IRQ_RAISE, 0x40)
    assert eventfd.take(event)
    assert client.read(0, edu.REG_IRQ_STATUS, 4) == 0x41
    client.write(0, edu.REG_IRQ_ACK, 1)
    assert client.read(0, edu.REG_IRQ_STATUS, 4) == 0x40
    client.write(0, edu.REG_STATUS, 0x80)
    client.write(0, edu.REG_FACTORIAL, 3)
    assert eventfd.take(event)
    assert client.read(0, edu.REG_IRQ_STATUS, 4) == 0x41
    assert irqs(client, MASK, MSI) == 25  # ENOTTY
    assert irqs(client, STOP, MSI, 0) == 0
    client.write(0, edu.REG_IRQ_RAISE, 1)
    assert not eventfd.take(event)


def test_intx_is_a_level_that_is_masked_by_itself(client: RawClient, event: int) -> None:
    assert irqs(client, TRIGGER_EVENTFD, INTX, fds=(event,)) == 0
    client.write(0, edu.REG_IRQ_RAISE, 2)
    assert eventfd.take(event)
    client.write(0, edu.REG_IRQ_RAISE, 4)
    assert not eventfd.take(event)  # masked until the client unmasks it
    assert irqs(client, UNMASK, INTX) == 0
    assert eventfd.take(event)  # there is a cause yet
    client.write(0, edu.REG_IRQ_ACK, 6)
    assert irqs(client, UNMASK, INTX) == 0
    assert not eventfd.take(event)
    assert irqs(client, MASK, INTX) == 0
    client.write(0, edu.REG_IRQ_RAISE, 1)
    assert not eventfd.take(event)
    assert irqs(client, UNMASK, INTX) == 0
    assert eventfd.take(event)
    assert irqs(client, 0x0C, INTX) == 25  # by an eventfd: ENOTTY
    assert irqs(client, MASK, INTX, 0) == 22


def test_what_is_no_eventfd_is_no_interrupt(client: RawClient) -> None:
    assert irqs(client, TRIGGER_EVENTFD, MSI, fds=(client.sock.fileno(),)) == 22


def test_copies_raise_an_interrupt(client: RawClient, event: int) -> None:
    with SharedMemory(2 * PAGE) as memory, memory.map() as mapping:
        assert client.map(1 << 32, PAGE, memory.fd) == 0
        assert irqs(client, TRIGGER_EVENTFD, MSI, fds=(event,)) == 0
        mapping.write(0, b"hello")
        client.copy(1 << 32, edu.BUFFER_AT + 7, 5, edu.DMA_IRQ)
        assert eventfd.take(event)
        assert client.read(0, edu.REG_IRQ_STATUS, 4) == edu.IRQ_DMA
        client.copy(edu.BUFFER_AT + 7, (1 << 32) + 100, 5, edu.DMA_FROM_DEVICE)
        assert mapping.read(100, 5) == b"hello"


@pytest.mark.parametrize(
    ("source", "target", "count", "command"),
    [
        (1 << 32, edu.BUFFER_AT - 1, 1, 0),
        (1 << 32, edu.BUFFER_AT, 4097, 0),
        (1 << 32, edu.BUFFER_AT + 4096, 1, 0),
        (1 << 32, 1 << 32, 4, 0),
        (1 << 33, edu.BUFFER_AT, 4, 0),
        ((1 << 32) + PAGE - 1, edu.BUFFER_AT, 2, 0),
        ((1 << 64) - 1, edu.BUFFER_AT, 4, 0),
        (edu.BUFFER_AT, 1 << 32, (1 << 64) - 1, edu.DMA_FROM_DEVICE),
        (edu.BUFFER_AT, 1 << 33, 4, edu.DMA_FROM_DEVICE),
    ],
)
def test_copies_that_cannot_be_copy_nothing(client: RawClient, source: int, target: int, count: int, command: int) -> None:
    with SharedMemory(2 * PAGE) as memory, memory.map() as mapping:
        assert client.map(1 << 32, PAGE, memory.fd) == 0
        mapping.write(0, b"\x55" * 2 * PAGE)
        client.copy(source, target, count, command)
        client.copy(edu.BUFFER_AT, 1 << 32, PAGE, edu.DMA_FROM_DEVICE)
        assert mapping.read(0, 2 * PAGE) == bytes(PAGE) + b"\x55" * PAGE


def test_a_reset_and_the_next_client_find_it_new(client: RawClient, tmp_path: Path) -> None:
    with SharedMemory(PAGE) as memory:
        for again in range(2):
            with RawClient(tmp_path / "edu", greeting=b"") if again else client as me:
                if again:
                    me.sock.sendall(wire.encode_request(1, wire.VERSION, wire.Version().pack()))
                    assert me.answer()[0] == 0
                assert me.read(0, edu.REG_FACTORIAL, 4) == 0
                assert me.map(1 << 32, PAGE, memory.fd) == 0
                me.write(0, edu.REG_FACTORIAL, 5)
                me.write(0, edu.REG_IRQ_RAISE, 5)
                assert me.ask(wire.DEVICE_RESET) == (0, b"")
                assert (me.read(0, edu.REG_FACTORIAL, 4), me.read(0, edu.REG_IRQ_STATUS, 4)) == (0, 0)
                me.write(0, edu.REG_FACTORIAL, 5)
                me.sock.shutdown(1)
                assert me.ended()


def test_paths_that_cannot_be_leave_nothing(tmp_path: Path) -> None:
    from vfio_vmbus.errors import UsageError

    with nothing_left(objects=False), pytest.raises(UsageError), edu.serving_edu(tmp_path / "a", tmp_path / "no" / "b"):
        raise AssertionError("it serves there")
    assert not (tmp_path / "a").exists()
