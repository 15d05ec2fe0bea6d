"""Memory taken away under traffic: what uses it ends first, nothing is touched afterwards, and the others' traffic goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from raw_client import eventually

from vfio_vmbus.channel.offered import OfferedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.drivers.netvsc.state import FRAME
from vfio_vmbus.errors import VfioVmbusError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.iommu.domain import DmaMap
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import INTERPRETED
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.device import BAR0_REGION

MORE = 100 if INTERPRETED else 5000
"""Frames that show that traffic goes on."""
SHORT, LONG = 200, 8000


class Driver:
    """A card with a thread that receives and, if there is somebody to send to, sends short and long frames all the time."""

    def __init__(self, host: EmbeddedHost, name: str, target: bytes | None = None) -> None:
        device = open_device(host.attach(host.nics[name]))
        assert isinstance(device, OfferedDevice)
        self.device = device
        self.nic = Netvsc(device, mtu=9000)
        self.received = 0
        self.sent = 0
        self.error: Exception | None = None
        self._memory = Block("u1", 2 * 9216)
        self._table = Block(FRAME, 2)
        self._target = target
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"driver-{name}")
        if target is not None:
            self._fill(target)
        self._thread.start()

    def _fill(self, target: bytes) -> None:
        for number, size in enumerate((SHORT, LONG)):
            frame = self._memory.array[number * 9216 :][:size]
            frame[:14] = np.frombuffer(target + self.nic.mac + b"\x08\x00", "u1")
            self._table.array[number] = (self._memory.address + number * 9216, size, 0, 0)

    def _run(self) -> None:
        try:
            while not self._enough.is_set():
                frames = self.nic.queue.rx_burst()
                self.received += len(frames)
                if self._target is not None:
                    self.sent += self.nic.queue.tx_burst(self._table)
                if len(frames) == 0:
                    self.nic.queue.wait(0.001)
        except VfioVmbusError as error:
            self.error = error

    @property
    def status(self) -> tuple[int, int]:
        bar = self.device.connection.device.region(BAR0_REGION)
        return bar.read32(reg.REG_STATUS), bar.read32(reg.REG_ERROR)

    def memory(self, host: EmbeddedHost, name: str) -> DmaMap:
        """The map of its memory with this name."""
        maps = host.connection(self.device.connection.device).domain.maps  # type: ignore[arg-type]
        return next(entry for entry in maps if f"/memfd:{name} " in os.readlink(f"/proc/self/fd/{entry.fd}"))

    def close(self) -> None:
        self._enough.set()
        self._thread.join()
        self.nic.close()
        self.device.close()


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost() as host:
        bystander, _ = host.add_nic("bystander"), host.add_nic("attacker")
        host.switch.add_generator(bytes.fromhex("020000000001"), bystander.mac, size=100)
        yield host


@pytest.fixture(scope="module")
def bystander(host: EmbeddedHost) -> Iterator[Driver]:
    driver = Driver(host, "bystander")
    yield driver
    driver.close()
    assert driver.error is None


@pytest.fixture
def attacker(host: EmbeddedHost, bystander: Driver) -> Iterator[Driver]:
    with nothing_left(objects=False):
        driver = Driver(host, "attacker", bystander.nic.mac)
        eventually(lambda: driver.sent > 20, "the attacker's own traffic")
        yield driver
        driver.close()


def goes_on(bystander: Driver) -> None:
    now = bystander.received
    eventually(lambda: bystander.received > now + MORE, "more frames for the bystander")
    assert bystander.error is None
    assert bystander.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)


@pytest.mark.parametrize("name", ["rings-1", "receive-buffer", "send-buffer", "admin-ring"])
def test_memory_of_a_gpadl_goes_under_traffic(host: EmbeddedHost, bystander: Driver, attacker: Driver, name: str) -> None:
    gone = attacker.memory(host, name)
    device = attacker.device.connection.device
    domain = host.connection(device).domain  # type: ignore[arg-type]
    device.dma.unmap(gone.iova, gone.size)
    assert gone not in domain.maps
    assert domain.access(gone.iova, gone.size) == 0
    expected = reg.ERROR_ADMIN_MEMORY if name == "admin-ring" else reg.ERROR_PROTOCOL
    assert attacker.status == (reg.STATUS_FAILED, expected)
    assert host.nics["attacker"].port is None
    goes_on(bystander)


def test_memory_of_packets_goes_and_comes_under_traffic(host: EmbeddedHost, bystander: Driver, attacker: Driver) -> None:
    """No GPADL: each packet that names it is refused, and the card goes on. Mapped again, its frames pass again."""
    connection = host.connection(attacker.device.connection.device)  # type: ignore[arg-type]
    domain, device, card = connection.domain, attacker.device.connection.device, host.nics["attacker"]
    for _ in range(3):
        pool = attacker.memory(host, "send-pool")
        faults = domain.fault_count
        fd = os.dup(pool.fd)
        device.dma.unmap(pool.iova, pool.size)
        eventually(lambda faults=faults: domain.fault_count > faults, "a refusal")
        assert domain.faults()[-1].reason == "not mapped"
        assert pool.iova <= domain.faults()[-1].iova < pool.end
        device.dma.map(pool.iova, fd, 0, pool.size, pool.access)
        os.close(fd)
        passed = card.counter("sent_bytes")
        eventually(lambda passed=passed: card.counter("sent_bytes") > passed + 10 * LONG, "long frames again")
        assert attacker.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)
    goes_on(bystander)
    assert attacker.error is None


def test_a_client_is_closed_under_traffic(host: EmbeddedHost, bystander: Driver, attacker: Driver) -> None:
    """The device alone, as when its process dies: its driver still hammers on rings that nobody serves."""
    attacker.device.connection.device.close()
    assert host.nics["attacker"].port is None
    goes_on(bystander)


def test_a_card_is_taken_away_under_traffic(host: EmbeddedHost, bystander: Driver, attacker: Driver) -> None:
    host.rescind(host.nics["attacker"])
    assert attacker.device.rescinded
    goes_on(bystander)


def test_maps_come_and_go_under_traffic(host: EmbeddedHost, bystander: Driver, attacker: Driver) -> None:
    """More of them than replaced tables are kept: the data plane pauses and goes on, and no frame of anybody is refused."""
    device = attacker.device.connection.device
    domain = host.connection(device).domain  # type: ignore[arg-type]
    iova = 1 << 40
    with attacker.device.dma_buffer(1 << 16, 3, "spare") as spare:
        for number in range(100):
            device.dma.map(iova + (number << 16), spare.memory.fd, 0, 1 << 16, 3)
        for number in range(0, 100, 3):
            device.dma.unmap(iova + (number << 16), 1 << 16)
        device.dma.unmap(iova, 100 << 16)
    assert domain.fault_count == 0
    goes_on(bystander)
    assert attacker.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)
