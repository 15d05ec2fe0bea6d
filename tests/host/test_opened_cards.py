"""Cards in the `vmbus` personality: the driver of a network card runs on them as it does everywhere, and their host stands it all."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from raw_client import eventually

from tests.netvsp.traffic import Traffic
from vfio_vmbus.channel.opened import OpenedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import ClosedError, RefusedError, RescindedError, RingError, UnavailableError, UsageError, VfioVmbusError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio.vmbus_function import Sizes
from vfio_vmbus.wire import opened as wire
from vfio_vmbus.wire.guids import CLASS_NETWORK, CLASS_SCSI

LITTLE = Sizes(upstream=16 * PAGE, downstream=16 * PAGE, receive=1 << 20, send=1 << 19)


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost() as host:
        for name in ("a", "b", "c"):
            host.add_nic(name)
        yield host


def opened(host: EmbeddedHost, name: str = "a", sizes: Sizes | None = LITTLE) -> OpenedDevice:
    device = open_device(host.attach(host.nics[name], personality="vmbus", sizes=sizes))
    assert isinstance(device, OpenedDevice)
    return device


def exchange(sender: Netvsc, receiver: Netvsc, size: int) -> None:
    """One frame."""
    frame = (receiver.mac + sender.mac + b"\x88\xb5" + bytes(range(256)) * (size // 256 + 1))[:size]
    assert sender.queue.send([frame]) == 1
    got: list[bytes] = []

    def arrived() -> bool:
        got.extend(receiver.queue.receive())
        return bool(got)

    eventually(arrived, "the frame")
    assert got == [frame]
    sender.queue.rx_burst()


# The driver.


@pytest.mark.parametrize("other", ["vmbus", "pci"])
def test_frames_pass_both_ways(host: EmbeddedHost, other: str) -> None:
    with (
        nothing_left(objects=False),
        opened(host) as first,
        open_device(host.attach(host.nics["b"], personality=other)) as second,
        Netvsc(first) as here,
        Netvsc(second) as there,
    ):
        for pair in ((here, there), (there, here)):
            with Traffic(*pair) as traffic:
                for _ in range(3):
                    traffic.go_on()
                assert traffic.foreign == []
        for nic in (here, there):
            counters = nic.counters()
            assert (counters.tx_failed, counters.rx_bad_ranges, counters.bad_completions) == (0, 0, 0)


def test_long_frames_go_by_pages_that_the_driver_maps(host: EmbeddedHost) -> None:
    function = host.attach(host.nics["a"], personality="vmbus", sizes=LITTLE)
    with (
        open_device(function) as first,
        opened(host, "b") as second,
        Netvsc(first, mtu=9000) as here,
        Netvsc(second, mtu=9000) as there,
    ):
        assert len(function.function.domain.maps) == 1  # the pool; rings and buffers are the host's
        for size in (64, 3000, 9014):
            exchange(here, there, size)
            exchange(there, here, size)
        assert function.function.domain.fault_count == 0


def test_it_says_what_it_is(host: EmbeddedHost) -> None:
    card = host.nics["a"]
    with opened(host) as device:
        assert (device.class_guid, device.instance_guid) == (CLASS_NETWORK, card.offer.instance_guid)
        assert device.isolation == "software IOMMU"
        assert not device.rescinded
        with Netvsc(device) as nic:
            assert nic.mac == card.mac
            assert nic.info.isolation == "software IOMMU"
    with pytest.raises(RefusedError, match="no device of class"):
        open_device(host.attach(card, personality="vmbus"), CLASS_SCSI)
    open_device(host.attach(card, personality="vmbus"), CLASS_NETWORK).close()


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        LITTLE,
        Sizes(upstream=3 * PAGE, downstream=5 * PAGE, receive=64 * PAGE, send=8 * PAGE),
        Sizes(upstream=512 * PAGE, downstream=512 * PAGE, receive=31 << 20, send=16 << 20),
    ],
    ids=["usual", "little", "least", "as the kernel's"],
)
def test_rings_and_buffers_are_as_large_as_they_are(host: EmbeddedHost, sizes: Sizes) -> None:
    """Whatever the driver wishes, it is told and works with what there is."""
    with opened(host, sizes=sizes) as device, opened(host, "b") as other:
        channel = device.open(2)
        assert channel.outgoing.size == sizes.upstream - PAGE
        assert channel.incoming.size == sizes.downstream - PAGE
        channel.close()
        with Netvsc(device) as nic, Netvsc(other) as peer:
            assert nic.queue.receive_buffer.size == sizes.receive
            assert nic.info.receive_sections == sizes.receive // 1792
            exchange(nic, peer, 1000)
            exchange(peer, nic, 1000)


def test_a_card_without_buffers_is_none_for_netvsc(host: EmbeddedHost) -> None:
    with opened(host, sizes=Sizes(receive=0, send=0)) as device:
        assert [index for index in range(8) if has(device, index)] == [0, 7]
        with pytest.raises(RefusedError, match="no buffer for receive-buffer"):
            Netvsc(device)
        device.open(4).close()


def has(device: OpenedDevice, index: int) -> bool:
    try:
        return device.device.region(index).size > 0
    except UsageError:
        return False


def test_a_driver_comes_again_and_again_over_one_device(host: EmbeddedHost) -> None:
    with opened(host) as device, opened(host, "b") as other, Netvsc(other) as peer:
        for _ in range(4):
            with Netvsc(device) as nic:
                exchange(nic, peer, 500)
                exchange(peer, nic, 500)
        nic = Netvsc(device)
        device.device.reset()  # under the driver
        nic.close()
        with Netvsc(device) as nic:
            exchange(peer, nic, 500)


def test_one_driver_at_a_time(host: EmbeddedHost) -> None:
    with opened(host) as device:
        with pytest.raises(UsageError, match="2 bytes for the channel's opening"):
            device.open(4, b"hi")
        channel = device.open(4)
        with pytest.raises(UsageError, match="in use"):
            device.open(4)
        for access in (1, 2):
            buffer = device.share(PAGE, access, "mine")
            with pytest.raises(RefusedError, match="in use"):
                device.share(PAGE, access, "yours")
            buffer.close()
            buffer.close()
            device.share(PAGE, access, "mine again")
        with pytest.raises(UsageError, match="take one"):
            device.share(0, 1, "nothing")
        channel.close()
        channel.close()
        device.open(4)


# The host.


def test_what_cannot_be_attached(host: EmbeddedHost) -> None:
    a, b = host.nics["a"], host.nics["b"]
    with nothing_left(objects=False):
        for devices in ((), (a, b)):
            with pytest.raises(UsageError, match="take one"):
                host.attach(*devices, personality="vmbus")
        with pytest.raises(UsageError, match="take pci or vmbus"):
            host.attach(a, personality="usb")
        for sizes in ({"upstream": PAGE}, {"downstream": 2 * PAGE + 8}, {"receive": -PAGE}, {"send": 1 << 31}):
            with pytest.raises(UsageError, match="bytes; take a multiple"):
                Sizes(**sizes)
        with host.attach(a, personality="vmbus"), pytest.raises(UsageError, match="has a client already"):
            host.attach(a)


def test_nothing_is_open_before_a_client_looks(host: EmbeddedHost) -> None:
    with nothing_left(objects=False), host.attach(host.nics["a"], personality="vmbus") as function:
        assert host.nics["a"].port is None
        function.reset()
        assert host.connection(function).open_channels == 0
        function.region(wire.REGION_REGISTERS).read32(0)
        assert host.connection(function).open_channels == 1
        assert host.nics["a"].port is not None
    assert host.nics["a"].port is None


def test_twenty_clients_leave_nothing(host: EmbeddedHost) -> None:
    def client() -> None:
        with opened(host) as device, Netvsc(device) as nic:
            assert nic.info.link

    client()
    with nothing_left(objects=False):
        for _ in range(20):
            client()


def test_a_card_is_taken_away(host: EmbeddedHost) -> None:
    a = host.nics["a"]
    device = opened(host)
    nic = Netvsc(device)
    host.rescind(a)
    assert device.rescinded
    assert a.port is None
    with pytest.raises(UsageError, match="already"):
        host.rescind(a)
    nic.close()
    with pytest.raises(RescindedError):
        device.open(4)
    device.device.reset()
    assert device.rescinded
    device.close()
    with opened(host) as device, Netvsc(device):
        assert not device.rescinded


def test_a_client_that_breaks_its_ring_is_told_and_may_begin_again(host: EmbeddedHost) -> None:
    with opened(host) as device:
        nic = Netvsc(device)
        channel = device._channel
        assert channel is not None
        while channel.wait(0):
            pass
        channel.outgoing.mapping.write(0, b"\xff" * 4)
        device.device.region(wire.REGION_REGISTERS).write32(wire.DOORBELLS_AT, 0)
        assert channel.wait(60)
        eventually(lambda: failed(device), "the failure")
        error = host.connection(device.device).errors[-1]
        assert isinstance(error, RingError)
        nic.close()
        with Netvsc(device) as nic:
            assert nic.info.link


def failed(device: OpenedDevice) -> bool:
    try:
        return device.rescinded
    except RefusedError:
        return True


def test_a_card_that_does_not_open_is_no_card(host: EmbeddedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    card = host.nics["c"]

    def fails(context: Any) -> None:
        raise ZeroDivisionError("a defect")

    with nothing_left(objects=False), opened(host, "c") as device:
        with monkeypatch.context() as patch:
            patch.setattr(card, "open", fails)
            with pytest.raises(RefusedError, match="did not open"):
                device.open(4)
        assert isinstance(host.connection(device.device).errors[0], ZeroDivisionError)
        with Netvsc(device) as nic:
            assert nic.info.link


@pytest.fixture
def traffic(host: EmbeddedHost) -> Iterator[Traffic]:
    """Of two others."""
    with opened(host, "b") as b, opened(host, "c") as c, Netvsc(b) as sender, Netvsc(c) as receiver:
        with Traffic(sender, receiver) as traffic:
            yield traffic
        traffic.check()
        assert traffic.foreign == []


def test_clients_go_while_frames_come(host: EmbeddedHost, traffic: Traffic) -> None:
    """As when a process dies: the device goes, and its driver is still at work on memory that nobody serves any more."""
    for _ in range(5):
        with nothing_left(objects=False):
            device = opened(host)
            nic = Netvsc(device)
            stop = threading.Event()
            frames = [host.nics["c"].mac + bytes(6) + b"\x88\xb5" + bytes(200)]  # not its own address: the switch drops it

            def hammer(nic: Netvsc = nic, stop: threading.Event = stop, frames: list[bytes] = frames) -> None:
                while not stop.is_set():
                    nic.queue.rx_burst()
                    nic.queue.send(frames)

            thread = threading.Thread(target=hammer)
            thread.start()
            traffic.go_on()
            device.device.close()
            assert host.nics["a"].port is None
            traffic.go_on()
            stop.set()
            thread.join()
            nic.close()
            device.close()


def test_a_client_writes_wherever_it_may_all_the_time(host: EmbeddedHost, traffic: Traffic) -> None:
    """Rings, control pages and buffers change under the host's eyes; nobody else notices."""
    for turn in range(6):
        with nothing_left(objects=False):
            device = opened(host)
            nic = Netvsc(device)
            channel = device._channel
            assert channel is not None
            for value in (0xFF, 0x00, 0x01, 0x80):
                for mapping in (channel.outgoing.mapping, channel.incoming.mapping):
                    for page in range(turn % 2, 4):
                        mapping.write(page * PAGE, bytes([value]) * PAGE)
                ctypes.memset(nic.queue.receive_buffer.address, value, nic.queue.receive_buffer.size)
                os.eventfd_write(channel.doorbell, 1)
                traffic.go_on()
            nic.close()
            device.close()


def test_the_host_ends_first() -> None:
    with nothing_left(objects=False):
        host = EmbeddedHost(poll="interrupt")
        device = open_device(host.attach(host.add_nic("a"), personality="vmbus", sizes=LITTLE))
        assert isinstance(device, OpenedDevice)
        nic = Netvsc(device)
        channel = device._channel
        assert channel is not None
        while channel.wait(0):
            pass
        host.close()
        assert channel.wait(60)
        with pytest.raises(ClosedError):
            assert device.rescinded
        nic.close()
        device.close()


def test_a_function_without_the_personality_is_told_apart(host: EmbeddedHost) -> None:
    with host.attach(host.nics["a"]) as device, pytest.raises(UnavailableError, match="region 7"):
        OpenedDevice(device)
    with host.attach(host.nics["a"], personality="vmbus") as device:
        device.info = type(device.info)(**{**vars(device.info), "pci": True})
        with pytest.raises(VfioVmbusError):
            open_device(device)
