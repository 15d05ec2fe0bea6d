"""The device within a process passes the suite of all devices; what is its own is below."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vfio_vmbus.errors import ClosedError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.conformance import VmbusFunctionConformance
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, Device


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


def test_there_is_one_region_and_one_kind_of_interrupt_yet(host: EmbeddedHost) -> None:
    with host.attach() as device:
        with pytest.raises(UsageError, match="region 7"):
            device.region(CONFIG_REGION)
        with pytest.raises(UsageError, match="interrupt index 0"):
            device.irq(0)
        assert device.info.isolation == "software IOMMU"


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
