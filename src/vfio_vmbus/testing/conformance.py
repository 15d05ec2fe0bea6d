"""What every `vfio.device.Device` must do, as tests that its author inherits.

    class TestMyDevice(DeviceConformance):          # or one of its heirs, if it is a VMBus device in one of its personalities
        def open(self) -> Device: ...

pytest collects the inherited `test_*` methods; any runner that calls them does. They raise AssertionError.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import ClosedError, DmaError, UsageError, VfioVmbusError
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..memory.shared import SharedMemory
from ..vfio import eventfd
from ..vfio.device import BAR0_REGION, REGION_MMAP, REGION_READ, REGION_WRITE, Device, Irq, Region
from .leaks import nothing_left

IOVA = 1 << 32
FAR = 1 << 64


@contextmanager
def refused(kind: type[VfioVmbusError]) -> Iterator[None]:
    """AssertionError unless the block raises `kind`."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


class DeviceConformance(ABC):
    """The tests of any device. Each opens one, and looks that nothing is left behind."""

    doorbells = BAR0_REGION
    """The region that has them."""

    @abstractmethod
    def open(self) -> Device:
        """A device, fresh or after a reset. What it needs besides was made before, and outlives it."""

    @abstractmethod
    def trigger(self, device: Device) -> tuple[Irq, int]:
        """Make the device interrupt: which vector."""

    @contextmanager
    def opened(self) -> Iterator[Device]:
        with nothing_left(objects=False), self.open() as device:
            yield device

    # What it says of itself.

    def test_info_names_it_and_counts_its_parts(self) -> None:
        with self.opened() as device:
            assert device.info.name
            assert device.info.regions > 0
            assert device.info.irqs > 0
            assert device.info.resettable in (True, False)
            assert isinstance(device.info.isolation, str)
            assert [region.index for region in regions(device)]
            assert [irq.index for irq in irqs(device)]

    def test_parts_beyond_the_count_are_refused(self) -> None:
        with self.opened() as device:
            for index in (-1, device.info.regions, 1 << 31):
                with refused(UsageError):
                    device.region(index)
            for index in (-1, device.info.irqs, 1 << 31):
                with refused(UsageError):
                    device.irq(index)

    # Regions.

    def test_a_region_is_read_within_its_bounds_only(self) -> None:
        with self.opened() as device:
            for region in regions(device):
                assert region.size >= 4
                assert region.flags & ~(REGION_READ | REGION_WRITE | REGION_MMAP) == 0
                if region.flags & REGION_READ:
                    assert len(region.read(0, 4)) == 4
                    assert region.read(0, 4) == region.read32(0).to_bytes(4, "little")
                for offset in outside(region):
                    with refused(UsageError):
                        region.read(offset, 4)
                for size in (0, -4, region.size + 4):
                    with refused(UsageError):
                        region.read(0, size)

    def test_a_region_is_written_within_its_bounds_only(self) -> None:
        with self.opened() as device:
            for region in regions(device):
                for offset in (*outside(region), *([] if region.flags & REGION_WRITE else [0])):
                    with refused(UsageError):
                        region.write(offset, bytes(4))
                for data in (b"", bytes(region.size + 4)):
                    with refused(UsageError):
                        region.write(0, data)

    def test_a_region_is_mapped_within_its_areas_only(self) -> None:
        with self.opened() as device:
            for region in regions(device):
                assert bool(region.areas) == bool(region.flags & REGION_MMAP)
                for offset, size in region.areas:
                    assert offset % PAGE == size % PAGE == 0 < size <= region.size - offset
                    for bad in (
                        (offset, size + PAGE),
                        (offset, 0),
                        (offset, -PAGE),
                        (-PAGE, PAGE),
                        (region.size, PAGE),
                        (offset + 8, PAGE),
                    ):
                        with refused(UsageError):
                            region.map(*bad)
                for size in () if region.areas else (region.size, PAGE):
                    with refused(UsageError):
                        region.map(0, size)

    def test_a_doorbell_is_an_eventfd_and_always_the_same(self) -> None:
        with self.opened() as device:
            region = device.region(self.doorbells)
            with refused(UsageError):
                region.doorbell(region.size)
            with refused(UsageError):
                region.doorbell(-4)

    # Interrupts.

    def test_vectors_beyond_the_count_are_refused(self) -> None:
        with self.opened() as device, own_eventfd() as mine:
            for irq in irqs(device):
                assert irq.count > 0
                for vector in (-1, irq.count, 1 << 31):
                    with refused(UsageError):
                        irq.enable(vector, mine)
                    with refused(UsageError):
                        irq.disable(vector)

    def test_only_an_eventfd_is_signalled(self) -> None:
        ours, theirs = os.pipe()
        try:
            with self.opened() as device:
                for irq in irqs(device):
                    for fd in (-1, 1 << 30, ours, theirs):
                        with refused(UsageError):
                            irq.enable(0, fd)
        finally:
            os.close(ours)
            os.close(theirs)

    def test_an_interrupt_comes_once_enabled_where_it_was_enabled_last(self) -> None:
        with self.opened() as device, own_eventfd() as first, own_eventfd() as second:
            irq, vector = self.trigger(device)
            irq.enable(vector, first)
            assert not eventfd.take(first)
            self.trigger(device)
            assert eventfd.take(first)
            irq.enable(vector, second)
            self.trigger(device)
            assert (eventfd.take(first), eventfd.take(second)) == (False, True)

    def test_a_disabled_vector_is_silent(self) -> None:
        with self.opened() as device, own_eventfd() as mine:
            irq, vector = self.trigger(device)
            irq.disable(vector)
            irq.enable(vector, mine)
            irq.disable(vector)
            irq.disable(vector)
            self.trigger(device)
            assert not eventfd.take(mine)

    def test_the_device_keeps_the_eventfd_that_its_driver_closes(self) -> None:
        with self.opened() as device, own_eventfd() as mine:
            irq, vector = self.trigger(device)
            duplicate = os.dup(mine)
            irq.enable(vector, duplicate)
            os.close(duplicate)
            self.trigger(device)
            assert eventfd.take(mine)

    def test_a_counter_that_is_full_and_blocking_does_not_stop_the_device(self) -> None:
        with self.opened() as device, own_eventfd(blocking=True) as mine:
            irq, vector = self.trigger(device)
            os.eventfd_write(mine, (1 << 64) - 2)
            irq.enable(vector, mine)
            os.set_blocking(mine, True)  # should the device have changed that
            self.trigger(device)
            self.trigger(device)
            assert eventfd.take(mine)

    # Memory.

    def test_memory_is_mapped_and_taken_back(self) -> None:
        with memory(4) as mine, self.opened() as device:
            for _ in range(3):
                device.dma.map(IOVA, mine.fd, 0, 4 * PAGE, READ | WRITE)
                device.dma.unmap(IOVA, 4 * PAGE)
            device.dma.unmap(IOVA, 4 * PAGE)

    def test_many_maps_come_and_go(self) -> None:
        with memory(64) as mine, self.opened() as device:
            for number in range(64):
                device.dma.map(IOVA + number * PAGE, mine.fd, number * PAGE, PAGE, READ | WRITE)
            for number in range(0, 64, 2):
                device.dma.unmap(IOVA + number * PAGE, PAGE)
            device.dma.unmap(IOVA, 64 * PAGE)
            device.dma.map(IOVA, mine.fd, 0, 64 * PAGE, READ)

    def test_maps_do_not_overlap(self) -> None:
        with memory(8) as mine, self.opened() as device:
            device.dma.map(IOVA, mine.fd, 0, 4 * PAGE, READ)
            for first, pages in ((0, 4), (0, 1), (3, 1), (3, 2), (-1, 2), (-1, 6)):
                with refused(DmaError):
                    device.dma.map(IOVA + first * PAGE, mine.fd, 0, pages * PAGE, READ)
            device.dma.map(IOVA + 4 * PAGE, mine.fd, 0, PAGE, READ)

    def test_an_unmap_does_not_split_a_map(self) -> None:
        with memory(4) as mine, self.opened() as device:
            device.dma.map(IOVA, mine.fd, 0, 4 * PAGE, READ)
            for first, pages in ((0, 1), (1, 2), (3, 1), (-1, 2)):
                with refused(DmaError):
                    device.dma.unmap(IOVA + first * PAGE, pages * PAGE)
            with refused(DmaError):
                device.dma.map(IOVA, mine.fd, 0, 4 * PAGE, READ)

    def test_ranges_and_rights_that_cannot_be_are_refused(self) -> None:
        with memory(2) as mine, self.opened() as device:
            for iova, offset, size in (
                (IOVA + 1, 0, PAGE),
                (IOVA, 1, PAGE),
                (IOVA, 0, PAGE + 1),
                (IOVA, 0, 0),
                (IOVA, 0, -PAGE),
                (IOVA, -PAGE, PAGE),
                (IOVA, 0, 3 * PAGE),
                (IOVA, 2 * PAGE, PAGE),
                (-PAGE, 0, PAGE),
                (FAR - PAGE, 0, 2 * PAGE),
            ):
                with refused(DmaError):
                    device.dma.map(iova, mine.fd, offset, size, READ)
            for access in (0, 4, -1):
                with refused(DmaError):
                    device.dma.map(IOVA, mine.fd, 0, PAGE, access)
            for iova, size in ((IOVA + 1, PAGE), (IOVA, 0), (IOVA, 1), (-PAGE, PAGE)):
                with refused(DmaError):
                    device.dma.unmap(iova, size)

    def test_what_is_no_sealed_memory_is_refused(self) -> None:
        ours, theirs = os.pipe()
        unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, PAGE)
        try:
            with self.opened() as device:
                for fd in (-1, 1 << 30, ours, theirs, unsealed):
                    with refused(DmaError):
                        device.dma.map(IOVA, fd, 0, PAGE, READ)
                fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
                device.dma.map(IOVA, unsealed, 0, PAGE, READ)
        finally:
            for fd in (ours, theirs, unsealed):
                os.close(fd)

    # Reset and the end.

    def test_a_reset_keeps_maps_and_interrupts(self) -> None:
        with memory(1) as mine, self.opened() as device, own_eventfd() as signal:
            if not device.info.resettable:
                return
            irq, vector = self.trigger(device)
            irq.enable(vector, signal)
            device.dma.map(IOVA, mine.fd, 0, PAGE, READ)
            device.reset()
            device.reset()
            with refused(DmaError):
                device.dma.map(IOVA, mine.fd, 0, PAGE, READ)
            self.trigger(device)
            assert eventfd.take(signal)

    def test_closing_twice_does_no_harm_and_the_device_can_be_opened_again(self) -> None:
        with memory(1) as mine:
            for _ in range(3):
                with self.opened() as device:
                    device.dma.map(IOVA, mine.fd, 0, PAGE, READ)
                    device.close()
                    device.close()

    def test_a_closed_device_is_closed(self) -> None:
        with memory(1) as mine, self.opened() as device, own_eventfd() as signal:
            region, irq, dma = device.region(BAR0_REGION), irqs(device)[0], device.dma
            device.close()
            uses: list[Callable[[], object]] = [
                lambda: region.read(0, 4),
                lambda: region.read32(0),
                lambda: region.write(0, bytes(4)),
                lambda: device.region(BAR0_REGION).read(0, 4),
                lambda: irq.enable(0, signal),
                lambda: irq.disable(0),
                lambda: dma.map(IOVA, mine.fd, 0, PAGE, READ),
                lambda: dma.unmap(IOVA, PAGE),
                device.reset,
            ]
            for use in uses:
                with refused(ClosedError):
                    use()


def regions(device: Device) -> list[Region]:
    """Those that are there."""
    found = []
    for index in range(device.info.regions):
        try:
            found.append(device.region(index))
        except UsageError:
            continue
    assert [region.index for region in found] == sorted({region.index for region in found})
    return found


def irqs(device: Device) -> list[Irq]:
    """Those that are there."""
    found = []
    for index in range(device.info.irqs):
        try:
            found.append(device.irq(index))
        except UsageError:
            continue
    assert [irq.index for irq in found] == sorted({irq.index for irq in found})
    return found


def outside(region: Region) -> tuple[int, ...]:
    """Offsets at which four bytes are not all within."""
    return (region.size, region.size - 2, -4, 1 << 40, 1 << 62, FAR, FAR - 4)


def memory(pages: int) -> SharedMemory:
    """Sealed memory of the driver's."""
    return SharedMemory(pages * PAGE, "conformance")


@contextmanager
def own_eventfd(*, blocking: bool = False) -> Iterator[int]:
    """An eventfd of the driver's."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | (0 if blocking else os.EFD_NONBLOCK))
    try:
        yield fd
    finally:
        os.close(fd)
