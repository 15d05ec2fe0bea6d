"""What KernelIrq tells the kernel, also on machines with room for few vectors, which no test machine is. The rest: tests/guest."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vfio_vmbus.errors import UnavailableError, UsageError
from vfio_vmbus.vfio.kernel import irqs
from vfio_vmbus.vfio.kernel.irqs import InUse, KernelIrq
from vfio_vmbus.wire import vfio as wire
from vfio_vmbus.wire import vfio_ioctl as uapi

DEVICE = 77
TRIGGER_EVENTFD = wire.SET_DATA_EVENTFD | wire.SET_ACTION_TRIGGER
TRIGGER_NONE = wire.SET_DATA_NONE | wire.SET_ACTION_TRIGGER


class Kernel:
    """Takes SET_IRQS, and says that there is room for so many vectors (None: for all), as drivers/vfio/pci/vfio_pci_intrs.c does."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        self.asked: list[tuple[int, int, int, list[int]]] = []

    def call(self, fd: int, request: int, argument: bytearray, *, what: str) -> int:
        assert (fd, request) == (DEVICE, uapi.DEVICE_SET_IRQS)
        header = wire.IrqSet.unpack(argument)
        assert header.argsz == len(argument)
        data = argument[wire.IrqSet.SIZE :]
        fds = [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]
        self.asked.append((header.flags, header.start, header.count, fds))
        return self.room if self.room is not None and header.start + header.count > self.room else 0


@pytest.fixture
def signal() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def msix(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, flags: int, index: int = wire.IRQ_MSIX, count: int = 2048) -> KernelIrq:
    monkeypatch.setattr(irqs, "call", kernel.call)
    return KernelIrq(lambda: DEVICE, wire.IrqInfo(index=index, flags=flags, count=count), InUse())


FIXED = wire.IRQ_EVENTFD | wire.IRQ_NORESIZE


def test_vectors_that_cannot_be_more_later_are_all_allocated_at_once(monkeypatch: pytest.MonkeyPatch, signal: int) -> None:
    kernel = Kernel()
    irq = msix(monkeypatch, kernel, FIXED)
    irq.enable(7, signal)
    flags, start, count, fds = kernel.asked.pop()
    assert (flags, start, count) == (TRIGGER_EVENTFD, 0, 2048)
    assert fds == [-1] * 7 + [signal] + [-1] * 2040
    irq.enable(2047, signal)
    irq.disable(7)
    irq.disable(7)
    assert kernel.asked == [(TRIGGER_EVENTFD, 2047, 1, [signal]), (TRIGGER_EVENTFD, 7, 1, [-1])]
    irq.disable(2047)
    assert kernel.asked.pop() == (TRIGGER_NONE, 0, 0, [])
    irq.enable(0, signal)
    assert kernel.asked.pop()[2] == 2048


def test_vectors_that_can_be_more_later_are_allocated_as_needed(monkeypatch: pytest.MonkeyPatch, signal: int) -> None:
    kernel = Kernel()
    irq = msix(monkeypatch, kernel, wire.IRQ_EVENTFD)
    irq.enable(2, signal)
    irq.enable(2000, signal)
    assert kernel.asked == [(TRIGGER_EVENTFD, 0, 3, [-1, -1, signal]), (TRIGGER_EVENTFD, 2000, 1, [signal])]


def test_a_machine_with_room_for_few_gives_those(monkeypatch: pytest.MonkeyPatch, signal: int) -> None:
    kernel = Kernel(room=40)
    irq = msix(monkeypatch, kernel, FIXED)
    irq.enable(39, signal)
    assert [count for _, _, count, _ in kernel.asked] == [2048, 40]
    irq.enable(0, signal)
    with pytest.raises(UnavailableError, match="vector 40 of MSI-X: the machine had room for 40 of 2048"):
        irq.enable(40, signal)
    assert irq.enabled == {0, 39}


@pytest.mark.parametrize("flags", [FIXED, wire.IRQ_EVENTFD])
def test_a_machine_with_room_for_fewer_says_so(monkeypatch: pytest.MonkeyPatch, signal: int, flags: int) -> None:
    irq = msix(monkeypatch, Kernel(room=40), flags)
    with pytest.raises(UnavailableError, match="vector 40 of MSI-X: the machine has room for 40 vectors"):
        irq.enable(40, signal)
    assert irq.enabled == frozenset()
    irq.enable(3, signal)


def test_what_is_not_enabled_is_neither_masked_nor_signalled(monkeypatch: pytest.MonkeyPatch, signal: int) -> None:
    kernel = Kernel()
    irq = msix(monkeypatch, kernel, wire.IRQ_EVENTFD | wire.IRQ_MASKABLE | wire.IRQ_AUTOMASKED, wire.IRQ_INTX, 1)
    for use in (irq.mask, irq.unmask, irq.loopback):
        with pytest.raises(UsageError, match="vector 0 of INTx is not enabled"):
            use(0)
    assert kernel.asked == []
    irq.enable(0, signal)
    irq.mask(0)
    irq.unmask(0)
    irq.loopback(0)
    asked = [wire.SET_ACTION_MASK, wire.SET_ACTION_UNMASK, wire.SET_ACTION_TRIGGER]
    assert kernel.asked[1:] == [(wire.SET_DATA_NONE | action, 0, 1, []) for action in asked]


def test_errors_and_requests_go_beside_the_others(monkeypatch: pytest.MonkeyPatch, signal: int) -> None:
    kernel = Kernel()
    monkeypatch.setattr(irqs, "call", kernel.call)
    in_use = InUse()
    kinds = [
        KernelIrq(lambda: DEVICE, wire.IrqInfo(index=index, flags=wire.IRQ_EVENTFD, count=1), in_use)
        for index in (wire.IRQ_INTX, wire.IRQ_MSI, wire.IRQ_ERR, wire.IRQ_REQ)
    ]
    intx, msi, error, request = kinds
    for irq in (error, intx, request):
        irq.enable(0, signal)
    with pytest.raises(UsageError, match="vectors of INTx are enabled: disable them first"):
        msi.enable(0, signal)
    for irq in (error, request, intx):
        irq.disable(0)
    msi.enable(0, signal)
    with pytest.raises(UsageError, match="cannot be masked"):
        msi.mask(0)
    assert kernel.asked[3:] == [
        (TRIGGER_EVENTFD, 0, 1, [-1]),
        (TRIGGER_EVENTFD, 0, 1, [-1]),
        (TRIGGER_NONE, 0, 0, []),
        (TRIGGER_EVENTFD, 0, 1, [signal]),
    ]
