"""The client against servers of another house: libvfio-user's samples."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vfio.foreign_servers import PATIENCE, foreign_server, reason
from vfio_vmbus.errors import UnavailableError, UsageError
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.conformance import DeviceConformance
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import CONFIG_REGION, Device, Irq
from vfio_vmbus.vfio.user.client import UserDevice

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())


@pytest.fixture(scope="module")
def gpio() -> Iterator[Path]:
    with foreign_server("gpio-pci-idio-16") as path:
        yield path


class TestGpio(DeviceConformance):
    """What of the suite a device without BAR 0, that never interrupts by itself, can pass."""

    test_a_doorbell_is_an_eventfd_and_always_the_same = None
    test_an_interrupt_comes_once_enabled_where_it_was_enabled_last = None
    test_a_disabled_vector_is_silent = None
    test_the_device_keeps_the_eventfd_that_its_driver_closes = None
    test_a_counter_that_is_full_and_blocking_does_not_stop_the_device = None
    test_a_reset_keeps_maps_and_interrupts = None
    test_a_closed_device_is_closed = None

    @pytest.fixture(autouse=True)
    def _path(self, gpio: Path) -> None:
        self.path = gpio

    def open(self) -> Device:
        return UserDevice(self.path, timeout=PATIENCE)

    def trigger(self, device: Device) -> tuple[Irq, int]:
        raise AssertionError("it never interrupts")


def test_pins_of_the_gpio_device(gpio: Path) -> None:
    with nothing_left(objects=False), UserDevice(gpio, timeout=PATIENCE) as device:
        assert device.region(CONFIG_REGION).read(0, 4) == bytes.fromhex("4f49c80d")
        pins = device.region(2)
        before = pins.read(1, 1)[0]
        states = []
        for _ in range(3):
            pins.write(0, b"\x01")
            states.append(pins.read(1, 1)[0] & 1)
        assert sorted(states) == [0, 0, 1]  # every third pulse
        assert pins.read(1, 1)[0] == before


def test_registers_and_memory_of_the_sample_server() -> None:
    with nothing_left(objects=False), foreign_server("server") as path, UserDevice(path, timeout=PATIENCE) as device:
        assert device.region(CONFIG_REGION).read(0, 4) == bytes.fromhex("addeefbe")
        with pytest.raises(UsageError, match="REGION_READ refused: EINVAL"):
            device.region(0).read(0, 4)  # it takes eight; the refusal has a body
        assert len(device.region(0).read(0, 8)) == 8
        with pytest.raises(UnavailableError, match="has no eventfds for region 0"):
            device.region(0).doorbell(0)
        memory = device.region(1)
        assert memory.areas == ()  # it offers a plain file
        data = os.urandom(memory.size)
        memory.write(0, data)
        assert memory.read(0, memory.size) == data


def test_the_sample_server_interrupts_and_reaches_memory_both_ways() -> None:
    """A second after it was told to, it writes one map through its own mapping and another by messages, and reads both back."""
    mine = eventfd.make()
    with SharedMemory(2 * PAGE) as shared, foreign_server("server") as path, UserDevice(path, timeout=PATIENCE) as device:
        for place in range(2):
            device.dma.map((place + 1) << 20, shared.fd, place * PAGE, PAGE, 3)
        device.irq(0).enable(0, mine)
        device.region(0).write(0, (int(time.time()) + 1).to_bytes(8, "little"))
        poller = select.poll()
        poller.register(mine, select.POLLIN)
        assert poller.poll(PATIENCE * 1000)
        deadline = time.monotonic() + PATIENCE
        while device.core.served < 6:  # in the background: a command of ours meanwhile would break the library (its issue 279)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        expected = b"".join(letter * 1024 for letter in (b"A", b"B", b"C", b"D"))
        with shared.map() as mapping:
            assert mapping.read(0, 2 * PAGE) == 2 * expected
        for place in range(2):
            device.dma.unmap((place + 1) << 20, PAGE)
        device.reset()
    os.close(mine)


def test_entries_of_48_bytes() -> None:
    with foreign_server("shadow_ioeventfd_server") as path, UserDevice(path, timeout=PATIENCE) as device:
        bell = device.region(0).doorbell(0)
        assert eventfd.is_eventfd(bell)
        eventfd.ring(bell)
        with pytest.raises(UsageError, match="no doorbell register at 0x4"):
            device.region(0).doorbell(4)
