#!/usr/bin/env python3
"""A driver for QEMU's teaching device `edu`, in user space: registers, an interrupt, DMA both ways, and a DMA that the IOMMU refuses.

    qemu-system-x86_64 -machine q35,kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on -device edu,addr=04.0 ...
    vfio-vmbus bind 0000:00:04.0                    (in the guest, whose kernel has intel_iommu=on)
    python3 examples/edu.py 0000:00:04.0

`Edu` takes any `vfio.device.Device`, so it drives an edu behind a socket as well. docs/kernel-vfio.md goes through it.
The device's registers: docs/specs/edu.rst of QEMU.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from vfio_vmbus.errors import ProtocolError, UsageError, VfioVmbusError, WaitTimeout
from vfio_vmbus.iommu.dma import DmaBuffer, DmaSpace
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import BAR0_REGION, Device, Irq
from vfio_vmbus.wire.vfio import DMA_READ, DMA_WRITE, IRQ_INTX, IRQ_MSI

IDENTIFICATION = 0x00  # 0x??????ed
LIVENESS = 0x04  # reads as the complement of what was written
FACTORIAL = 0x08  # a number in, its factorial modulo 2^32 out when STATUS_BUSY is clear
STATUS = 0x20
STATUS_BUSY = 0x01
STATUS_INTERRUPT = 0x80  # interrupt when the factorial is there
INTERRUPT_STATUS = 0x24
INTERRUPT_RAISE = 0x60
INTERRUPT_ACKNOWLEDGE = 0x64
DMA_SOURCE = 0x80
DMA_DESTINATION = 0x88
DMA_COUNT = 0x90
DMA_COMMAND = 0x98
DMA_START = 0x01
DMA_FROM_DEVICE = 0x02
DMA_INTERRUPT = 0x04

INTERRUPT_FACTORIAL = 0x001
INTERRUPT_DMA = 0x100

BUFFER = 0x40000  # the device's own memory, as its DMA addresses it
BUFFER_SIZE = 4096
ADDRESS_LIMIT = 1 << 28  # it has 28 address lines, unless dma_mask= says otherwise


class Edu:
    """The device, with an interrupt that is waited for. Close it before the Device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._bar = device.region(BAR0_REGION)
        identification = self._bar.read32(IDENTIFICATION)
        if identification & 0xFF != 0xED:
            raise ProtocolError(f"identification is {identification:#010x}, need 0x......ed: no edu")
        self.version = identification >> 16
        ranges = device.dma.iova_ranges or ((0, ADDRESS_LIMIT),)
        with ExitStack() as stack:
            self.event = eventfd.make()
            stack.callback(os.close, self.event)
            self.space = DmaSpace(device.dma, [(start, min(end, ADDRESS_LIMIT)) for start, end in ranges])
            stack.callback(self.space.close)
            self.irq = self._interrupt()
            self.irq.enable(0, self.event)
            stack.callback(self.irq.disable, 0)
            self._resources = stack.pop_all()

    def _interrupt(self) -> Irq:
        try:
            return self.device.irq(IRQ_MSI)
        except UsageError:
            return self.device.irq(IRQ_INTX)

    def alive(self, value: int) -> bool:
        """Does it invert what it is told?"""
        self._bar.write32(LIVENESS, value)
        return self._bar.read32(LIVENESS) == value ^ 0xFFFF_FFFF

    def factorial(self, number: int, timeout: float = 30.0) -> int:
        """`number`! modulo 2^32, computed by the device."""
        self._bar.write32(STATUS, STATUS_INTERRUPT)
        self._bar.write32(FACTORIAL, number)
        self.wait(INTERRUPT_FACTORIAL, timeout)
        return self._bar.read32(FACTORIAL)

    def interrupt(self, cause: int) -> None:
        """Let it interrupt, for this cause."""
        self._bar.write32(INTERRUPT_RAISE, cause)

    def wait(self, cause: int, timeout: float = 30.0) -> None:
        """Wait for an interrupt of this cause, and acknowledge it. Raises WaitTimeout."""
        until = time.monotonic() + timeout
        while True:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.event], [], [], left)[0]:
                raise WaitTimeout(f"edu's interrupt {cause:#x}", timeout)
            eventfd.take(self.event)
            causes = self._bar.read32(INTERRUPT_STATUS)
            self._bar.write32(INTERRUPT_ACKNOWLEDGE, causes)
            if self.irq.index == IRQ_INTX:
                self.irq.unmask(0)  # the line was masked when it fell
            if causes & cause:
                return

    def buffer(self, size: int = BUFFER_SIZE) -> DmaBuffer:
        """Memory that the device may read and write, at an address that it can speak."""
        return self.space.buffer(size, DMA_READ | DMA_WRITE, "edu")

    def fetch(self, iova: int, size: int) -> None:
        """Let the device copy memory into its own buffer."""
        self._copy(iova, BUFFER, size, 0)

    def store(self, iova: int, size: int) -> None:
        """Let the device copy its buffer to memory."""
        self._copy(BUFFER, iova, size, DMA_FROM_DEVICE)

    def _copy(self, source: int, destination: int, size: int, direction: int) -> None:
        if not 0 < size <= BUFFER_SIZE:
            raise UsageError(f"{size} bytes: edu's buffer has {BUFFER_SIZE}")
        self._bar.write32(DMA_SOURCE, source)
        self._bar.write32(DMA_DESTINATION, destination)
        self._bar.write32(DMA_COUNT, size)
        self._bar.write32(DMA_COMMAND, DMA_START | direction | DMA_INTERRUPT)
        self.wait(INTERRUPT_DMA)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Edu:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def still_mapped(edu: Edu, text: bytes) -> Iterator[tuple[int, DmaBuffer]]:
    """Memory with `text` in it whose IOVA was taken back: where the device would find it, and the memory, which this process still has."""
    with edu.buffer() as memory:
        memory.mapping.write(0, text)
        edu.device.dma.unmap(memory.iova, memory.size)
        yield memory.iova, memory


def show(device: Device) -> Iterator[str]:
    """What it can do, a line each. Raises AssertionError where it did something else."""
    with Edu(device) as edu:
        yield f"edu {edu.version >> 8}.{edu.version & 0xFF} at {device.info.name}, isolated by: {device.info.isolation}"
        assert edu.alive(0x1234_5678)
        yield "it is alive: it inverts what it is told"
        found = edu.factorial(10)
        assert found == 3628800
        yield f"10! = {found}, and an interrupt came when it was there"
        edu.interrupt(0x42)
        edu.wait(0x42)
        yield "it interrupts when it is told to"

        with edu.buffer() as there, edu.buffer() as back:
            text = b"through the IOMMU and back"
            there.mapping.write(0, text)
            edu.fetch(there.iova, len(text))
            edu.store(back.iova + 1024, len(text))
            assert back.mapping.read(1024, len(text)) == text
            yield f"DMA both ways: from IOVA {there.iova:#x} to the device, from there to {back.iova + 1024:#x}"

            with still_mapped(edu, b"secret") as (iova, memory):
                edu.store(iova, len(text))
                assert memory.mapping.read(0, 6) == b"secret"
                yield f"a DMA write to {iova:#x}, which is not mapped any more, was refused: the memory is as it was"
                edu.fetch(iova, 6)
                edu.store(back.iova, 6)
                assert back.mapping.read(0, 6) != b"secret"
                yield "so was a DMA read: the device did not see it"


def main() -> int:
    """Drive the device at the PCI address that is the only argument."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} ADDRESS", file=sys.stderr)
        return 2
    from vfio_vmbus.vfio.kernel import KernelDevice

    try:
        with KernelDevice(sys.argv[1]) as device:
            for line in show(device):
                print(line, flush=True)
    except VfioVmbusError as error:
        print(f"edu: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
