"""edu through uio_pci_generic: registers and INTx; no DMA without the switch, and with it all of memory."""

from __future__ import annotations

import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vfio_vmbus.bus import binding, pci
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.noiommu import open_without_iommu
from vfio_vmbus.bus.policy import unsafe_uses
from vfio_vmbus.bus.uio_pci import GENERIC, UioPciDevice
from vfio_vmbus.errors import VfioVmbusError
from vfio_vmbus.iommu.physical import PhysicalBuffer
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory import signal  # noqa: F401  (which sets up what it keeps once a process, and does not survive a fork)
from vfio_vmbus.testing.conformance import DeviceConformance
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, Device, Irq
from vfio_vmbus.wire.pci import COMMAND_INTX_DISABLE, COMMAND_MASTER
from vfio_vmbus.wire.vfio import IRQ_INTX

sys.path.append(str(Path(__file__).resolve().parents[3] / "examples"))
import edu

STATE = Path("/dev/shm/vfio-vmbus")
TEXT = b"all of memory"
Report = Callable[[Any], None]


@contextmanager
def bound(address: str, driver: str = GENERIC) -> Iterator[None]:
    """The device is `driver`'s, and then whose it was."""
    before = pci.look(address)
    binding.bind(address, driver, state=STATE)
    try:
        yield
    finally:
        binding.unbind(address, state=STATE)
        assert pci.look(address) == before


def said(what: Callable[[], object]) -> str:
    """The error, by name."""
    try:
        what()
    except VfioVmbusError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def command(device: Device) -> int:
    return int.from_bytes(device.region(CONFIG_REGION).read(4, 2), "little")


def tainted() -> bool:
    return bool(int(Path("/proc/sys/kernel/tainted").read_text()) >> 6 & 1)


def registers(report: Report, address: str) -> dict[str, Any]:
    """Registers, configuration space and the line, without the switch; what is refused."""
    with bound(address), nothing_left(objects=False), UioPciDevice(address) as device, edu.Edu(device) as driver:
        bar, space = device.region(BAR0_REGION), device.region(CONFIG_REGION)
        found: dict[str, Any] = {
            "isolation": device.info.isolation,
            "ids": space.read(0, 4).hex(),
            "areas": bar.areas,
            "alive": driver.alive(0x12345678),
            "factorial": driver.factorial(10),
            "twice": said(lambda: UioPciDevice(address)),
            "dma": said(driver.buffer),
            "master": said(lambda: space.write(4, (command(device) | COMMAND_MASTER).to_bytes(2, "little"))),
            "wide": said(lambda: space.write(2, bytes([0, 0, COMMAND_MASTER, 0]))),
            "command": command(device) & COMMAND_MASTER,
        }
        driver.interrupt(0x42)
        driver.wait(0x42)
        bar.write64(edu.DMA_SOURCE, 0x12345678)
        found["64 bits"] = int.from_bytes(bar.read(edu.DMA_SOURCE, 8), "little")
        bell = bar.doorbell(edu.INTERRUPT_RAISE)
        eventfd.ring(bell)
        driver.wait(1)
        found["same bell"] = bar.doorbell(edu.INTERRUPT_RAISE) == bell
        found["tainted"] = tainted()
        return found


def confined(report: Report, address: str) -> str:
    """What edu wrote to memory that it was told of all the same."""
    with bound(address), UioPciDevice(address) as device, PhysicalBuffer(4096, READ | WRITE, "victim") as memory:
        bar = device.region(BAR0_REGION)
        memory.mapping.write(0, b"as it was")
        bar.write64(edu.DMA_SOURCE, edu.BUFFER)
        bar.write64(edu.DMA_DESTINATION, memory.iova)
        bar.write32(edu.DMA_COUNT, 9)
        bar.write32(edu.DMA_COMMAND, edu.DMA_START | edu.DMA_FROM_DEVICE)
        until = time.monotonic() + 30
        while bar.read32(edu.DMA_COMMAND) & edu.DMA_START:
            assert time.monotonic() < until
        return memory.mapping.read(0, 9).decode(errors="replace")


def level(report: Report, address: str) -> dict[str, Any]:
    """A line that is masked when it falls, until it is unmasked, and that a driver may mask."""
    with bound(address), UioPciDevice(address) as device:
        bar, irq = device.region(BAR0_REGION), device.irq(IRQ_INTX)
        mine = os.eventfd(0, os.EFD_NONBLOCK)

        def came() -> bool:
            return bool(select.select([mine], [], [], 30)[0]) and eventfd.take(mine)

        found: dict[str, Any] = {"flags": irq.flags, "before": command(device) & COMMAND_INTX_DISABLE != 0}
        irq.enable(0, mine)
        bar.write32(edu.INTERRUPT_RAISE, 1)
        found["came"] = came()
        found["masked by the kernel"] = command(device) & COMMAND_INTX_DISABLE != 0
        irq.unmask(0)  # the line is still up: it comes again at once
        found["came again"] = came()
        bar.write32(edu.INTERRUPT_ACKNOWLEDGE, 1)
        irq.unmask(0)
        irq.mask(0)
        bar.write32(edu.INTERRUPT_RAISE, 2)
        found["masked by hand"] = eventfd.take(mine)
        irq.unmask(0)
        found["unmasked by hand"] = came()
        bar.write32(edu.INTERRUPT_ACKNOWLEDGE, 2)
        irq.disable(0)
        found["disabled"] = command(device) & COMMAND_INTX_DISABLE != 0
        os.close(mine)
        return found


def unsafe(report: Report, address: str) -> dict[str, Any]:
    """With the switch: DMA both ways by physical addresses, and the traces of it."""
    found: dict[str, Any] = {"tainted before": tainted()}
    with bound(address), UioPciDevice(address, unsafe=True) as device, edu.Edu(device) as driver:
        found["isolation"] = device.info.isolation
        found["elsewhere"] = said(driver.buffer)
        with PhysicalBuffer(4096, READ | WRITE, "one") as one, PhysicalBuffer(4096, READ | WRITE, "two") as two:
            for each in (one, two):
                device.dma.map(each.iova, each.memory.fd, 0, each.size, READ | WRITE)
            one.mapping.write(0, TEXT)
            copy(device, driver, one.iova, edu.BUFFER, 0)
            copy(device, driver, edu.BUFFER, two.iova, edu.DMA_FROM_DEVICE)
            found["dma"] = two.mapping.read(0, len(TEXT)).decode(errors="replace")
            for each in (one, two):
                device.dma.unmap(each.iova, each.size)
    found["tainted"] = tainted()
    found["marks"] = [use.what for use in unsafe_uses(Machine())]
    found["log"] = any("unsafe" in line for line in kernel_log())
    with bound(address), UioPciDevice(address) as device:
        found["master after"] = command(device) & COMMAND_MASTER
    return found


def copy(device: Device, driver: edu.Edu, source: int, destination: int, direction: int) -> None:
    """As Edu's, with addresses of 64 bits."""
    bar = device.region(BAR0_REGION)
    bar.write64(edu.DMA_SOURCE, source)
    bar.write64(edu.DMA_DESTINATION, destination)
    bar.write32(edu.DMA_COUNT, len(TEXT))
    bar.write32(edu.DMA_COMMAND, edu.DMA_START | direction | edu.DMA_INTERRUPT)
    driver.wait(edu.INTERRUPT_DMA)


def kernel_log() -> list[str]:
    """What is in it by now."""
    lines = []
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            lines.append(os.read(log, 8192).decode(errors="replace"))
    except BlockingIOError:
        return lines
    finally:
        os.close(log)


def refusals(report: Report, address: str) -> dict[str, str]:
    """What the kernel, or we, refuse."""
    found = {"not bound": said(lambda: UioPciDevice(address))}
    found["not there"] = said(lambda: UioPciDevice("7f:00.0"))
    found["no group"] = said(lambda: open_without_iommu(address, unsafe=True))
    return found


class UioConformance(DeviceConformance):
    def __init__(self, address: str) -> None:
        self.address = address

    def open(self) -> Device:
        return UioPciDevice(self.address)

    def trigger(self, device: Device) -> tuple[Irq, int]:
        """Raise the interrupt, wait until it was passed on if anybody is to be told, take it back, and let the line through again."""
        assert isinstance(device, UioPciDevice)
        bar, irq = device.region(BAR0_REGION), device.uio_irq(IRQ_INTX)
        before, enabled = irq.passed, irq.enabled
        bar.write32(edu.INTERRUPT_RAISE, 1)
        until = time.monotonic() + 30
        while enabled and irq.passed == before:
            assert time.monotonic() < until, "no interrupt arrived"
        bar.write32(edu.INTERRUPT_ACKNOWLEDGE, 1)
        if enabled:
            irq.unmask(0)
        return irq, 0


def conformance(report: Report, address: str, names: list[str]) -> dict[str, str]:
    """What went wrong, by the name of the test; "" where nothing did."""
    suite = UioConformance(address)
    found = {}
    with bound(address):
        for name in names:
            try:
                getattr(suite, name)()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    return found
