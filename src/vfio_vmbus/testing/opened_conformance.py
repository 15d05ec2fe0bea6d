"""What every device of the `vmbus` personality must do (docs/vmbus-personality.md), as tests to inherit: see `conformance`."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LocalError, UsageError
from ..memory.mapping import PAGE, Mapping
from ..ring.pair import RingPair
from ..vfio import eventfd
from ..vfio.device import REGION_MMAP, Device, Irq
from ..wire import nvsp
from ..wire import opened as wire
from ..wire.ring import PACKET_COMPLETION, RING_WRITE_INDEX, Packet
from ..wire.table import Side
from .conformance import DeviceConformance, own_eventfd, refused, regions

_PATIENCE = 60.0


class OpenedConformance(DeviceConformance):
    """The device is a network card that nobody uses otherwise, with both buffers."""

    doorbells = wire.REGION_REGISTERS

    def trigger(self, device: Device) -> tuple[Irq, int]:
        """A ring whose index cannot be closes the channel, and that is signalled."""
        device.reset()
        with rings(device) as (upstream, _):
            upstream.write(RING_WRITE_INDEX, (12).to_bytes(4, "little"))
            registers = device.region(wire.REGION_REGISTERS)
            registers.write32(wire.DOORBELLS_AT, 0)
            end = time.monotonic() + _PATIENCE
            while status(device) != wire.STATUS_FAILED:
                assert time.monotonic() < end, "the channel stays open"
                time.sleep(0.0005)
        return device.irq(wire.IRQ_CHANNELS), 0

    def test_it_is_no_pci_device_and_has_the_regions_of_the_patch(self) -> None:
        with self.opened() as device:
            assert not device.info.pci
            assert device.info.resettable
            found = {region.index: region for region in regions(device)}
            assert list(found) == [0, 3, 4, 5, 6, 7]
            for index in (wire.REGION_RINGS, wire.REGION_RECEIVE, wire.REGION_SEND):
                assert found[index].flags & REGION_MMAP
                assert found[index].areas == ((0, found[index].size),)
                assert found[index].size % PAGE == 0
            for index in (wire.REGION_INTERRUPT_PAGE, wire.REGION_MONITOR_PAGE):
                with refused(UsageError):
                    device.region(index)
            handles = [found[index].read32(0) for index in (wire.REGION_RECEIVE_GPADL, wire.REGION_SEND_GPADL)]
            assert 0 not in handles
            assert handles[0] != handles[1]

    def test_the_registers_say_what_it_is(self) -> None:
        with self.opened() as device:
            registers = device.region(wire.REGION_REGISTERS)
            assert registers.size == wire.REGISTERS_SIZE
            assert registers.read(0, 4) == b"VMBO"
            info = wire.OpenedInfo.unpack(registers.read(0, wire.OpenedInfo.SIZE))
            assert (info.layout, info.features, info.status) == (wire.LAYOUT, 0, wire.STATUS_OPEN)
            assert 1 <= info.channels <= info.max_channels == device.irq(wire.IRQ_CHANNELS).count
            assert info.class_guid.int
            assert info.instance_guid.int
            row = rings_row(device)
            assert row.region == wire.REGION_RINGS
            assert (row.upstream + row.downstream) * PAGE == device.region(wire.REGION_RINGS).size

    def test_only_doorbells_are_written_and_only_by_32_bits(self) -> None:
        with self.opened() as device:
            registers = device.region(wire.REGION_REGISTERS)
            before = registers.read(0, wire.CHANNELS_AT + 16)
            for offset in range(0, wire.CHANNELS_AT + 16, 4):
                registers.write32(offset, 0xFFFF_FFFF)
            assert registers.read(0, wire.CHANNELS_AT + 16) == before
            assert registers.read32(wire.DOORBELLS_AT) == 0
            for offset, size in ((0, 1), (0, 2), (0, 8), (2, 4), (wire.DOORBELLS_AT, 8), (wire.DOORBELLS_AT + 1, 4)):
                with refused(UsageError):
                    registers.write(offset, bytes(size))
            for index in (wire.REGION_RECEIVE_GPADL, wire.REGION_SEND_GPADL):
                with refused(UsageError):
                    device.region(index).write32(0, 1)

    def test_doorbells_are_there_for_each_channel_and_nowhere_else(self) -> None:
        with self.opened() as device:
            registers = device.region(wire.REGION_REGISTERS)
            bell = registers.doorbell(wire.DOORBELLS_AT)
            assert os.readlink(f"/proc/self/fd/{bell}") == "anon_inode:[eventfd]"
            assert registers.doorbell(wire.DOORBELLS_AT) == bell
            beyond = wire.DOORBELLS_AT + 4 * device.irq(wire.IRQ_CHANNELS).count
            for offset in (0, wire.DOORBELLS_AT - 4, wire.DOORBELLS_AT + 1, beyond):
                with refused(UsageError):
                    registers.doorbell(offset)
            with refused(LocalError):
                device.region(wire.REGION_SEND).doorbell(0)

    def test_memory_is_the_same_mapped_and_by_access(self) -> None:
        with self.opened() as device:
            for index in (wire.REGION_RECEIVE, wire.REGION_SEND):
                region = device.region(index)
                last = region.size - PAGE
                with region.map(0, region.size) as whole, region.map(last, PAGE) as end:
                    assert whole.read(0, region.size) == bytes(region.size)
                    end.write(8, b"by map")
                    assert region.read(last + 8, 6) == b"by map"
                    region.write(last, b"access")
                    assert whole.read(last, 6) == b"access"

    def test_a_ring_is_mapped_with_its_data_twice(self) -> None:
        with self.opened() as device, rings(device) as halves:
            for half in halves:
                half.write(PAGE, b"first")
                assert half.read(half.size, 5) == b"first"

    def test_a_reset_clears_all_memory_under_its_mappings(self) -> None:
        with self.opened() as device, rings(device) as (upstream, downstream):
            receive = device.region(wire.REGION_RECEIVE)
            with receive.map(0, receive.size) as buffer:
                for mapping in (upstream, downstream, buffer):
                    mapping.write(2 * PAGE - 8, b"old")
                upstream.write(0, b"\x10")
                device.reset()
                assert (upstream.read(0, 8), downstream.read(0, 8)) == (bytes(8), bytes(8))
                for mapping in (upstream, downstream, buffer):
                    assert mapping.read(2 * PAGE - 8, 3) == bytes(3)
            assert status(device) == wire.STATUS_OPEN

    def test_the_channel_works_again_after_each_reset(self) -> None:
        with self.opened() as device, own_eventfd() as signal:
            device.irq(wire.IRQ_CHANNELS).enable(0, signal)
            for _ in range(3):
                with rings(device) as (upstream, downstream):
                    greet(device, upstream, downstream, signal)
                device.reset()

    def test_the_next_client_gets_memory_of_its_own(self) -> None:
        with self.opened() as device, rings(device) as (upstream, _):
            send = device.region(wire.REGION_SEND)
            with send.map(0, send.size) as old:
                old.write(0, b"secret")
                device.close()
                with self.open() as again:
                    region = again.region(wire.REGION_SEND)
                    assert region.read(0, 6) == bytes(6)
                    old.write(0, b"scribble")
                    upstream.write(RING_WRITE_INDEX, b"\xff" * 4)
                    assert region.read(0, 8) == bytes(8)
                    assert again.region(wire.REGION_RINGS).read(0, 4) == bytes(4)
                    assert status(again) == wire.STATUS_OPEN

    def test_a_failed_channel_is_signalled_and_a_reset_opens_it_again(self) -> None:
        with self.opened() as device, own_eventfd() as signal:
            irq, vector = device.irq(wire.IRQ_CHANNELS), 0
            irq.enable(vector, signal)
            for _ in range(3):
                self.trigger(device)
                assert eventfd.take(signal)
                assert status(device) == wire.STATUS_FAILED
                device.reset()
                assert status(device) == wire.STATUS_OPEN
                assert not eventfd.take(signal)


def status(device: Device) -> int:
    return device.region(wire.REGION_REGISTERS).read32(wire.STATUS_AT)


def rings_row(device: Device) -> wire.OpenedRings:
    """The first channel's row of the table."""
    return wire.OpenedRings.unpack(device.region(wire.REGION_REGISTERS).read(wire.CHANNELS_AT, wire.OpenedRings.SIZE))


@contextmanager
def rings(device: Device) -> Iterator[tuple[Mapping, Mapping]]:
    """The first channel's rings, mapped as rings are."""
    row = rings_row(device)
    region = device.region(row.region)
    size = row.upstream * PAGE
    with region.map(0, size, wrap_from=PAGE) as upstream, region.map(size, region.size - size, wrap_from=PAGE) as downstream:
        yield upstream, downstream


def greet(device: Device, upstream: Mapping, downstream: Mapping, signal: int) -> None:
    """Agree on an NVSP version with the card, from nothing."""
    bell = device.region(wire.REGION_REGISTERS).doorbell(wire.DOORBELLS_AT)
    pair = RingPair.over(upstream, downstream, Side.GUEST, bell, "conformance")
    message = nvsp.encode_message(nvsp.Init(min_version=nvsp.VERSION_5, max_version=nvsp.VERSION_5))
    assert pair.outgoing.send(message, transaction_id=7, completion_requested=True)
    end = time.monotonic() + _PATIENCE
    packet: Packet | None = None
    while packet is None:
        assert time.monotonic() < end, "no answer"
        time.sleep(0.0005)
        packet = pair.incoming.receive()
    assert (packet.packet_type, packet.transaction_id) == (PACKET_COMPLETION, 7)
    poller = select.poll()
    poller.register(signal, select.POLLIN)
    assert poller.poll(_PATIENCE * 1000), "no interrupt"
    assert eventfd.take(signal)
