"""An NVMe controller through the kernel's VFIO: taken from its driver, driven with interrupts on the last of many vectors, given back."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfio_vmbus.bus import binding, pci
from vfio_vmbus.iommu.dma import DmaBuffer, DmaSpace
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import BAR0_REGION, MSIX_IRQ, Region
from vfio_vmbus.vfio.kernel import KernelDevice

STATE = Path("/dev/shm/vfio-vmbus")
# Registers and commands: NVM Express Base Specification 1.4, 3.1 and 5.
CONFIGURATION, STATUS, ADMIN_SIZES, ADMIN_SUBMISSION, ADMIN_COMPLETION, DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
ENABLE, READY = 0x00460001, 1  # entries of 64 and 16 bytes
FLUSH, CREATE_SUBMISSION, CREATE_COMPLETION, IDENTIFY = 0x00, 0x01, 0x05, 0x06
ENTRIES = 16


class Queue:
    """A submission and a completion queue, in one buffer of two pages."""

    def __init__(self, bar: Region, number: int, memory: DmaBuffer, signal: int) -> None:
        self.bar, self.number, self.memory, self.signal = bar, number, memory, signal
        self.count = 0

    def run(self, opcode: int, *, nsid: int = 0, prp: int = 0, dword10: int = 0, dword11: int = 0) -> int:
        """Submit a command, wait for its interrupt, and return its status."""
        place = self.count % ENTRIES
        words = [opcode | self.count << 16, nsid, 0, 0, 0, 0, prp & 0xFFFFFFFF, prp >> 32, 0, 0, dword10, dword11]
        self.memory.mapping.write(64 * place, b"".join(word.to_bytes(4, "little") for word in words).ljust(64, b"\0"))
        phase = self.count // ENTRIES & 1 ^ 1
        self.count += 1
        self.bar.write32(DOORBELLS + 8 * self.number, self.count % ENTRIES)
        until = time.monotonic() + 30
        while True:
            status = int.from_bytes(self.memory.mapping.read(4096 + 16 * place + 14, 2), "little")
            if status & 1 == phase:
                break
            assert time.monotonic() < until, "no completion"
            select.select([self.signal], [], [], 1)
        assert select.select([self.signal], [], [], 30)[0], "a completion, but no interrupt"
        eventfd.take(self.signal)
        self.bar.write32(DOORBELLS + 8 * self.number + 4, self.count % ENTRIES)
        return status >> 1


def switch(bar: Region, on: bool) -> None:
    bar.write32(CONFIGURATION, ENABLE if on else 0)
    until = time.monotonic() + 30
    while bar.read32(STATUS) & READY != on:
        assert time.monotonic() < until, f"status {bar.read32(STATUS):#x}"


def main(report: Callable[[Any], None], address: str) -> dict[str, Any]:
    before = pci.look(address)
    assert before.driver == "nvme"
    made = binding.bind(address, state=STATE)
    found: dict[str, Any] = {"before": made.driver_before, "bound": pci.look(address).driver}
    try:
        with KernelDevice(address) as device:
            found |= drive(device)
    finally:
        binding.unbind(address, state=STATE)
    found["restored"] = pci.look(address) == before
    return found


def drive(device: KernelDevice) -> dict[str, Any]:
    bar, irq = device.region(BAR0_REGION), device.kernel_irq(MSIX_IRQ)
    space = DmaSpace(device.dma, device.dma.iova_ranges)
    signals = [eventfd.make() for _ in range(3)]
    last = irq.count - 1
    with space.buffer(8192, READ | WRITE) as admin, space.buffer(8192, READ | WRITE) as io, space.buffer(4096, WRITE) as page:
        for vector, signal in zip((0, last, last // 2), signals, strict=True):
            irq.enable(vector, signal)
        switch(bar, False)
        bar.write32(ADMIN_SIZES, (ENTRIES - 1) << 16 | ENTRIES - 1)
        bar.write64(ADMIN_SUBMISSION, admin.iova)
        bar.write64(ADMIN_COMPLETION, admin.iova + 4096)
        switch(bar, True)
        queue = Queue(bar, 0, admin, signals[0])
        statuses = [queue.run(IDENTIFY, prp=page.iova, dword10=1)]
        sizes = (ENTRIES - 1) << 16 | 1
        statuses.append(queue.run(CREATE_COMPLETION, prp=io.iova + 4096, dword10=sizes, dword11=last << 16 | 3))
        statuses.append(queue.run(CREATE_SUBMISSION, prp=io.iova, dword10=sizes, dword11=1 << 16 | 1))
        flushes = Queue(bar, 1, io, signals[1])
        statuses += [flushes.run(FLUSH, nsid=1) for _ in range(2 * ENTRIES)]
        irq.loopback(last // 2)
        looped = eventfd.take(signals[2])
        enabled = sorted(irq.enabled)
        serial = page.mapping.read(4, 20).decode().strip()
        device.reset()
        after = bar.read32(CONFIGURATION)
        irq.loopback(0)  # interrupts stay
        kept = eventfd.take(signals[0])
        irq.disable_all()
    for signal in signals:
        os.close(signal)
    return {
        "vectors": irq.count,
        "flags": irq.flags,
        "enabled": enabled,
        "statuses": sorted(set(statuses)),
        "serial": serial,
        "looped": looped,
        "configuration after reset": after,
        "kept": kept,
        "areas": bar.areas,
        "resettable": device.info.resettable,
    }
