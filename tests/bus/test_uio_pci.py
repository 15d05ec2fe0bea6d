"""UioPciDevice on trees of files: a FIFO is the node, plain files are regions. The real kernel: tests/guest."""

from __future__ import annotations

import os
import select
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bus.test_policy import prepared
from tests.bus.trees import pci_device, put
from tests.memory.test_pinned import KNOWN
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.noiommu import open_without_iommu
from vfio_vmbus.bus.policy import SWITCH, unsafe_uses
from vfio_vmbus.bus.uio_pci import UioPciDevice
from vfio_vmbus.bus.uio_pci_irq import Attendant, UioIrq
from vfio_vmbus.bus.uio_pci_regions import _accesses
from vfio_vmbus.errors import ClosedError, DmaError, UnavailableError, UnsafeError, UsageError
from vfio_vmbus.iommu.physical import PhysicalBuffer
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory import signal  # noqa: F401  (which makes a memfd once)
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import CONFIG_REGION
from vfio_vmbus.vfio.kernel import KernelDevice
from vfio_vmbus.wire.pci import COMMAND_INTX_DISABLE, COMMAND_MASTER, COMMAND_MEMORY
from vfio_vmbus.wire.vfio import IRQ_INTX, IRQ_MSI, IRQ_MSIX

ADDRESS = "0000:00:05.0"
RESOURCE = """\
0x00000000fea00000 0x00000000fea01fff 0x0000000000040200
0x000000000000c000 0x000000000000c01f 0x0000000000040101
0x00000000fea02800 0x00000000fea0280f 0x0000000000040200
nonsense
0x0000000000000000 0x0000000000000000 0x0000000000000000
"""
"""BAR 0 is memory, BAR 1 ports, BAR 2 memory within a page."""


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests: marks go into the tree."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    return prepared(tmp_path)


def device(here: Machine, driver: str | None = "uio_pci_generic", command: int = COMMAND_MASTER) -> Path:
    folder = pci_device(here, ADDRESS, driver=driver, command=command)
    put(folder / "resource", RESOURCE)
    put(folder / "irq", "11\n")
    for index, size in enumerate((2 * PAGE, 32, PAGE)):
        put(folder / f"resource{index}", bytes(range(16)) + bytes(size - 16))
    (folder / "uio/uio3").mkdir(parents=True)
    os.mkfifo(here.dev / "uio3")
    return folder


def command(folder: Path) -> int:
    return int.from_bytes((folder / "config").read_bytes()[4:6], "little")


def came(event: int) -> bool:
    return bool(select.select([event], [], [], 30)[0]) and eventfd.take(event)


def test_without_the_switch_it_never_masters_the_bus(here: Machine) -> None:
    folder = device(here)
    with nothing_left(objects=False), UioPciDevice(ADDRESS, machine=here) as made:
        assert made.info.isolation == "no-DMA"
        assert command(folder) & (COMMAND_MASTER | COMMAND_MEMORY | COMMAND_INTX_DISABLE) == COMMAND_MEMORY | COMMAND_INTX_DISABLE
        space = made.region(CONFIG_REGION)
        for offset, data in ((4, b"\4"), (4, b"\6\0"), (2, bytes([0, 0, 4, 0])), (0, bytes([0, 0, 0, 0, 7, 0]))):
            with pytest.raises(UnavailableError, match=f"must not master the bus.*{SWITCH}"):
                space.write(offset, data)
        space.write(4, bytes([COMMAND_MEMORY, 4]))
        assert command(folder) == COMMAND_MEMORY | 0x400
        with SharedMemory(PAGE, "mine") as memory:
            with pytest.raises(UnavailableError, match=f"may not reach memory: DMA only with {SWITCH}"):
                made.dma.map(1 << 32, memory.fd, 0, PAGE, READ)
            with pytest.raises(DmaError, match="outside memory"):
                made.dma.map(1 << 32, memory.fd, PAGE, PAGE, READ)
        made.dma.unmap(1 << 32, PAGE)
    assert unsafe_uses(here) == []
    assert (here.proc / "sys/kernel/tainted").read_text() == "4096\n"


def test_regions_are_what_sysfs_has(here: Machine) -> None:
    folder = device(here)
    with UioPciDevice(ADDRESS, machine=here) as made:
        memory, ports, small = (made.region(index) for index in range(3))
        assert [each.size for each in (memory, ports, small)] == [2 * PAGE, 32, 16]
        assert (memory.areas, ports.areas, small.areas) == (((0, 2 * PAGE),), (), ())
        for region in (memory, ports):
            assert region.read(3, 9) == bytes(range(3, 12))
            region.write32(20, 0x11223344)
            region.write(25, b"odd")
        for index in (0, 1):
            content = (folder / f"resource{index}").read_bytes()
            assert (content[20:24], content[25:28]) == (bytes.fromhex("44332211"), b"odd")
        small.write(4, b"here")  # where it begins in its page
        assert (folder / "resource2").read_bytes()[0x804:0x808] == b"here"
        with memory.map(PAGE, PAGE) as mapped:
            mapped.write(8, b"mapped")
            assert memory.read(PAGE + 8, 6) == b"mapped"
        for index in (3, 4, 5, 6, 8):
            with pytest.raises(UsageError, match=rf"region {index}: this device has 0, 1, 2, 7"):
                made.region(index)
        with pytest.raises(UsageError, match="region 1 has 0x20"):
            ports.read(30, 4)


def test_a_doorbell_is_written_by_a_thread(here: Machine) -> None:
    device(here)
    with nothing_left(objects=False), UioPciDevice(ADDRESS, machine=here) as made:
        bar = made.region(0)
        bell = bar.doorbell(64)
        assert bar.doorbell(64) == bell
        eventfd.ring(bell)
        while bar.read32(64) != 1:
            os.sched_yield()
        with pytest.raises(UsageError, match="no doorbell register"):
            made.region(CONFIG_REGION).doorbell(16)


def test_an_interrupt_signals_whom_it_was_enabled_for(here: Machine) -> None:
    folder = device(here)
    first, second = eventfd.make(), eventfd.make()
    node = os.open(here.dev / "uio3", os.O_RDWR)
    try:
        with nothing_left(objects=False), UioPciDevice(ADDRESS, machine=here) as made:
            irq = made.uio_irq(IRQ_INTX)
            os.write(node, bytes(4))  # one that nobody was to be told of
            irq.enable(0, first)
            assert not command(folder) & COMMAND_INTX_DISABLE
            os.write(node, bytes(4))
            assert came(first)
            irq.mask(0)
            assert command(folder) & COMMAND_INTX_DISABLE
            irq.unmask(0)
            assert not command(folder) & COMMAND_INTX_DISABLE
            irq.enable(0, second)
            os.write(node, bytes(4))
            assert came(second)
            irq.disable(0)
            irq.disable(0)
            assert command(folder) & COMMAND_INTX_DISABLE
            with pytest.raises(UsageError, match="is not enabled"):
                irq.unmask(0)
            assert (eventfd.take(first), eventfd.take(second)) == (False, False)
    finally:
        for fd in (first, second, node):
            os.close(fd)
    with pytest.raises(ClosedError):
        irq.disable(0)


def test_a_device_without_an_interrupt_has_none(here: Machine) -> None:
    put(device(here) / "irq", "0\n")
    with UioPciDevice(ADDRESS, machine=here) as made, pytest.raises(UsageError, match="this device has none"):
        made.irq(IRQ_INTX)


@pytest.mark.parametrize(
    ("driver", "says"),
    [(None, "nobody drives it: vfio-vmbus bind"), ("e1000e", "e1000e drives it"), ("vfio-pci", "vfio-pci drives it")],
)
def test_another_drivers_device_is_refused(here: Machine, driver: str | None, says: str) -> None:
    device(here, driver)
    with pytest.raises(UnavailableError, match=says):
        UioPciDevice(ADDRESS, unsafe=True, machine=here)
    assert unsafe_uses(here) == []


def test_what_is_missing_is_said_and_nothing_is_left(here: Machine) -> None:
    folder = device(here)
    with nothing_left(objects=False):
        with UioPciDevice(ADDRESS, machine=here), pytest.raises(UnavailableError, match="is in use: another process"):
            UioPciDevice(ADDRESS, machine=here)
        (folder / "resource1").unlink()
        with pytest.raises(UnavailableError, match="resource1: No such file"):
            UioPciDevice(ADDRESS, machine=here)
        (folder / "config").unlink()
        with pytest.raises(UnavailableError, match="config: No such file"):
            UioPciDevice(ADDRESS, machine=here)
        (here.dev / "uio3").unlink()
        with pytest.raises(UnavailableError, match="udev hides it"):
            UioPciDevice(ADDRESS, machine=here)
        (folder / "uio/uio3").rmdir()
        with pytest.raises(UnavailableError, match="the uio module is missing"):
            UioPciDevice(ADDRESS, machine=here)
        with pytest.raises(UsageError, match="is no address"):
            UioPciDevice("../..", machine=here)


def test_igb_uio_is_unsafe_whatever_is_done(here: Machine) -> None:
    folder = device(here, "igb_uio")
    with pytest.raises(UnsafeError, match=f"igb_uio of {ADDRESS} is unsafe.*only with {SWITCH}"):
        UioPciDevice(ADDRESS, machine=here)
    put(folder / "msi_irqs/27", "msix\n")
    with UioPciDevice(ADDRESS, unsafe=True, machine=here) as made:
        assert made.info.isolation == ""
        assert command(folder) & COMMAND_MASTER
        assert made.irq(IRQ_MSIX).count == 1
        assert [use.what for use in unsafe_uses(here)] == [f"igb_uio of {ADDRESS}"]
    assert not command(folder) & COMMAND_MASTER
    put(folder / "msi_irqs/27", "msi\n")
    with UioPciDevice(ADDRESS, unsafe=True, machine=here) as made:
        assert made.irq(IRQ_MSI).index == IRQ_MSI


def test_igb_uio_is_told_by_writes_whether_to_interrupt(here: Machine) -> None:
    folder = device(here)
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    event, attendant = eventfd.make(), Attendant()
    with ours, kernels:
        with UioPciDevice(ADDRESS, machine=here) as made:
            irq = UioIrq(IRQ_MSIX, ours.fileno(), made._config, attendant, made.check_open, control=True)
            before = command(folder)
            irq.enable(0, event)
            irq.mask(0)
            irq.unmask(0)
            kernels.send(bytes(4))
            assert came(event)
            irq.disable(0)
            assert [kernels.recv(8)[0] for _ in range(4)] == [1, 0, 1, 0]
            assert command(folder) == before
        attendant.close()
    os.close(event)


@KNOWN
def test_with_the_switch_iovas_are_physical_addresses(here: Machine) -> None:
    folder = device(here)
    UioPciDevice(ADDRESS, unsafe=True, machine=here).close()  # its mark stays
    with nothing_left(objects=False), UioPciDevice(ADDRESS, unsafe=True, machine=here) as made:
        assert made.info.isolation == ""
        assert command(folder) & COMMAND_MASTER
        with PhysicalBuffer(PAGE, READ | WRITE, "mine") as mine:
            made.dma.map(mine.iova, mine.memory.fd, 0, PAGE, READ)
            with pytest.raises(DmaError, match="overlaps"):
                made.dma.map(mine.iova, mine.memory.fd, 0, PAGE, READ)
            made.dma.unmap(mine.iova, PAGE)
            with pytest.raises(DmaError, match=f"nothing translates for this device: byte 0 of this memory is at {mine.iova:#x}"):
                made.dma.map(mine.iova + PAGE, mine.memory.fd, 0, PAGE, READ)
    assert not command(folder) & COMMAND_MASTER


@given(offset=st.integers(0, 40), size=st.integers(1, 40), widest=st.sampled_from([4, 8]))
def test_accesses_are_aligned_and_cover_everything_once(offset: int, size: int, widest: int) -> None:
    made = _accesses(offset, size, widest)
    assert [at for first, width in made for at in range(first, first + width)] == list(range(offset, offset + size))
    assert all(first % width == 0 and width <= widest for first, width in made)
    if offset % widest == 0 and size == widest:
        assert len(made) == 1


# VFIO without an IOMMU.


def noiommu(here: Machine) -> None:
    pci_device(here, ADDRESS, driver="vfio-pci", group=0)
    put(here.sysfs / "kernel/iommu_groups/0/name", "vfio-noiommu\n")


def test_vfio_without_an_iommu_is_refused_unless_it_is_asked_for(here: Machine) -> None:
    noiommu(here)
    with pytest.raises(UnavailableError, match="and is not opened"):
        KernelDevice(ADDRESS, roots=here)
    with pytest.raises(UnsafeError, match=f"VFIO without an IOMMU of {ADDRESS} is unsafe.*only with {SWITCH}"):
        open_without_iommu(ADDRESS, unsafe=False, machine=here)
    assert unsafe_uses(here) == []


def test_vfio_without_an_iommu_goes_to_the_node_and_leaves_its_mark_first(here: Machine) -> None:
    noiommu(here)
    for left in (nullcontext(), nothing_left(objects=False)):  # the mark stays from the first one on
        with left, pytest.raises(UnavailableError, match=r"VFIO, .*/dev/vfio/vfio: No such file"):
            open_without_iommu(ADDRESS, unsafe=True, machine=here)
    assert [use.what for use in unsafe_uses(here)] == [f"VFIO without an IOMMU of {ADDRESS}"] * 2


def test_a_device_with_an_iommu_is_not_opened_without(here: Machine) -> None:
    pci_device(here, ADDRESS, driver="vfio-pci", group=4)
    with pytest.raises(UnavailableError, match=r"has an IOMMU .group 4.: there is no need to go without"):
        open_without_iommu(ADDRESS, unsafe=True, machine=here)
    assert unsafe_uses(here) == []
