"""edu through the kernel's VFIO: the example, the conformance suite, doorbells, INTx, errors that only a real kernel gives."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

from vfio_vmbus.bus import binding, pci
from vfio_vmbus.errors import ClosedError, DmaError, LocalError, UnavailableError, UsageError
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.conformance import DeviceConformance
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, Device, Irq
from vfio_vmbus.vfio.kernel import Container, Ioas, KernelDevice
from vfio_vmbus.vfio.kernel.nodes import Roots
from vfio_vmbus.wire.vfio import IRQ_INTX, IRQ_MSI, IRQ_REQ

sys.path.append(str(Path(__file__).resolve().parents[3] / "examples"))
import edu

VIRTIO_BAR, VIRTIO_STATUS = 4, 0x14
"""Where QEMU has the common configuration of a virtio device, and the device status in it (virtio 1.2, 4.1.4.3)."""
STATE = Path("/dev/shm/vfio-vmbus")
Report = Callable[[Any], None]


@contextmanager
def bound(address: str) -> Iterator[None]:
    """The device is vfio-pci's, and then whose it was."""
    before = pci.look(address)
    binding.bind(address, state=STATE)
    try:
        yield
    finally:
        binding.unbind(address, state=STATE)
        assert pci.look(address) == before


def example(report: Report, address: str) -> list[str]:
    """What examples/edu.py prints."""
    with bound(address), nothing_left(objects=False), KernelDevice(address) as device:
        return list(edu.show(device))


class EduConformance(DeviceConformance):
    def __init__(self, address: str) -> None:
        self.address = address

    def open(self) -> Device:
        return KernelDevice(self.address)

    def trigger(self, device: Device) -> tuple[Irq, int]:
        """Raise the interrupt, wait until the kernel has had it if anybody is to be told, and take it back."""
        bar = device.region(BAR0_REGION)
        before = interrupts(self.address)
        bar.write32(edu.INTERRUPT_RAISE, 1)
        until = time.monotonic() + 30
        while before is not None and interrupts(self.address) == before:
            assert time.monotonic() < until, "no interrupt arrived"
        bar.write32(edu.INTERRUPT_ACKNOWLEDGE, 1)
        return device.irq(IRQ_MSI), 0


def interrupts(address: str) -> int | None:
    """How many MSIs of the device's the kernel had since somebody was to be told; None if nobody is. One that counts has been handled,
    as there is one CPU."""
    for line in Path("/proc/interrupts").read_text().splitlines():
        if f"vfio-msi[0]({address})" in line:
            return int(line.split()[1])
    return None


def conformance(report: Report, address: str) -> dict[str, str]:
    """What went wrong, by the name of the test; "" where nothing did."""
    suite = EduConformance(address)
    found = {}
    with bound(address):
        for name in [name for name in dir(suite) if name.startswith("test_")]:
            try:
                getattr(suite, name)()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    return found


def doorbell(report: Report, address: str) -> dict[str, Any]:
    """An eventfd stands for the register that raises interrupts: the kernel writes 1 to it."""
    with bound(address), KernelDevice(address) as device, edu.Edu(device) as driver:
        bell = device.region(BAR0_REGION).doorbell(edu.INTERRUPT_RAISE)
        assert device.region(BAR0_REGION).doorbell(edu.INTERRUPT_RAISE) == bell
        for _ in range(3):
            eventfd.ring(bell)
            driver.wait(1)
        causes = device.region(BAR0_REGION).read32(edu.INTERRUPT_STATUS)
        refused = ""
        try:
            device.region(CONFIG_REGION).doorbell(4)
        except UsageError as error:
            refused = str(error)
        return {"causes": causes, "refused": refused}


def level(report: Report, address: str) -> dict[str, Any]:
    """INTx: a line that is masked when it falls, until it is unmasked, and that a driver may mask."""
    with bound(address), KernelDevice(address) as device:
        bar, irq = device.region(BAR0_REGION), device.irq(IRQ_INTX)
        mine = os.eventfd(0, os.EFD_NONBLOCK)
        found: dict[str, Any] = {"flags": irq.flags}
        irq.enable(0, mine)
        bar.write32(edu.INTERRUPT_RAISE, 1)
        found["came"] = bool(select.select([mine], [], [], 30)[0]) and eventfd.take(mine)
        found["again while masked"] = eventfd.take(mine)
        irq.unmask(0)  # the line is still up: it comes again at once
        found["came again"] = bool(select.select([mine], [], [], 30)[0]) and eventfd.take(mine)
        bar.write32(edu.INTERRUPT_ACKNOWLEDGE, 1)
        irq.unmask(0)
        found["after it was acknowledged"] = eventfd.take(mine)
        irq.mask(0)
        bar.write32(edu.INTERRUPT_RAISE, 2)
        found["masked by hand"] = eventfd.take(mine)
        irq.unmask(0)
        found["unmasked by hand"] = bool(select.select([mine], [], [], 30)[0]) and eventfd.take(mine)
        bar.write32(edu.INTERRUPT_ACKNOWLEDGE, 2)
        try:
            device.irq(IRQ_MSI).enable(0, mine)
        except UsageError as error:
            found["two kinds"] = str(error)
        irq.disable(0)
        device.irq(IRQ_MSI).enable(0, mine)  # one after the other
        os.close(mine)
        return found


def mapped(report: Report, address: str) -> dict[str, Any]:
    """Registers of a mapped BAR; widths; the bus master bit; what the kernel says where decoding is off."""
    with bound(address), KernelDevice(address) as device:
        bar, space = device.region(BAR0_REGION), device.region(CONFIG_REGION)
        found: dict[str, Any] = {"areas": bar.areas, "ids": space.read(0, 4).hex(), "command": space.read(4, 1)[0] & 7}
        with bar.map(0, 4096) as registers:
            word = ctypes.c_uint32.from_address(registers.address + edu.LIVENESS)
            word.value = 0x0F0F0F0F
            found["inverted"] = word.value
            found["read"] = bar.read32(edu.LIVENESS)
        bar.write64(edu.DMA_SOURCE, 0x12345678)
        found["wide"] = int.from_bytes(bar.read(edu.DMA_SOURCE, 8), "little")
        device.set_bus_master(False)
        with edu.Edu(device) as driver, driver.buffer() as memory:
            memory.mapping.write(0, b"as it was")
            bar.write32(edu.DMA_SOURCE, edu.BUFFER)  # without an interrupt, which is a write to memory as well
            bar.write32(edu.DMA_DESTINATION, memory.iova)
            bar.write32(edu.DMA_COUNT, 9)
            bar.write32(edu.DMA_COMMAND, edu.DMA_START | edu.DMA_FROM_DEVICE)
            until = time.monotonic() + 30
            while bar.read32(edu.DMA_COMMAND) & edu.DMA_START:
                assert time.monotonic() < until
            found["without bus master"] = memory.mapping.read(0, 9).decode()
            device.set_bus_master(True)
            driver.store(memory.iova, 9)
            found["with bus master"] = memory.mapping.read(0, 9).decode(errors="replace")
        space.write(4, b"\0\0")
        try:
            bar.read32(0)
        except UnavailableError as error:
            found["off"] = str(error)
        return found


def refusals(report: Report, address: str) -> dict[str, str]:
    """Errors that only a kernel gives, by what was done."""
    found: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            made = call()
            found[name] = ""
            if isinstance(made, Device):
                made.close()
        except (UnavailableError, DmaError, UsageError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    attempt("not bound", lambda: KernelDevice(address))
    attempt("not there", lambda: KernelDevice("0000:7f:00.0"))
    attempt("unbind", lambda: binding.unbind(address, state=STATE))
    attempt("no driver", lambda: binding.bind(address, "no_such_driver", state=STATE))
    attempt("another driver", lambda: binding.bind(address, "pcieport", state=STATE))
    found["driver then"] = str(pci.look(address).driver)
    with bound(address):
        with KernelDevice(address):
            attempt("twice", lambda: KernelDevice(address))
            attempt("unbind in use", lambda: binding.unbind(address, state=STATE))
            attempt("bind in use", lambda: binding.bind(address, "pcieport", state=STATE))
        attempt("no cdev", lambda: KernelDevice(address, iommufd=True))
        with KernelDevice(address) as device, SharedMemory(1 << 20) as memory:
            found["resettable"] = str(device.info.resettable)
            attempt("reset", device.reset)
            attempt("reserved", lambda: device.dma.map(0xFEE00000, memory.fd, 0, 4096, READ))
            attempt("beyond", lambda: device.dma.map(1 << 60, memory.fd, 0, 4096, READ))
            attempt("hot reset", device.hot_reset_info)
            attempt(
                "locked memory", lambda: _without_memlock(lambda: device.dma.map(1 << 32, memory.fd, 0, 1 << 20, READ | WRITE))
            )
            device.dma.map(1 << 32, memory.fd, 0, 1 << 20, READ | WRITE)
            found["ranges"] = str(device.dma.iova_ranges)
        with Container() as space:
            with SharedMemory(4096) as memory:
                attempt("no device yet", lambda: space.map(0, memory.fd, 0, 4096, READ))
            with KernelDevice(address, space=space) as device:
                before = space.available
                with SharedMemory(4096) as memory:
                    device.dma.map(1 << 32, memory.fd, 0, 4096, READ)
                found["available"] = f"{before} {space.available}"
    return found


def _without_memlock(call: Callable[[], Any]) -> None:
    """As a process without CAP_IPC_LOCK and with little RLIMIT_MEMLOCK would."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    kept = list(data)
    data[0] &= ~(1 << 14)  # the effective CAP_IPC_LOCK
    assert libc.capset(header, data) == 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, before[1]))
    try:
        call()
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
        data[:] = kept
        assert libc.capset(header, data) == 0


def cycles(report: Report, address: str, count: int) -> None:
    """Opened, used and closed again and again: nothing is left, no descriptor, no map, no memory."""
    with bound(address), nothing_left(objects=False):
        for number in range(count):
            with KernelDevice(address) as device, SharedMemory(4096) as memory:
                signal = eventfd.make()
                device.irq(IRQ_MSI).enable(0, signal)
                device.dma.map(1 << 32, memory.fd, 0, 4096, READ)
                assert device.region(BAR0_REGION).read32(0) & 0xFF == 0xED, number
                device.region(BAR0_REGION).doorbell(edu.INTERRUPT_RAISE)
                os.close(signal)


def groups(report: Report, first: str, second: str, other: str) -> dict[str, Any]:
    """Two edus and a device that the kernel drives, in one group, as they are behind one bridge."""
    found: dict[str, Any] = {"members": pci.look(first).members, "kernel's": pci.look(other).driver}
    with bound(first):
        try:
            KernelDevice(first).close()
            found["not viable"] = ""
        except UnavailableError as error:
            found["not viable"] = str(error)
    with bound(first), bound(second), bound(other):
        node = Roots().cdev(first) is not None
        with nothing_left(objects=False), Ioas() if node else Container() as space:
            with KernelDevice(first, space=space) as one, KernelDevice(second, space=space) as two:
                found["dependent"] = sorted((each.address, each.owned) for each in one.hot_reset_info())
                found["shared"] = share(one, two)
                with KernelDevice(other, space=space) as third:
                    common = third.region(VIRTIO_BAR)
                    common.write(VIRTIO_STATUS, b"\1")
                    found["before it"] = common.read(VIRTIO_STATUS, 1)[0]
                    one.hot_reset()
                    found["after it"] = common.read(VIRTIO_STATUS, 1)[0]
            found["closed"] = attempt_map(one)
    return found


def share(one: KernelDevice, two: KernelDevice) -> str:
    """What is mapped for one device the other reaches, too."""
    with edu.Edu(one) as first, edu.Edu(two) as second, first.buffer() as memory:
        memory.mapping.write(0, b"both reach it")
        first.fetch(memory.iova, 13)
        first.store(memory.iova + 100, 13)
        second.fetch(memory.iova + 100, 13)
        second.store(memory.iova + 200, 13)
        return memory.mapping.read(200, 13).decode()


def attempt_map(device: KernelDevice) -> str:
    """A closed device maps nothing, though its address space is open."""
    with SharedMemory(4096) as memory:
        try:
            device.dma.map(1 << 32, memory.fd, 0, 4096, READ)
        except ClosedError as error:
            return str(error)
    return ""


def half_open(report: Report, address: str) -> dict[str, int]:
    """Opening fails at each of its ioctls in turn: nothing is left of it, and the device opens afterwards."""
    real = fcntl.ioctl
    left, seen = 0, 0

    def failing(fd: int, request: int, *arguments: Any) -> int:
        nonlocal left, seen
        seen += 1
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, request, *arguments)

    def opened() -> bool:
        try:
            KernelDevice(address).close()
        except LocalError:
            return False
        return True

    with bound(address), patch.object(fcntl, "ioctl", failing):
        assert opened()  # by which it is known how many there are, those of closing included
        total, failed = seen, 0
        for number in range(1, total + 1):
            with nothing_left(objects=False):
                left = number
                failed += not opened()
                left = 0
        assert opened()
        return {"ioctls": total, "failed": failed}


def wanted_back(report: Report, address: str) -> dict[str, bool]:
    """The kernel is told to unbind a device that is open: it asks for it by the REQ interrupt, and waits until it is closed."""
    found = {}
    binding.bind(address, state=STATE)
    device = KernelDevice(address)
    signal = eventfd.make()
    device.irq(IRQ_REQ).enable(0, signal)
    unbind = Thread(target=Path(f"/sys/bus/pci/devices/{address}/driver/unbind").write_text, args=(address,))
    unbind.start()
    found["asked"] = bool(select.select([signal], [], [], 60)[0]) and eventfd.take(signal)
    found["waits"] = unbind.is_alive()
    device.close()
    unbind.join(60)
    found["unbound"] = not unbind.is_alive() and pci.look(address).driver is None
    os.close(signal)
    binding.unbind(address, state=STATE)  # of a device that somebody else has unbound meanwhile
    found["restored"] = (pci.look(address).driver, pci.look(address).override) == (None, None)
    return found
