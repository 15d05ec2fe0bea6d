"""uio_hv_generic's devices, on a machine made of files: rings in a ring file, a FIFO for the node. The real thing: tests/guest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trees import BALLOON, NETWORK, NIC0, link, machine, process, put, uio_device, vmbus_channel, vmbus_device

from vfio_vmbus.bus import uio
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.bus.uio_device import UioDevice
from vfio_vmbus.channel.device import READ, WRITE
from vfio_vmbus.errors import (
    ProtocolError,
    RefusedError,
    RescindedError,
    UnavailableError,
    UnsafeError,
    UsageError,
    WaitTimeout,
)
from vfio_vmbus.memory.mapping import PAGE, Mapping, Piece
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire.table import Side

RINGS = 16 * PAGE


class WithKernel(Machine):
    """Takes taints."""

    def write(self, path: Path, text: str) -> None:
        path.write_text(f"{int(path.read_text()) | int(text)}\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    made = machine(tmp_path)
    process(made)
    put(made.proc / "sys/kernel/tainted", "0\n")
    put(made.dev / "kmsg")
    return WithKernel(**vars(made))


def card(here: Machine, *, class_guid: str = NETWORK, rings: int = RINGS, ring_file: int | None = RINGS) -> Path:
    """A network card that uio_hv_generic has, relid 3."""
    device = vmbus_device(here, NIC0, class_guid, driver="uio_hv_generic", relid=3)
    node = uio_device(here, device, rings=rings)
    (here.dev / "uio0").unlink()
    os.mkfifo(here.dev / "uio0")
    for index, (name, size) in enumerate({"int_page": PAGE, "monitor_page": PAGE}.items(), 1):
        put(node / f"maps/map{index}/name", f"{name}\n")
        put(node / f"maps/map{index}/size", f"{size:#x}\n")
    if ring_file is not None:
        put(device / "channels/3/ring", bytes(ring_file))
    return device


@pytest.fixture
def nic(here: Machine) -> Iterator[UioDevice]:
    card(here)
    with UioDevice(uio.find(NIC0, here), unsafe=True) as device:
        yield device


def host_of(file: Path, size: int = RINGS) -> RingPair:
    """The other side of the rings in a file."""
    handle = os.open(file, os.O_RDWR)
    try:
        halves = [Mapping([Piece(handle, at, size // 2)], wrap_from=PAGE) for at in (0, size // 2)]
    finally:
        os.close(handle)
    return RingPair.over(halves[0], halves[1], Side.HOST)


@pytest.mark.parametrize("name", [NIC0, f"vmbus:{NIC0}", NIC0.upper(), "uio0", f"vmbus:{{{NIC0}}}"])
def test_a_device_has_many_names(here: Machine, name: str) -> None:
    card(here)
    node = uio.find(name, here)
    assert (node.name, node.device.instance, node.path) == ("uio0", NIC0, here.dev / "uio0")
    assert {each: (found.index, found.size) for each, found in node.maps.items()} == {
        "txrx_rings": (0, RINGS),
        "int_page": (1, PAGE),
        "monitor_page": (2, PAGE),
    }


@pytest.mark.parametrize("name", ["", "vmbus:", "../uio0", "uio0/..", ".", "..", "a\nb"])
def test_what_cannot_be_a_name_is_refused(here: Machine, name: str) -> None:
    card(here)
    with pytest.raises(UsageError, match="is no device"):
        uio.find(name, here)


def test_where_there_is_none_it_is_said_why(here: Machine) -> None:
    with pytest.raises(UnavailableError, match="this machine has no VMBus"):
        uio.find(NIC0, here)
    vmbus_device(here, NIC0, BALLOON, driver="hv_balloon")
    with pytest.raises(UnavailableError, match=r"no VMBus device uio0.*vfio-vmbus list"):
        uio.find("uio0", here)
    with pytest.raises(UnavailableError, match=f"hv_balloon drives it: vfio-vmbus bind {NIC0} --driver uio_hv_generic first"):
        uio.find(NIC0, here)


def test_a_node_that_comes_later_is_waited_for(here: Machine) -> None:
    (here.sysfs / "bus/vmbus/devices").mkdir(parents=True)
    maker = threading.Timer(0.2, lambda: card(here))
    maker.start()
    try:
        assert uio.find(NIC0, here, wait=30).name == "uio0"
    finally:
        maker.join()
    with pytest.raises(WaitTimeout, match="uio5 to be there, with uio_hv_generic"):
        uio.find("uio5", here, wait=0.1)


def test_maps_that_make_no_sense_are_not_there(here: Machine) -> None:
    maps = card(here) / "uio/uio0/maps"
    for index, (name, size, offset) in enumerate([("a", "0x0", "0x0"), ("b", "0x1001", "0x0"), ("c", "0x1000", "0x800")]):
        put(maps / f"map{index}/name", name)
        put(maps / f"map{index}/size", size)
        put(maps / f"map{index}/offset", offset)
    put(maps / "map3/name", "recv:7\n")
    put(maps / "map3/size", "0x1f00000\n")
    put(maps / "map4/name", "send:x\n")
    put(maps / "map4/size", "0x1000000\n")
    found = uio.find(NIC0, here).maps
    assert {name: each.handle for name, each in found.items()} == {"recv": 7, "send": None}


def test_nothing_is_touched_without_the_switch(here: Machine) -> None:
    card(here)
    with pytest.raises(UnsafeError, match=f"uio_hv_generic of network {NIC0} \\(uio0\\) is unsafe"):
        UioDevice(uio.find(NIC0, here))
    assert (here.proc / "sys/kernel/tainted").read_text() == "0\n"


def test_packets_pass_both_ways_and_signals_with_them(here: Machine, nic: UioDevice) -> None:
    assert (here.proc / "sys/kernel/tainted").read_text() == "64\n"
    assert nic.isolation == ""
    with nothing_left(objects=False):
        channel = nic.open(6)
        host = host_of(nic.node.ring_file(3))
        assert channel.outgoing.send(b"hello, host")
        assert host.incoming.receive().payload[:11] == b"hello, host"
        assert os.read(channel.interrupt, 8) == b"\1\0\0\0"  # what a FIFO gives back; the kernel would signal the host
        assert host.outgoing.send(b"hello, guest")
        assert not channel.wait(0.01)
        os.write(channel.interrupt, b"\5\0\0\0")
        assert channel.wait(30)
        assert channel.incoming.receive().payload[:12] == b"hello, guest"
        for number in range(500):  # past the end of the rings, which are mapped twice in a row
            assert channel.outgoing.send(number.to_bytes(8, "little") * 20)
            assert host.incoming.receive().payload == number.to_bytes(8, "little") * 20
        while channel.wait(0):
            pass
        host.close()
        channel.close()


def test_one_channel_at_a_time(nic: UioDevice) -> None:
    channel = nic.open(6)
    with pytest.raises(UsageError, match="is open already: UioChannel"):
        nic.open(6)
    channel.close()
    with pytest.raises(UsageError, match="4 bytes for the channel's opening"):
        nic.open(6, b"user")
    nic.open(6).close()


def test_another_process_is_told_that_it_is_in_use(here: Machine, nic: UioDevice) -> None:
    nic.open(6)
    with UioDevice(nic.node, unsafe=True) as other, pytest.raises(UnavailableError, match="uio0 is in use by another process"):
        other.open(6)


@pytest.mark.parametrize(("rings", "ring_file"), [(PAGE, PAGE), (3 * PAGE, 3 * PAGE), (0, PAGE), (0, 0), (0, 5 * PAGE)])
def test_rings_that_cannot_be_are_refused(here: Machine, rings: int, ring_file: int) -> None:
    card(here, rings=rings, ring_file=ring_file)
    with UioDevice(uio.find(NIC0, here), unsafe=True) as device, pytest.raises(ProtocolError, match="rings of"):
        device.open(6)


def test_the_nodes_map_says_the_primary_rings_size(here: Machine) -> None:
    card(here, rings=8 * PAGE, ring_file=16 * PAGE)
    with UioDevice(uio.find(NIC0, here), unsafe=True) as device:
        channel = device.open(6)
        assert channel.outgoing.size == channel.incoming.size == 3 * PAGE


def test_a_device_that_is_gone_says_so(here: Machine) -> None:
    device = card(here)
    node = uio.find(NIC0, here)
    with UioDevice(node, unsafe=True) as opened:
        opened.open(6)
        assert not opened.rescinded
        (here.dev / "uio0").unlink()
        for path in sorted((device / "uio/uio0").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (device / "uio/uio0").rmdir()
        assert opened.rescinded
    with UioDevice(node, unsafe=True) as opened, pytest.raises(RescindedError, match="is gone"):
        opened.open(6)


def test_a_node_that_may_not_be_opened(here: Machine) -> None:
    card(here)
    node = uio.find(NIC0, here)
    (here.dev / "uio0").unlink()
    (here.dev / "uio0").mkdir()
    with UioDevice(node, unsafe=True) as opened, pytest.raises(RefusedError, match="does not open"):
        opened.open(6)


def test_a_device_without_its_description_is_refused(here: Machine) -> None:
    device = card(here)
    (device / "device_id").write_text("nonsense\n")
    with pytest.raises(UnavailableError, match="device_id"):
        UioDevice(uio.find("uio0", here), unsafe=True)


def test_a_monitored_channel_is_signalled_through_its_page(here: Machine) -> None:
    """The FIFO cannot be mapped: that it is tried is what can be seen here."""
    device = card(here)
    put(device / "monitor_id", "37\n")
    with (
        UioDevice(uio.find(NIC0, here), unsafe=True) as opened,
        pytest.raises(OSError, match="mmap of 4096 bytes at file offset 8192"),
    ):
        opened.open(6)


def test_buffers_are_what_the_kernel_made(here: Machine, nic: UioDevice) -> None:
    with pytest.raises(UsageError, match="open its channel before"):
        nic.share(1 << 20, WRITE, "receive")
    nic.open(6)
    with pytest.raises(RefusedError, match="has no buffer for receive"):
        nic.share(1 << 20, WRITE, "receive")
    maps = here.sysfs / f"devices/vmbus/{NIC0}/uio/uio0/maps"
    for index, name in ((3, "recv"), (4, "send:9")):
        put(maps / f"map{index}/name", f"{name}\n")
        put(maps / f"map{index}/size", "0x10000\n")
    with pytest.raises(RefusedError, match="says no GPADL handle"):
        nic.share(1, WRITE, "receive")
    with pytest.raises(UnavailableError, match=r"map 4 \(send\) cannot be mapped"):
        nic.share(1, READ, "send")


def test_a_subchannels_ring_file_is_waited_for(here: Machine, nic: UioDevice) -> None:
    device = here.sysfs / f"devices/vmbus/{NIC0}"
    with pytest.raises(UsageError, match="primary channel first"):
        nic.open_subchannel(4)
    nic.open(6)
    assert nic.subchannels() == ()
    with pytest.raises(WaitTimeout, match="channels/4/ring to appear"):
        nic.open_subchannel(4, 0.1)
    vmbus_channel(device, 4, index=1)
    assert nic.subchannels() == (4,)

    def appear() -> None:
        time.sleep(0.2)
        put(device / "channels/4/beside", bytes(RINGS)).rename(device / "channels/4/ring")

    thread = threading.Thread(target=appear)
    thread.start()
    channel = nic.open_subchannel(4, 30)
    thread.join()
    host = host_of(device / "channels/4/ring")
    assert channel.outgoing.send(b"by the side")
    assert host.incoming.receive().payload[:11] == b"by the side"
    host.close()


def test_links_that_lead_nowhere_are_no_devices(here: Machine) -> None:
    card(here)
    link(here.sysfs / "bus/vmbus/devices/dangling", "nowhere")
    assert uio.find(NIC0, here).name == "uio0"
    with pytest.raises(UnavailableError):
        uio.find("dangling", here)
