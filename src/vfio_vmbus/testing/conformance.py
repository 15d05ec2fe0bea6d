"""What every `vfio.device.Device` must do, as tests that its author inherits.

    class TestMyDevice(DeviceConformance):          # or VmbusFunctionConformance, if BAR 0 is that of the PCI personality
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
from ..vfio import registers as reg
from ..vfio.device import BAR0_REGION, CONFIG_REGION, MSIX_IRQ, REGION_MMAP, REGION_READ, REGION_WRITE, Device, Irq, Region
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


class VmbusFunctionConformance(DeviceConformance):
    """The tests of a device whose BAR 0 is that of the PCI personality (`vfio.registers`)."""

    def trigger(self, device: Device) -> tuple[Irq, int]:
        """Starting an admin ring of no pages fails, and that is signalled."""
        self.start(device, 0, 0, 0)
        return device.irq(MSIX_IRQ), 0

    def start(self, device: Device, iova: int, upstream: int, downstream: int) -> tuple[int, int]:
        """Start an admin ring. STATUS and ERROR then."""
        bar = device.region(BAR0_REGION)
        bar.write64(reg.REG_ADMIN_IOVA, iova)
        bar.write32(reg.REG_ADMIN_UPSTREAM, upstream)
        bar.write32(reg.REG_ADMIN_DOWNSTREAM, downstream)
        bar.write32(reg.REG_CONTROL, reg.CONTROL_START)
        return state(device)

    def test_bar0_says_what_it_is(self) -> None:
        with self.opened() as device:
            bar = device.region(BAR0_REGION)
            assert bar.size == reg.BAR0_SIZE
            assert bar.flags == REGION_READ | REGION_WRITE
            assert bar.read32(reg.REG_MAGIC) == reg.MAGIC
            assert bar.read(reg.REG_MAGIC, 4) == b"VMBS"
            assert bar.read32(reg.REG_LAYOUT) == reg.LAYOUT
            assert bar.read32(reg.REG_FEATURES) == 0
            assert 2 <= bar.read32(reg.REG_CHANNELS) <= (reg.BAR0_SIZE - reg.REG_DOORBELLS) // 4
            assert 2 <= bar.read32(reg.REG_VECTORS) == device.irq(MSIX_IRQ).count
            assert bar.read32(reg.REG_MAX_ADMIN_PAGES) >= 4
            assert state(device) == (0, reg.ERROR_NONE)

    def test_registers_have_32_bits_and_64_are_two_of_them(self) -> None:
        with self.opened() as device:
            bar = device.region(BAR0_REGION)
            for offset, size in ((0, 1), (0, 2), (0, 3), (0, 5), (0, 16), (1, 4), (2, 4), (4, 8), (reg.BAR0_SIZE - 4, 8)):
                with refused(UsageError):
                    bar.read(offset, size)
                with refused(UsageError):
                    bar.write(offset, bytes(size))
            value = 0x1122_3344_5566_7788
            bar.write64(reg.REG_ADMIN_IOVA, value)
            assert bar.read(reg.REG_ADMIN_IOVA, 8) == value.to_bytes(8, "little")
            assert (bar.read32(reg.REG_ADMIN_IOVA), bar.read32(reg.REG_ADMIN_IOVA + 4)) == (0x5566_7788, 0x1122_3344)
            bar.write32(reg.REG_ADMIN_IOVA + 4, 1)
            assert bar.read(reg.REG_ADMIN_IOVA, 8) == 0x1_5566_7788.to_bytes(8, "little")
            bar.write64(reg.REG_ADMIN_UPSTREAM, 7 | 9 << 32)
            assert (bar.read32(reg.REG_ADMIN_UPSTREAM), bar.read32(reg.REG_ADMIN_DOWNSTREAM)) == (7, 9)

    def test_everything_else_reads_as_zero_and_ignores_writes(self) -> None:
        with self.opened() as device:
            bar = device.region(BAR0_REGION)
            writable = {*range(reg.REG_ADMIN_IOVA, reg.REG_ADMIN_DOWNSTREAM + 4, 4), reg.REG_CONTROL}
            for offset in (*range(0, 0x80, 4), 0xFFC, reg.REG_DOORBELLS, reg.BAR0_SIZE - 4):
                before = bar.read32(offset)
                if offset not in writable:
                    bar.write32(offset, 0xFFFF_FFFF)
                    assert bar.read32(offset) == before
                if offset > reg.REG_ADMIN_DOWNSTREAM or offset == reg.REG_CONTROL:
                    assert before == 0
            for value in (0, 3, 0xFFFF_FFFF):
                bar.write32(reg.REG_CONTROL, value)
            assert state(device) == (0, reg.ERROR_NONE)

    def test_doorbells_are_eventfds(self) -> None:
        with self.opened() as device:
            bar = device.region(BAR0_REGION)
            last = reg.REG_DOORBELLS + 4 * (bar.read32(reg.REG_CHANNELS) - 1)
            for offset in (reg.REG_DOORBELLS, reg.REG_DOORBELLS + 4, last):
                assert eventfd.is_eventfd(bar.doorbell(offset))
                assert bar.doorbell(offset) == bar.doorbell(offset)
                bar.write32(offset, 1)
            bell = bar.doorbell(last)
            assert eventfd.take(bell)
            for offset in (0, reg.REG_DOORBELLS - 4, reg.REG_DOORBELLS + 2, last + 4):
                with refused(UsageError):
                    bar.doorbell(offset)

    def test_the_configuration_space_is_that_of_the_personality(self) -> None:
        with self.opened() as device:
            space = device.region(CONFIG_REGION)
            assert space.size >= 0x100
            assert space.read(0x00, 4) == bytes.fromhex("1414 5642")
            assert space.read(0x08, 1)[0] == reg.LAYOUT
            assert space.read(0x06, 2)[0] & 0x10
            assert (space.read(0x0E, 1), space.read(0x3D, 1)) == (b"\0", b"\0")
            msix, vendor = capabilities(space)[0x11], capabilities(space)[0x09]
            assert int.from_bytes(space.read(msix + 2, 2), "little") & 0x7FF == device.irq(MSIX_IRQ).count - 1
            assert space.read(vendor + 2, 6) == bytes([40, reg.LAYOUT]) + b"VMBS"

    def test_bars_tell_their_sizes(self) -> None:
        with self.opened() as device:
            space = device.region(CONFIG_REGION)
            found = {region.index: region.size for region in regions(device)}
            for bar in range(6):
                before = space.read32(0x10 + 4 * bar)
                space.write32(0x10 + 4 * bar, 0xFFFF_FFFF)
                answer = space.read32(0x10 + 4 * bar)
                space.write32(0x10 + 4 * bar, before)
                assert -(answer & ~0xF) & 0xFFFF_FFFF == found.get(bar, 0)

    def test_the_msix_table_is_where_the_capability_says(self) -> None:
        with self.opened() as device:
            space = device.region(CONFIG_REGION)
            at = capabilities(space)[0x11]
            count = device.irq(MSIX_IRQ).count
            for offset, size in ((space.read32(at + 4), 16 * count), (space.read32(at + 8), (count + 63) // 64 * 8)):
                region = device.region(offset & 7)
                assert (offset & ~7) + size <= region.size
                assert len(region.read(offset & ~7, 8)) == 8

    def test_a_driver_turns_memory_and_bus_master_on(self) -> None:
        with self.opened() as device:
            space = device.region(CONFIG_REGION)
            space.write(4, (0x6).to_bytes(2, "little"))
            assert space.read(4, 1)[0] & 0x6 == 0x6
            device.region(BAR0_REGION).write32(reg.REG_CONTROL, reg.CONTROL_RESET)
            assert space.read(4, 1)[0] & 0x6 == 0x6

    def test_an_admin_ring_starts_stops_and_starts_again(self) -> None:
        with memory(8) as mine, self.opened() as device:
            device.dma.map(IOVA, mine.fd, 0, 8 * PAGE, READ | WRITE)
            for _ in range(3):
                assert self.start(device, IOVA, 2, 6) == (reg.STATUS_RUNNING, reg.ERROR_NONE)
                device.region(BAR0_REGION).write32(reg.REG_CONTROL, reg.CONTROL_RESET)
                assert state(device) == (0, reg.ERROR_NONE)
                assert device.region(BAR0_REGION).read(reg.REG_ADMIN_IOVA, 8) == bytes(8)
                assert self.start(device, IOVA + 4 * PAGE, 2, 2) == (reg.STATUS_RUNNING, reg.ERROR_NONE)
                device.reset()
                assert state(device) == (0, reg.ERROR_NONE)

    def test_a_ring_that_cannot_be_does_not_start_and_says_why(self) -> None:
        most = reg.MAX_ADMIN_PAGES
        with memory(most + 2) as mine, memory(4) as other, self.opened() as device, own_eventfd() as signal:
            device.irq(MSIX_IRQ).enable(0, signal)
            device.dma.map(IOVA, mine.fd, 0, (most + 2) * PAGE, READ | WRITE)
            device.dma.map(2 * IOVA, other.fd, 0, 4 * PAGE, READ)
            device.dma.map(3 * IOVA, other.fd, 0, 4 * PAGE, WRITE)
            sizes = ((0, 0), (1, 2), (2, 1), (2, most - 1), (most, 2), (1 << 31, 1 << 31), (0xFFFF_FFFF, 3), (3, 0xFFFF_FFFF))
            for upstream, downstream in sizes:
                assert self.start(device, IOVA, upstream, downstream) == (reg.STATUS_FAILED, reg.ERROR_ADMIN_SIZE)
                assert eventfd.take(signal)
            end = IOVA + (most + 2) * PAGE
            for iova in (0, IOVA - PAGE, IOVA + 8, end, end - PAGE, 2 * IOVA, 3 * IOVA, (1 << 62) - PAGE, FAR - PAGE, FAR - 8):
                assert self.start(device, iova, 2, 2) == (reg.STATUS_FAILED, reg.ERROR_ADMIN_MEMORY), hex(iova)
                assert eventfd.take(signal)
            assert self.start(device, IOVA, 2, most - 2) == (reg.STATUS_RUNNING, reg.ERROR_NONE)
            assert not eventfd.take(signal)

    def test_a_ring_whose_indices_cannot_be_does_not_start(self) -> None:
        with memory(4) as mine, self.opened() as device:
            device.dma.map(IOVA, mine.fd, 0, 4 * PAGE, READ | WRITE)
            with mine.map() as mapping:
                for offset, value in ((2 * PAGE, 4), (2 * PAGE, PAGE), (4, 0xFFFF_FFF8)):
                    mapping.write(offset, value.to_bytes(4, "little"))  # the device's own ends: where it writes, where it reads
                    assert self.start(device, IOVA, 2, 2) == (reg.STATUS_FAILED, reg.ERROR_ADMIN_MEMORY)
                    mapping.write(offset, bytes(4))
            assert self.start(device, IOVA, 2, 2) == (reg.STATUS_RUNNING, reg.ERROR_NONE)

    def test_starting_what_runs_fails_it(self) -> None:
        with memory(4) as mine, self.opened() as device:
            device.dma.map(IOVA, mine.fd, 0, 4 * PAGE, READ | WRITE)
            for _ in range(2):
                assert self.start(device, IOVA, 2, 2) == (reg.STATUS_RUNNING, reg.ERROR_NONE)
                assert self.start(device, IOVA, 2, 2) == (reg.STATUS_FAILED, reg.ERROR_RUNNING)
                assert self.start(device, IOVA, 2, 2) == (reg.STATUS_RUNNING, reg.ERROR_NONE)
                device.reset()

    def test_unmapping_the_ring_stops_it_first(self) -> None:
        with memory(4) as mine, self.opened() as device, own_eventfd() as signal:
            device.irq(MSIX_IRQ).enable(0, signal)
            for _ in range(2):
                device.dma.map(IOVA, mine.fd, 0, 2 * PAGE, READ | WRITE)
                device.dma.map(IOVA + 2 * PAGE, mine.fd, 2 * PAGE, 2 * PAGE, READ | WRITE)
                assert self.start(device, IOVA, 2, 2) == (reg.STATUS_RUNNING, reg.ERROR_NONE)
                device.dma.unmap(IOVA + 2 * PAGE, 2 * PAGE)
                assert state(device) == (reg.STATUS_FAILED, reg.ERROR_ADMIN_MEMORY)
                assert eventfd.take(signal)
                device.dma.unmap(IOVA, 2 * PAGE)
                device.reset()

    def test_unmapping_other_memory_does_not(self) -> None:
        with memory(4) as mine, self.opened() as device:
            device.dma.map(IOVA, mine.fd, 0, 4 * PAGE, READ | WRITE)
            device.dma.map(IOVA - PAGE, mine.fd, 0, PAGE, READ | WRITE)
            device.dma.map(IOVA + 4 * PAGE, mine.fd, 0, PAGE, READ | WRITE)
            assert self.start(device, IOVA, 2, 2) == (reg.STATUS_RUNNING, reg.ERROR_NONE)
            device.dma.unmap(IOVA - PAGE, PAGE)
            device.dma.unmap(IOVA + 4 * PAGE, PAGE)
            assert state(device) == (reg.STATUS_RUNNING, reg.ERROR_NONE)


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


def capabilities(space: Region) -> dict[int, int]:
    """The capabilities of a configuration space: number -> offset. AssertionError for a list without an end."""
    found: dict[int, int] = {}
    at = space.read(0x34, 1)[0]
    while at:
        assert at % 4 == 0
        assert at >= 0x40
        assert space.read(at, 1)[0] not in found
        found[space.read(at, 1)[0]] = at
        at = space.read(at + 1, 1)[0]
    return found


def state(device: Device) -> tuple[int, int]:
    """STATUS and ERROR."""
    bar = device.region(BAR0_REGION)
    return bar.read32(reg.REG_STATUS), bar.read32(reg.REG_ERROR)


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
