"""The `vmbus` personality over a socket: the suite of its devices, its driver, and a server in another process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.cli.commands import Process, one_line, run, started
from tests.netvsp.traffic import Traffic
from vfio_vmbus.channel.opened import OpenedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.serving import HostServer
from vfio_vmbus.testing.attacker import Attacker
from vfio_vmbus.testing.hostile import ATTACKS
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.testing.opened_conformance import OpenedConformance
from vfio_vmbus.vfio.device import Device
from vfio_vmbus.vfio.user.client import UserDevice
from vfio_vmbus.wire import opened as wire

PATIENCE = 60.0


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        yield host


@pytest.fixture(scope="module")
def folder(host: EmbeddedHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("opened")
    with HostServer(host) as server:
        server.listen(folder / "a", host.add_nic("a"), personality="vmbus")
        server.listen(folder / "b", host.add_nic("b"), personality="vmbus")
        server.listen(folder / "pci", host.add_nic("pci"))
        yield folder


class TestUserDevice(OpenedConformance):
    @pytest.fixture(autouse=True)
    def _path(self, folder: Path) -> None:
        self.path = folder / "a"

    def open(self) -> Device:
        return UserDevice(self.path, timeout=PATIENCE)


def opened(path: Path) -> OpenedDevice:
    device = open_device(UserDevice(path, timeout=PATIENCE))
    assert isinstance(device, OpenedDevice)
    return device


@pytest.mark.parametrize("other", ["b", "pci"])
def test_the_driver_of_a_card_works_on_it(folder: Path, other: str) -> None:
    with (
        nothing_left(objects=False),
        opened(folder / "a") as first,
        open_device(UserDevice(folder / other, timeout=PATIENCE)) as second,
        Netvsc(first, mtu=9000) as here,
        Netvsc(second, mtu=9000) as there,
    ):
        for pair in ((here, there), (there, here)):
            with Traffic(*pair) as traffic:
                for _ in range(3):
                    traffic.go_on()


def test_clients_come_and_go(host: EmbeddedHost, folder: Path) -> None:
    def client() -> None:
        with opened(folder / "a") as device, Netvsc(device) as nic:
            assert nic.mac == host.nics["a"].mac

    client()
    with nothing_left(objects=False):
        for _ in range(20):
            client()
    assert host.nics["a"].port is None


def test_a_card_is_taken_away(host: EmbeddedHost, folder: Path) -> None:
    with opened(folder / "b") as device, Netvsc(device):
        host.rescind(host.nics["b"])
        assert device.rescinded
    with opened(folder / "b") as device, Netvsc(device) as nic:
        assert nic.info.link


def test_only_one_device_at_a_socket_and_known_personalities(host: EmbeddedHost, tmp_path: Path) -> None:
    card = host.add_nic()
    with HostServer(host) as server:
        for devices, personality in (((), "vmbus"), ((card, card), "vmbus"), ((card,), "uio")):
            with pytest.raises(UsageError, match="take"):
                server.listen(tmp_path / "x", *devices, personality=personality)
        assert os.listdir(tmp_path) == []


@contextmanager
def serving(path: Path, *options: str) -> Iterator[Process]:
    """`vfio-vmbus serve` in a process of its own, ready."""
    with started("serve", "--listen", path, "--personality", "vmbus", *options) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving ")
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_it_is_served_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "nic0"
    with serving(path), nothing_left(objects=False):
        for _ in range(2):
            with opened(path) as device, Netvsc(device) as nic:
                assert nic.info.link
                frame = b"\xff" * 6 + nic.mac + b"\x88\xb5" + bytes(100)
                assert nic.queue.send([frame]) == 1
                assert not device.rescinded


def test_applications_need_not_know(tmp_path: Path) -> None:
    path, file = tmp_path / "nic0", tmp_path / "out.pcap"
    with serving(path, "--port", "generator:100"):
        done = run("net", "capture", file, "--device", f"unix:{path}", "--count", 50, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 50
    assert file.stat().st_size == 24 + 50 * (16 + 100)


WILD = [
    attack
    for attack in ATTACKS
    if not attack.bus and attack.name.startswith(("ring/", "header/l", "section/", "pages/", "nvsp/"))
]


def test_attackers_come_over_sockets(host: EmbeddedHost, folder: Path) -> None:
    """One after the other on a card of their own; the others' traffic goes on, and the card is there for the next one."""
    assert len(WILD) > 30
    with opened(folder / "b") as b, open_device(UserDevice(folder / "pci")) as c, Netvsc(b) as sender, Netvsc(c) as receiver:
        with Traffic(sender, receiver) as traffic:
            for attack in WILD:
                with nothing_left(objects=False), opened(folder / "a") as device:
                    gone = partial(lambda card: card.port is None, host.nics["a"])
                    attack.run(Attacker(device, gone=gone, patience=0.05))
                traffic.go_on()
        with opened(folder / "a") as device, Netvsc(device) as nic:
            assert nic.info.link


def test_a_server_that_dies_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "nic0"
    with nothing_left(objects=False), started("serve", "--listen", path, "--personality", "vmbus") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving ")
        device = opened(path)
        nic = Netvsc(device)
        process.kill()
        process.wait()
        with pytest.raises(Exception, match=r"gone|closed|reset|end"):
            device.device.region(wire.REGION_REGISTERS).read32(0)
        nic.queue.rx_burst()  # the memory is still there
        nic.close()
        device.close()


def test_the_command_knows_its_personalities() -> None:
    done = run("serve", "--listen", "/nowhere/x", "--personality", "usb")
    assert done.returncode == 2
    assert "take pci or vmbus" in one_line(done)
