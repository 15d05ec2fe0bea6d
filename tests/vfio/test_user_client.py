"""The device over a socket passes the suite of all devices, and the network driver works on it; with its server in another thread, and in
another process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.netvsc.pair import SMALL
from tests.vfio.served_host import CARDS, OtherProcess, other_process
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import ClosedError, RefusedError, UnavailableError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.serving import HostServer
from vfio_vmbus.memory.kernel import INTERPRETED
from vfio_vmbus.testing.function_conformance import VmbusFunctionConformance
from vfio_vmbus.testing.leaks import Stock, nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, MSIX_IRQ, Device
from vfio_vmbus.vfio.user.client import UserDevice

PATIENCE = 60.0
CYCLES = 5 if INTERPRETED else 50  # of two attachments each
FRAMES = 20 if INTERPRETED else 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where cards of a host in this process are served."""
    folder = tmp_path_factory.mktemp("here")
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host, HostServer(host) as server:
        for name in CARDS:
            server.listen(folder / name, host.add_nic(name))
        yield folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherProcess]:
    """The same in another process."""
    with other_process(tmp_path_factory.mktemp("elsewhere")) as host:
        yield host


@pytest.fixture
def left(folder: Path) -> Iterator[UserDevice]:
    with nothing_left(objects=False), UserDevice(folder / "left", timeout=PATIENCE) as device:
        yield device


class TestUserDevice(VmbusFunctionConformance):
    @pytest.fixture(autouse=True)
    def _path(self, folder: Path) -> None:
        self.path = folder / "left"

    def open(self) -> Device:
        return UserDevice(self.path, timeout=PATIENCE)


class TestAcrossProcesses(VmbusFunctionConformance):
    @pytest.fixture(autouse=True)
    def _path(self, elsewhere: OtherProcess) -> None:
        self.path = elsewhere.path("left")

    def open(self) -> Device:
        return UserDevice(self.path, timeout=PATIENCE)


# The network driver.


class Cards:
    """Drivers of both cards of a host: what one sends, the other receives."""

    def __init__(self, folder: Path, stack: ExitStack, **options: Any) -> None:
        self.nics = []
        for name in CARDS:
            device = stack.enter_context(UserDevice(folder / name, timeout=PATIENCE))
            self.nics.append(stack.enter_context(Netvsc(stack.enter_context(open_device(device)), mtu=9000, **options)))

    def send(self, sender: int, payload: bytes) -> bytes:
        """Send a frame to the other card: the frame."""
        frame = self.nics[1 - sender].mac + self.nics[sender].mac + b"\x88\xb5" + payload
        deadline = time.monotonic() + PATIENCE
        while not self.nics[sender].queue.send([frame]):
            assert time.monotonic() < deadline
            self.nics[sender].queue.wait(0.1)
        return frame

    def receive(self, receiver: int, count: int) -> list[bytes]:
        heard: list[bytes] = []
        deadline = time.monotonic() + PATIENCE
        while len(heard) < count:
            assert time.monotonic() < deadline
            new = self.nics[receiver].queue.receive()
            heard += new
            if not new:
                self.nics[receiver].queue.wait(0.1)
        return heard


def exchange_frames(folder: Path) -> None:
    with nothing_left(objects=False), ExitStack() as stack:
        cards = Cards(folder, stack)
        for sender in (0, 1):
            for number in range(FRAMES // 20):
                sent = [cards.send(sender, bytes([number % 251]) * size) for size in [46, 200, 1486, 8000, 47] * 4]
                assert cards.receive(1 - sender, len(sent)) == sent


def test_frames_go_both_ways_and_wake_who_waits(folder: Path) -> None:
    exchange_frames(folder)


def test_frames_go_both_ways_between_processes(elsewhere: OtherProcess) -> None:
    exchange_frames(elsewhere.folder)


def test_drivers_that_come_and_go_leave_nothing_on_either_side(elsewhere: OtherProcess) -> None:
    def cycle() -> None:
        with ExitStack() as stack:
            cards = Cards(elsewhere.folder, stack, **SMALL)
            sent = cards.send(0, b"hello")
            assert cards.receive(1, 1) == [sent]

    cycle()  # what is made once is made
    there, here = elsewhere.stock(), Stock.take()
    for _ in range(CYCLES):
        cycle()
    assert elsewhere.stock() == there
    left = Stock.take().beyond(here)
    left.pop("registered", None)
    assert left == {}


# What is its own.


def test_it_says_where_it_is(folder: Path, left: UserDevice) -> None:
    assert left.info.name == f"unix:{folder / 'left'}"
    assert left.info.isolation == "vfio-user server"
    assert left.info.resettable
    with pytest.raises(UsageError, match=r"region 1 of unix:.* is empty"):
        left.region(1)
    with pytest.raises(UsageError, match="has no interrupts of index 0"):
        left.irq(0)
    for index in (2, CONFIG_REGION):
        with pytest.raises(UnavailableError, match=f"no eventfds for region {index}"):
            left.region(index).doorbell(0x1000)


def test_one_client_at_a_time(folder: Path, left: UserDevice) -> None:
    with nothing_left(objects=False), pytest.raises(RefusedError, match=r"somebody else has this device.*EBUSY"):
        UserDevice(folder / "left", timeout=PATIENCE)
    assert left.region(BAR0_REGION).read32(reg.REG_MAGIC) == reg.MAGIC


def test_nobody_listens(tmp_path: Path) -> None:
    with nothing_left(objects=False):
        with pytest.raises(UnavailableError, match="No such file or directory: is a vfio-user server listening there"):
            UserDevice(tmp_path / "nothing")
        with pytest.raises(UsageError, match="path too long"):
            UserDevice("x" * 200)
        (tmp_path / "file").touch()
        with pytest.raises(UnavailableError, match="Connection refused"):
            UserDevice(tmp_path / "file")


def test_other_sockets_and_waits_are_refused() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams, socket.socket() as internet:
        for sock in (datagrams, internet):
            with pytest.raises(UsageError, match="take a Unix stream socket"):
                UserDevice(sock)
    for seconds in (0, -1, 1e9, float("nan")):
        with pytest.raises(UsageError, match="a timeout of"):
            UserDevice("nowhere", timeout=seconds)


def test_any_thread_may_use_it(left: UserDevice) -> None:
    wrong: list[int] = []
    bar = left.region(BAR0_REGION)

    def look() -> None:
        for value in range(100):
            bar.write32(reg.REG_ADMIN_UPSTREAM, value)
            if bar.read32(reg.REG_MAGIC) != reg.MAGIC:
                wrong.append(value)

    together([look] * 4)
    assert bar.read32(reg.REG_ADMIN_UPSTREAM) == 99
    assert wrong == []


def test_closed_by_several_threads_at_once_it_is_closed(left: UserDevice) -> None:
    together([left.close] * 4)
    with pytest.raises(ClosedError, match="is closed"):
        left.reset()


def together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_vector_is_fired_across_the_socket(left: UserDevice) -> None:
    mine = eventfd.make()
    try:
        irq = left.irq(MSIX_IRQ)
        irq.enable(irq.count - 1, mine)
        irq.disable(irq.count - 1)
        with pytest.raises(UsageError, match="cannot be masked"):
            irq.mask(0)
        with pytest.raises(UsageError, match="cannot be masked"):
            irq.unmask(0)
    finally:
        os.close(mine)


def test_a_server_that_ends_is_noticed(tmp_path: Path) -> None:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        with HostServer(host) as server:
            server.listen(tmp_path / "card", host.add_nic("card"))
            device = UserDevice(tmp_path / "card", timeout=PATIENCE)
        for _ in range(2):
            with pytest.raises(ClosedError, match="the server has closed the connection"):
                device.region(BAR0_REGION)
        device.close()


def test_a_socket_that_is_connected_already(tmp_path: Path) -> None:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host, HostServer(host) as server:
        ours, theirs = socket.socketpair()
        server.adopt(theirs.detach(), host.add_nic("card"))
        with UserDevice(ours, timeout=PATIENCE) as device:
            assert device.info.name == "vfio-user"
            assert device.region(BAR0_REGION).read32(reg.REG_MAGIC) == reg.MAGIC
