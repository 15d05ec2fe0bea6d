"""The device within a process passes the suite of all devices; what is its own is below."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vfio_vmbus.errors import ClosedError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.function_conformance import VmbusFunctionConformance
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, Device
from vfio_vmbus.wire.guids import CLASS_NETWORK


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("card")
        yield host


class TestInProcessDevice(VmbusFunctionConformance):
    @pytest.fixture(autouse=True)
    def _host(self, host: EmbeddedHost) -> None:
        self.host = host

    def open(self) -> Device:
        return self.host.attach(self.host.nics["card"])


class TestWithoutADevice(VmbusFunctionConformance):
    """A function that offers nothing is a function all the same."""

    @pytest.fixture(autouse=True)
    def _host(self, host: EmbeddedHost) -> None:
        self.host = host

    def open(self) -> Device:
        return self.host.attach()


def test_there_are_two_bars_the_configuration_space_and_one_kind_of_interrupt(host: EmbeddedHost) -> None:
    with host.attach() as device:
        assert [index for index in range(9) if has_region(device, index)] == [BAR0_REGION, 2, CONFIG_REGION]
        with pytest.raises(UsageError, match="region 8: this device has 0, 2, 7"):
            device.region(8)
        with pytest.raises(UsageError, match="interrupt index 0"):
            device.irq(0)
        for index in (2, CONFIG_REGION):
            with pytest.raises(UsageError, match=f"no doorbell register at 0x1000 of region {index}"):
                device.region(index).doorbell(0x1000)
        assert device.info.isolation == "software IOMMU"


def has_region(device: Device, index: int) -> bool:
    try:
        return device.region(index).index == index
    except UsageError:
        return False


def test_the_configuration_space_names_the_device(host: EmbeddedHost) -> None:
    card = host.nics["card"]
    with host.attach(card) as device:
        space = device.region(CONFIG_REGION)
        assert space.read(0x09, 3) == bytes([0, 0, 2])
        assert space.read(0x58, 16) == CLASS_NETWORK.bytes_le
        assert space.read(0x68, 16) == card.offer.instance_guid.bytes_le
    with host.attach() as device:
        space = device.region(CONFIG_REGION)
        assert space.read(0x09, 3) == bytes([0, 0, 0xFF])
        assert space.read(0x58, 32) == bytes(32)


def test_a_reset_takes_the_configuration_back_too(host: EmbeddedHost) -> None:
    with host.attach(host.nics["card"]) as device:
        device.region(CONFIG_REGION).write(4, b"\x06\x04")
        device.region(2).write(0, b"\xff" * 8)
        device.reset()
        assert device.region(CONFIG_REGION).read(4, 2) == bytes(2)
        assert device.region(2).read(0, 8) == bytes(8)


def test_any_thread_may_use_it(host: EmbeddedHost) -> None:
    wrong: list[int] = []
    with host.attach() as device:
        bar = device.region(BAR0_REGION)

        def look() -> None:
            for value in range(200):
                bar.write32(reg.REG_ADMIN_UPSTREAM, value)
                if bar.read32(reg.REG_MAGIC) != reg.MAGIC:
                    wrong.append(value)

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bar.read32(reg.REG_ADMIN_UPSTREAM) == 199
    assert wrong == []


def test_closed_by_several_threads_at_once_it_is_closed_once(host: EmbeddedHost) -> None:
    device = host.attach(host.nics["card"])
    threads = [threading.Thread(target=device.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ClosedError):
        device.reset()
    host.attach(host.nics["card"]).close()
