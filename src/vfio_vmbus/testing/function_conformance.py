"""What a device whose BAR 0 is that of the PCI personality (`vfio.registers`) must do besides, as tests that its author inherits."""

from __future__ import annotations

from ..errors import UsageError
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE
from ..vfio import eventfd
from ..vfio import registers as reg
from ..vfio.device import BAR0_REGION, CONFIG_REGION, MSIX_IRQ, REGION_READ, REGION_WRITE, Device, Irq, Region
from .conformance import FAR, IOVA, DeviceConformance, memory, own_eventfd, refused, regions


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
