"""edu through uio_pci_generic (registers and INTx; no DMA without the switch) and igb_uio (MSI; never without the switch)."""

from __future__ import annotations

import os
import select
import time
from typing import Any

from guest.payloads.unsafe_edu import (
    Report,
    both_ways,
    bound,
    command,
    edu,
    physical_maps,
    results,
    said,
    traces,
    without_rawio,
)

from vfio_vmbus.bus import pci
from vfio_vmbus.bus.noiommu import open_without_iommu
from vfio_vmbus.bus.uio_pci import GENERIC, IGB, UioPciDevice
from vfio_vmbus.iommu.physical import PhysicalBuffer
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.testing.conformance import DeviceConformance
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, Device, Irq
from vfio_vmbus.wire.pci import COMMAND_INTX_DISABLE, COMMAND_MASTER
from vfio_vmbus.wire.vfio import IRQ_INTX, IRQ_MSI


def registers(report: Report, address: str) -> dict[str, Any]:
    """Registers, configuration space and the line, without the switch; what is refused."""
    before = traces()
    with bound(address, GENERIC), nothing_left(objects=False), UioPciDevice(address) as device, edu.Edu(device) as driver:
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
        found["no traces"] = traces() == before
        return found


def confined(report: Report, address: str) -> str:
    """What edu wrote to memory that it was told of all the same."""
    with bound(address, GENERIC), UioPciDevice(address) as device, PhysicalBuffer(4096, READ | WRITE, "victim") as memory:
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
    with bound(address, GENERIC), UioPciDevice(address) as device:
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


def unsafe(report: Report, address: str, driver: str) -> dict[str, Any]:
    """With the switch, through `driver`: interrupts, DMA both ways by physical addresses, and the traces of it."""
    found: dict[str, Any] = {}
    with bound(address, driver):
        before = traces()
        found["without CAP_SYS_RAWIO"] = without_rawio(lambda: UioPciDevice(address, unsafe=True))
        found["no traces before"] = traces() == before
        for _ in range(2):
            with UioPciDevice(address, unsafe=True) as device, edu.Edu(device) as card:
                found["isolation"] = device.info.isolation
                found["interrupt"] = (card.irq.index, card.irq.flags)
                found["factorial"] = card.factorial(10)
                found["elsewhere"] = said(card.buffer)
                found["twice"] = said(lambda: UioPciDevice(address, unsafe=True))
                found["dma"] = both_ways(device, card)
                found["master"] = bool(command(device) & COMMAND_MASTER)
        after = traces()
        found["tainted"] = after.tainted
        found["marks"] = list(after.marks)
        found["log"] = [line for line in after.lines if line not in before.lines and address in line]
    if driver == GENERIC:
        with bound(address, GENERIC), UioPciDevice(address) as device:
            found["master after"] = bool(command(device) & COMMAND_MASTER)
    return found


def refusals(report: Report, address: str) -> dict[str, str]:
    """What the kernel, or we, refuse."""
    found = {"not bound": said(lambda: UioPciDevice(address))}
    found["not there"] = said(lambda: UioPciDevice("7f:00.0"))
    found["no group"] = said(lambda: open_without_iommu(address, unsafe=True))
    return found


def refused_without_switch(report: Report, address: str) -> dict[str, Any]:
    """igb_uio's device, for which there is nothing but the unsafe way."""
    before = traces()
    with bound(address, IGB):
        found: dict[str, Any] = {"said": said(lambda: UioPciDevice(address)), "driver": pci.look(address).driver}
    found["no traces"] = traces() == before
    return found


class UioConformance(DeviceConformance):
    def __init__(self, address: str, driver: str) -> None:
        self.address = address
        self.unsafe, self.index = (True, IRQ_MSI) if driver == IGB else (False, IRQ_INTX)

    def open(self) -> Device:
        return UioPciDevice(self.address, unsafe=self.unsafe)

    def trigger(self, device: Device) -> tuple[Irq, int]:
        """Raise the interrupt, wait until it was passed on if anybody is to be told, take it back, and let a line through again."""
        assert isinstance(device, UioPciDevice)
        bar, irq = device.region(BAR0_REGION), device.uio_irq(self.index)
        before, enabled = irq.passed, irq.enabled
        bar.write32(edu.INTERRUPT_RAISE, 1)
        until = time.monotonic() + 60
        while enabled and irq.passed == before:
            assert time.monotonic() < until, "no interrupt arrived"
        bar.write32(edu.INTERRUPT_ACKNOWLEDGE, 1)
        if enabled and self.index == IRQ_INTX:
            irq.unmask(0)
        return irq, 0


def conformance(report: Report, address: str, driver: str, names: list[str]) -> dict[str, str]:
    """What went wrong, by the name of the test."""
    with bound(address, driver):
        suite = UioConformance(address, driver)
        suite.open().close()  # what is made once a process, a mark, is made
        return results(suite, names)


def maps(report: Report, address: str, driver: str) -> dict[str, str]:
    """Maps of physical memory."""
    with bound(address, driver):
        return physical_maps(lambda: UioPciDevice(address, unsafe=True))
