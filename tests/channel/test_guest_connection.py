"""A VMBus connection and what drivers see of it, over hosts that keep to the rules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from bent_device import BentDevice

from vfio_vmbus.channel.connection import VmbusConnection
from vfio_vmbus.channel.device import READ, WRITE
from vfio_vmbus.channel.offered import OfferedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.errors import ClosedError, DmaError, RefusedError, RescindedError, UnavailableError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.testing.scripted_function import ScriptedFunction, card
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.guids import CLASS_NETWORK, CLASS_SCSI

RW = READ | WRITE


@pytest.fixture
def host() -> Iterator[ScriptedFunction]:
    with nothing_left(objects=False), ScriptedFunction() as host:
        for number in range(4):
            host.function.doorbell(number)  # which are the function's from the first use on
        yield host


@pytest.fixture(scope="module")
def embedded() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        for name in ("a", "b", "c"):
            host.add_nic(name)
        yield host


def heard(host: ScriptedFunction) -> list[str]:
    return [type(message).__name__ for message in host.heard]


# Versions.


@pytest.mark.parametrize("version", wire.SUPPORTED_VERSIONS)
def test_every_version_connects_opens_and_ends(version: int) -> None:
    with (
        nothing_left(objects=False),
        ScriptedFunction(max_version=version, min_version=version) as host,
        VmbusConnection(host.device) as connection,
    ):
        assert connection.version == version
        assert host.heard[-1] == wire.RequestOffers()
        asked = [message.version_requested for message in host.heard if isinstance(message, wire.InitiateContact)]
        assert asked == [known for known in wire.SUPPORTED_VERSIONS if known >= version]
        device = OfferedDevice(connection, connection.offers[1], lambda: None)
        device.open(4).close()
        device.close()
    assert heard(host)[-1] == "Unload"


def test_the_newest_version_within_bounds_is_taken(host: ScriptedFunction) -> None:
    low, high = wire.SUPPORTED_VERSIONS[3], wire.SUPPORTED_VERSIONS[1]
    with VmbusConnection(host.device, max_version=high, min_version=low) as connection:
        assert connection.version == high
    with pytest.raises(UsageError, match="no version"):
        VmbusConnection(host.device, max_version=low - 1, min_version=low - 1)


def test_no_version_in_common_is_a_refusal() -> None:
    oldest, newest = wire.SUPPORTED_VERSIONS[-1], wire.SUPPORTED_VERSIONS[0]
    with nothing_left(objects=False), ScriptedFunction(max_version=oldest, min_version=oldest) as host:
        with pytest.raises(RefusedError, match=r"no VMBus version from 5\.3 to 5\.3"):
            VmbusConnection(host.device, min_version=newest)
        assert host.device.dma is not None
        with VmbusConnection(host.device) as connection:
            assert connection.version == oldest


# Devices, channels, buffers.


def test_offers_are_kept_and_the_first_of_a_class_is_opened() -> None:
    offers = [card(7), card(8), card(7, 1)]  # primary channels go ahead
    with nothing_left(objects=False), ScriptedFunction(offers=offers) as host:
        with VmbusConnection(host.device) as connection:
            assert [offer.offer for offer in connection.offers.values()] == offers
        with open_device(host.device, CLASS_NETWORK) as device:
            assert (device.class_guid, device.instance_guid) == (CLASS_NETWORK, offers[0].instance_guid)
            assert device.isolation == "software IOMMU"
            assert "scripted" in device.name


@pytest.mark.parametrize(("wanted", "said"), [(CLASS_SCSI, "of class"), (None, "no device")])
def test_a_device_that_is_not_offered_is_a_refusal_and_the_function_is_free_again(wanted: object, said: str) -> None:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        nic = host.add_nic()
        devices = [nic] if wanted else []
        with pytest.raises(RefusedError, match=said):
            open_device(host.attach(*devices), wanted)  # type: ignore[arg-type]
        open_device(host.attach(nic)).close()


def test_a_channel_opens_with_its_rings_vector_and_user_data(host: ScriptedFunction) -> None:
    with open_device(host.device) as device:
        channel = device.open(6, b"some data")
        request = next(message for message in host.heard if isinstance(message, wire.OpenChannel))
        assert (request.child_relid, request.downstream_page_offset, request.target_vp) == (1, 6, 1)
        assert request.user_data.startswith(b"some data")
        assert channel.outgoing.size == channel.incoming.size == 5 * PAGE
        header = next(message for message in host.heard if isinstance(message, wire.GpadlHeader))
        assert header.gpadl == request.ring_gpadl
        assert header.words[0] & 0xFFFFFFFF == 12 * PAGE
        with pytest.raises(UsageError, match="need closed"):
            device.open(6)
        channel.close()
        channel.close()
        device.open(2).close()


@pytest.mark.parametrize("pages", [-1, 0, 1, 4096, 1 << 40])
def test_rings_have_a_sensible_size(host: ScriptedFunction, pages: int) -> None:
    with open_device(host.device) as device, nothing_left():
        with pytest.raises(UsageError, match="2 to 4095"):
            device.open(pages)
        with pytest.raises(UsageError, match="120"):
            device.open(4, bytes(121))


def test_the_largest_rings_fit(host: ScriptedFunction) -> None:
    """8190 pages: a header and 292 bodies, more than the admin ring holds at a time."""
    with open_device(host.device) as device:
        device.open(4095).close()
    assert heard(host).count("GpadlBody") == 292


def test_a_buffer_is_shared_until_it_is_closed(host: ScriptedFunction) -> None:
    with open_device(host.device) as device:
        buffer = device.share(3 * PAGE, READ, "buffer")
        assert host.machine.gpadl_handles == (buffer.handle,)
        assert buffer.size == 3 * PAGE
        buffer.close()
        buffer.close()
        assert host.machine.gpadl_handles == ()
        with pytest.raises(DmaError):
            device.share(PAGE, 0, "no access")
        with pytest.raises(UsageError):
            device.share(0, READ, "no size")
        with pytest.raises(UsageError, match=r"8190|65528"):
            device.share(8191 * PAGE, READ, "too large")
        with device.dma_buffer(PAGE, RW, "pool") as pool:
            assert pool.pfns == (pool.iova // PAGE,)


def test_closing_a_device_closes_what_is_left_of_it(host: ScriptedFunction) -> None:
    with nothing_left():
        connection = VmbusConnection(host.device)
        device = OfferedDevice(connection, connection.offers[1], connection.close)
        device.open(4)
        device.share(PAGE, RW, "shared")
        device.dma_buffer(PAGE, RW, "pool")
        device.close()
        device.close()
        said = [name for name in heard(host) if name in ("CloseChannel", "GpadlTeardown", "Unload")]
        assert said == ["CloseChannel", "GpadlTeardown", "GpadlTeardown", "Unload"]
        del connection, device


def test_opened_and_closed_again_and_again_nothing_grows(host: ScriptedFunction) -> None:
    with open_device(host.device) as device:
        device.open(2).close()
        with nothing_left():
            for _ in range(reg.VECTORS + 5):
                device.open(2).close()
                device.share(PAGE, RW, "again").close()
                device.dma_buffer(PAGE, RW, "pool").close()


def test_a_channel_that_comes_does_not_take_another_ones_vector() -> None:
    with (
        nothing_left(objects=False),
        ScriptedFunction(offers=[card(1), card(2)]) as host,
        VmbusConnection(host.device) as connection,
    ):
        first, second = (OfferedDevice(connection, connection.offers[relid], lambda: None) for relid in (1, 2))
        kept = first.open(2)
        for _ in range(reg.VECTORS + 5):
            second.open(2).close()
        vectors = [message.target_vp for message in host.heard if isinstance(message, wire.OpenChannel)]
        assert vectors[0] not in vectors[1:]
        os.eventfd_write(host.function.vectors.fds[vectors[0]], 1)
        assert kept.wait(5)
        first.close()
        second.close()


def test_channels_have_a_vector_each_and_no_more_open_than_there_are() -> None:
    offers = [card(number) for number in range(1, 4)]
    with (
        nothing_left(objects=False),
        ScriptedFunction(offers=offers, vectors=3) as host,
        VmbusConnection(host.device) as connection,
    ):
        devices = [OfferedDevice(connection, offer, lambda: None) for offer in connection.offers.values()]
        channels = [device.open(2) for device in devices[:2]]
        host.function.doorbell(3)
        with nothing_left(), pytest.raises(UnavailableError, match="3"):
            devices[2].open(2)
        channels[0].close()
        devices[2].open(2)
        for device in devices:
            device.close()


def test_a_single_vector_is_the_channels() -> None:
    """As igb_uio has it: nothing tells of messages, which come all the same."""
    with (
        nothing_left(objects=False),
        ScriptedFunction(offers=[card(1), card(2)], vectors=1) as host,
        VmbusConnection(host.device) as connection,
    ):
        for relid in (1, 2):
            host.function.doorbell(relid)
        first, second = (OfferedDevice(connection, connection.offers[relid], lambda: None) for relid in (1, 2))
        channel = first.open(2)
        assert [message.target_vp for message in host.heard if isinstance(message, wire.OpenChannel)] == [0]
        with closing(first.share(PAGE, RW, "shared")):
            eventfd.ring(host.function.vectors.fds[0])
            assert channel.wait(5)
        with nothing_left(), pytest.raises(UnavailableError, match="no interrupt vector left"):
            second.open(2)
        first.close()
        second.open(2)
        second.close()


def test_a_function_without_msix_is_unavailable(host: ScriptedFunction) -> None:
    def bend(number: int, name: str) -> None:
        if name == "irq":
            raise UsageError("interrupt index 2: this device has 0")

    with nothing_left(), pytest.raises(UnavailableError, match=r"has no MSI-X here.*bind it to vfio-pci"):
        VmbusConnection(BentDevice(host.device, bend))


def test_waiting_ends_with_a_signal_or_the_time(host: ScriptedFunction) -> None:
    with open_device(host.device) as device:
        channel = device.open(2)
        assert not channel.wait(0)
        assert not channel.wait(0.001)
        os.eventfd_write(host.function.vectors.fds[1], 1)
        assert channel.wait(5)
        assert not channel.wait(0)


# Rescinds.


def test_a_rescinded_device_says_so_and_is_released(host: ScriptedFunction) -> None:
    with open_device(host.device) as device:
        device.open(4)
        buffer = device.share(PAGE, RW, "shared")
        assert not device.rescinded
        host.rescind(1)
        assert device.rescinded
        for use in (lambda: device.open(2), lambda: device.share(PAGE, RW, "more")):
            with pytest.raises(RescindedError, match="taken away"):
                use()
        buffer.close()
    assert heard(host)[-3:] == ["GpadlTeardown", "RelidReleased", "Unload"]
    assert host.errors == []


def test_a_device_that_comes_later_is_among_the_offers(host: ScriptedFunction) -> None:
    with VmbusConnection(host.device) as connection:
        with host.lock:
            relid, actions = host.machine.offer(card(5))
            host.carry_out(actions)
        connection.poll()
        assert connection.offers[relid].offer == card(5)
        host.rescind(relid)
        connection.poll()
        assert relid in connection.rescinded
        connection.release(relid)
        assert relid not in connection.offers
        connection.poll()
        assert host.errors == []


# Errors of the caller's.


def test_what_is_closed_is_closed(host: ScriptedFunction) -> None:
    connection = VmbusConnection(host.device)
    device = OfferedDevice(connection, connection.offers[1], connection.close)
    channel = device.open(2)
    device.close()
    connection.close()
    with pytest.raises(ClosedError, match="closed"):
        connection.poll()
    with pytest.raises(ClosedError):
        channel.outgoing.send(b"anybody there?")
    for use in (lambda: device.open(2), lambda: device.share(PAGE, RW, "late")):
        with pytest.raises(UsageError, match="disconnected"):
            use()


@pytest.mark.parametrize(
    ("register", "value", "said"),
    [(reg.REG_MAGIC, 0, "no VMBus function"), (reg.REG_LAYOUT, 2, "layout 2"), (reg.REG_VECTORS, 0, "vector")],
)
def test_a_function_that_this_driver_cannot_drive_is_unavailable(
    host: ScriptedFunction, register: int, value: int, said: str
) -> None:
    bent = BentDevice(host.device, lambda number, name: value.to_bytes(4, "little") if name == f"read {register:#x}" else None)
    with nothing_left(), pytest.raises(UnavailableError, match=said), VmbusConnection(bent) as connection:
        OfferedDevice(connection, connection.offers[1], lambda: None).open(2)


def test_the_device_closed_first_is_no_catastrophe(host: ScriptedFunction) -> None:
    """All that can be freed here is freed; the device's side went with the device."""
    with nothing_left():
        device = open_device(host.device)
        device.open(4)
        device.share(PAGE, RW, "shared")
        host.device.close()
        device.close()
        del device


# The embedded host.


def test_several_devices_on_one_function(embedded: EmbeddedHost) -> None:
    a, b = embedded.nics["a"], embedded.nics["b"]
    with nothing_left(objects=False), embedded.attach(a, b) as function, VmbusConnection(function) as connection:
        assert [offer.offer.instance_guid for offer in connection.offers.values()] == [
            a.offer.instance_guid,
            b.offer.instance_guid,
        ]
        devices = [OfferedDevice(connection, offer, lambda: None) for offer in connection.offers.values()]
        channels = [device.open(8) for device in devices]
        assert embedded.connection(function).open_channels == 2
        channels[0].close()
        with closing(devices[1].share(PAGE, RW, "b goes on")):
            assert embedded.run(lambda: embedded.connection(function).open_channels) == 1
        embedded.rescind(a)
        assert [device.rescinded for device in devices] == [True, False]
        with closing(devices[1].share(PAGE, RW, "b goes on still")):
            pass
        for device in devices:
            device.close()


def test_two_clients_do_not_see_each_other(embedded: EmbeddedHost) -> None:
    with (
        open_device(embedded.attach(embedded.nics["a"])) as a,
        open_device(embedded.attach(embedded.nics["b"])) as b,
    ):
        assert a.instance_guid != b.instance_guid
        with closing(a.open(4)), closing(b.open(4)), closing(a.share(PAGE, RW, "a")):
            embedded.rescind(embedded.nics["a"])
            assert (a.rescinded, b.rescinded) == (True, False)
            with closing(b.share(PAGE, RW, "b")):
                pass


def test_a_device_has_one_client_at_a_time(embedded: EmbeddedHost) -> None:
    c = embedded.nics["c"]
    with nothing_left(), open_device(embedded.attach(c)) as device:
        with pytest.raises(UsageError, match="client"):
            embedded.attach(c)
        del device
    open_device(embedded.attach(c)).close()
