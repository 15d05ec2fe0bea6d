"""What an embedded host tells of itself, and what its clients see of the orders that it gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from vfio_vmbus.channel.connection import VmbusConnection
from vfio_vmbus.channel.offered import OfferedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.control.driving import DriverSubject
from vfio_vmbus.control.hosting import HostSubject
from vfio_vmbus.control.messages import Link, Mtu, Offer, Rescind
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire.oid import OID_GEN_MAXIMUM_FRAME_SIZE

DEADLINE = 60.0


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)


@pytest.fixture
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        yield host


@pytest.fixture
def subject(host: EmbeddedHost) -> HostSubject:
    return HostSubject(host)


def offered(connection: VmbusConnection, relid: int | None = None) -> OfferedDevice:
    """The device of the newest offer, once there is one that was not taken away."""

    def there() -> set[int]:
        connection.poll()
        return set(connection.offers) - connection.rescinded

    eventually(there, "an offer")
    return OfferedDevice(connection, connection.offers[max(there()) if relid is None else relid], lambda: None)


def test_a_client_and_what_it_holds(host: EmbeddedHost, subject: HostSubject) -> None:
    nic = host.add_nic("nic0")
    host.add_balloon()
    host.switch.add_sink("away")
    free, balloon = subject.devices()
    assert (free.name, free.kind, free.mac, free.mtu, free.link, free.client) == (
        "nic0",
        "network",
        nic.mac.hex(":"),
        9000,
        True,
        None,
    )
    assert (balloon.name, balloon.kind, balloon.mac) == ("balloon0", "balloon", None)
    assert subject.clients() == ()
    with open_device(host.attach(nic, name="guest")) as device, Netvsc(device) as card:
        card.queue.send([b"\xff" * 6 + card.mac + bytes(50)])
        eventually(lambda: subject.devices()[0].counters["sent_frames"], "a frame")
        (client,) = subject.clients()
        assert (client.name, client.devices, client.version, client.channels, client.gpadls) == ("guest", ("nic0",), "5.3", 1, 3)
        assert client.gpadl_bytes > 16 << 20
        assert client.mapped_bytes >= client.gpadl_bytes
        assert (client.faults, client.errors, client.last_error, client.failed) == (0, 0, None, False)
        assert subject.devices()[0].client == "guest"
        assert {port.name: port.counters["rx_frames"] for port in subject.ports()} == {"away": 0, "nic0": 1}
        (driven,) = DriverSubject(device, card).devices()
        assert (driven.isolation, driven.why, driven.counters["tx_frames"]) == ("isolated", "software IOMMU", 1)
    assert subject.clients() == ()


def test_a_cable_is_pulled_and_plugged_in(host: EmbeddedHost, subject: HostSubject) -> None:
    with open_device(host.attach(host.add_nic())) as device, Netvsc(device) as card:
        for up in (False, True):
            subject.carry_out(Link("nic0", up))
            assert subject.devices()[0].link is up

            def told(up: bool = up) -> bool:
                card.queue.rx_burst()
                card.poll()
                return card.link is up

            eventually(told, "the driver is told")


def test_a_device_goes_and_comes_again(host: EmbeddedHost, subject: HostSubject) -> None:
    with host.attach(host.add_nic("nic0"), name="guest") as device, VmbusConnection(device) as connection:
        first = offered(connection)
        card = Netvsc(first)
        assert subject.carry_out(Rescind("nic0")) == "nic0: taken away from guest"
        eventually(lambda: first.rescinded, "the device is gone")
        with pytest.raises(UsageError, match="already"):
            subject.carry_out(Rescind("nic0"))
        assert subject.carry_out(Offer("nic0")) == "nic0: offered to guest"  # before its client has let go of it
        card.close()
        first.close()
        second = offered(connection)
        assert second.instance_guid == first.instance_guid
        with Netvsc(second) as again:
            assert again.mac == card.mac
        second.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_cards_cable_is_pulled_before_the_card_unless_it_breaks(
    host: EmbeddedHost, subject: HostSubject, at_once: bool
) -> None:
    """Its driver, which sends all the time, stops when it hears so; what it sent by then has been taken, and completed."""
    nic = host.add_nic("nic0")
    with open_device(host.attach(nic)) as device, Netvsc(device) as card, ThreadPoolExecutor(1) as pool:
        order = pool.submit(subject.carry_out, Rescind("nic0", at_once))
        while card.link and not device.rescinded:
            card.queue.send([b"\xff" * 6 + card.mac + bytes(50)])
            card.queue.rx_burst()
            card.poll()
        assert order.result(DEADLINE).startswith("nic0: taken away from ")
        assert card.link is at_once
        if not at_once:
            card.queue.rx_burst()
            assert card.queue.unanswered == 0
    assert nic.link is True  # for whoever has it next


def test_a_new_mtu_comes_with_a_new_offer(host: EmbeddedHost, subject: HostSubject) -> None:
    with host.attach(host.add_nic("nic0"), name="guest") as device, VmbusConnection(device) as connection:
        first = offered(connection)
        card = Netvsc(first, mtu=9000)
        assert subject.carry_out(Mtu("nic0", 1400)) == "nic0: MTU 1400; taken away from guest and offered again"
        eventually(lambda: first.rescinded, "the device is gone")
        card.close()
        first.close()
        second = offered(connection)
        with Netvsc(second, mtu=1400) as again:
            assert int.from_bytes(again.query(OID_GEN_MAXIMUM_FRAME_SIZE, 4), "little") == 1400
        second.close()
    assert subject.carry_out(Mtu("nic0", 9000)) == "nic0: MTU 9000 for its next client"


def test_the_mtu_of_a_device_that_is_opened_for_its_client(host: EmbeddedHost, subject: HostSubject) -> None:
    nic = host.add_nic("nic0")
    with open_device(host.attach(nic, name="guest", personality="vmbus")) as device:
        assert subject.carry_out(Mtu("nic0", 1400)) == "nic0: MTU 1400 for its next client; taken away from guest"
        eventually(lambda: device.rescinded, "the device is gone")
        with pytest.raises(UsageError, match="connecting again"):
            subject.carry_out(Offer("nic0"))
    with open_device(host.attach(nic, personality="vmbus")) as device, Netvsc(device, mtu=1400) as card:
        assert card.mac == nic.mac


def test_a_card_is_added_to_a_running_client(host: EmbeddedHost, subject: HostSubject) -> None:
    with host.attach(host.add_nic("nic0"), name="guest") as device, VmbusConnection(device) as connection:
        before = set(connection.offers)
        assert subject.carry_out(Offer("nic1")) == "nic1: offered to guest"

        def more() -> set[int]:
            connection.poll()
            return set(connection.offers) - before

        eventually(more, "an offer")
        with offered(connection, more().pop()) as added, Netvsc(added) as card:
            assert card.mac == host.nics["nic1"].mac
        assert subject.clients()[0].devices == ("nic0", "nic1")


def test_orders_that_make_no_sense(host: EmbeddedHost, subject: HostSubject) -> None:
    host.add_nic("nic0")
    host.add_balloon()
    refused = {
        Link("nic9", True): "no device nic9: there are nic0, balloon0",
        Link("balloon0", True): "no network card",
        Rescind("nic0"): "no client has it",
        Offer("nic0"): "no client is there",
        Mtu("nic0", 67): "take 68 to 9000",
        Mtu("nic0", 9001): "take 68 to 9000",
    }
    for command, says in refused.items():
        with pytest.raises(UsageError, match=says):
            subject.carry_out(command)
    with host.attach(name="left"), host.attach(name="right"):
        with pytest.raises(UsageError, match="Clients: left, right"):
            subject.carry_out(Offer("nic0"))
        with pytest.raises(UsageError, match="to whom"):
            subject.carry_out(Offer("nic0", "nobody"))
        for name in ("", "a\nb", "x" * 33, "ä"):
            with pytest.raises(UsageError, match="no name for a card"):
                subject.carry_out(Offer(name, "left"))
        assert subject.carry_out(Offer("nic0", "left")) == "nic0: offered to left"
        with pytest.raises(UsageError, match="client already"):
            subject.carry_out(Offer("nic0", "right"))
    assert subject.devices()[0].mtu == 9000


def test_who_only_drives_takes_no_orders(host: EmbeddedHost) -> None:
    with (
        open_device(host.attach(host.add_nic())) as device,
        pytest.raises(UsageError, match="have the host's process"),
    ):
        DriverSubject(device).carry_out(Link("nic0", False))
