"""`--device unix:PATH`: the card is another process's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import one_line, run
from vfio_vmbus.demo.replayed import write_capture
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.serving import HostServer
from vfio_vmbus.host.switch.switch import Switch
from vfio_vmbus.vfio.user.client import UserDevice

MAC = bytes.fromhex("02000000bb01")
PEER = bytes.fromhex("02000000bb02")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Switch]]:
    path = tmp_path_factory.mktemp("serve") / "nic.sock"
    with EmbeddedHost() as host, HostServer(host) as server:
        server.listen(path, host.add_nic("nic0", MAC, allow_spoofing=True))
        host.switch.add_sink()
        yield f"unix:{path}", host.switch


def test_frames_come_and_go_back(place: tuple[str, Switch]) -> None:
    where, switch = place
    port = switch.add_generator(PEER, MAC, size=60)
    done = run("net", "fwd", "--device", where, "--seconds", "0.3", "--json")
    switch.remove(port)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["sent"] > 0
    assert said["sent"] + said["dropped"] == said["received"]
    assert said["nic"]["mac"] == MAC.hex(":")
    assert said["ports"] == {}


def test_a_capture_is_replayed_to_the_last_frame(place: tuple[str, Switch], tmp_path: Path) -> None:
    where, switch = place
    write_capture(tmp_path / "in.pcap", b"\xff" * 6, 200)
    port = switch.add_capture(tmp_path / "out.pcap")
    done = run("net", "replay", tmp_path / "in.pcap", "--device", where, "--json")
    switch.remove(port)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 200
    assert (tmp_path / "out.pcap").stat().st_size >= (tmp_path / "in.pcap").stat().st_size


def test_a_card_that_somebody_has_is_refused_in_one_line(place: tuple[str, Switch]) -> None:
    where, _ = place
    with UserDevice(where.removeprefix("unix:")):
        done = run("net", "fwd", "--device", where, "--seconds", "0.1")
    assert done.returncode == 1
    assert "EBUSY" in one_line(done)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("unix:", "a path is missing"),
        ("unix:/nowhere/nic.sock", "/nowhere/nic.sock"),
        (f"unix:{os.devnull}", os.devnull),
        ("vfio:", "an address is missing"),
        ("embedded:", "a name is missing"),
    ],
)
def test_what_is_no_card(device: str, says: str) -> None:
    done = run("net", "fwd", "--device", device, "--seconds", "0.1")
    assert done.returncode == 2
    assert says in one_line(done)


def test_ports_belong_to_the_other_process(place: tuple[str, Switch]) -> None:
    where, _ = place
    done = run("net", "fwd", "--device", where, "--port", "sink")
    assert done.returncode == 2
    assert "vfio-vmbus serve" in one_line(done)
