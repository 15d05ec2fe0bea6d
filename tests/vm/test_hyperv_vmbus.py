"""VMBus between a guest and the embedded host, through hypercalls and a SynIC: versions, channels, devices that come and go."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.host.raw_client import eventually
from tests.host.raw_nic import RawNic
from tests.vm.synic_guest import EVENTS, INPUT, MONITOR_PAGES, SynicGuest
from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vm.memory import MIB
from vfio_vmbus.wire import hyperv, nvsp
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.frame import Frame, encode_packet, parse_packet

SOURCE = bytes.fromhex("02000000beef")


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        for name in ("nic", "second", "other"):
            host.add_nic(name, allow_spoofing=True)
        yield host


@pytest.fixture
def guest(host: EmbeddedHost) -> Iterator[SynicGuest]:
    with nothing_left(objects=False), SynicGuest(host, host.nics["nic"], cpus=2) as guest:
        yield guest


@pytest.fixture
def other(host: EmbeddedHost) -> Iterator[SynicGuest]:
    with SynicGuest(host, host.nics["other"], name="other") as other:
        yield other.connect()


def frame(tag: int) -> bytes:
    return b"\xff" * 6 + SOURCE + b"\x88\xb5" + bytes([tag]) * 86


def send(nic: RawNic, data: bytes) -> None:
    message = encode_packet(Frame(data))
    nic.send.mapping.write(0, message)
    nic.inband(nvsp.SendRndisPacket(section_index=0, section_size=len(message)), 5, completion=True)
    nic.completed(5)


# Versions.


@pytest.mark.parametrize("version", wire.SUPPORTED_VERSIONS, ids=wire.version_text)
def test_every_version_from_contact_to_unload(guest: SynicGuest, version: int) -> None:
    guest.target = 1
    guest.enable(1)
    answer = guest.contact(version)
    assert (answer.version_supported, answer.connection_state) == (1, wire.CONNECTION_SUCCESSFUL)
    assert guest.hyperv.connection.version == version
    if version >= wire.VERSION_WIN10_V5:
        assert answer.message_connection_id == wire.MESSAGE_CONNECTION_ID_4
    guest.say(wire.RequestOffers())
    offer = guest.hear(wire.OfferChannel)
    assert (offer.child_relid, offer.monitor.allocated, offer.monitor_id) == (1, 1, 0)
    guest.hear(wire.AllOffersDelivered)
    guest.ping()
    guest.say(wire.Unload())
    guest.hear(wire.UnloadResponse)
    guest.say(wire.RelidReleased(child_relid=1))
    guest.connect(target=1)
    assert len(guest.hyperv.connection.errors) == 0


def test_versions_outside_of_what_was_ordered_are_refused(host: EmbeddedHost) -> None:
    options = {"max_version": wire.VERSION_WIN10, "min_version": wire.VERSION_WIN8_1}
    with SynicGuest(host, host.nics["nic"], **options) as guest:
        guest.enable()
        for version in wire.SUPPORTED_VERSIONS:
            supported = wire.VERSION_WIN8_1 <= version <= wire.VERSION_WIN10
            assert guest.contact(version).version_supported == supported


def test_offers_are_monitored_only_if_so_ordered(host: EmbeddedHost) -> None:
    with SynicGuest(host, host.nics["nic"], monitored=False) as guest:
        guest.enable()
        guest.contact()
        guest.say(wire.RequestOffers())
        assert guest.hear(wire.OfferChannel).monitor.allocated == 0
        assert guest.hyperv.connection.monitor is None


# Channels.


def test_a_card_works_through_its_pages(host: EmbeddedHost, guest: SynicGuest, other: SynicGuest) -> None:
    """Two guests on one switch; each signals by monitor page and is interrupted by event flag."""
    guest.connect()
    with RawNic(guest) as nic, RawNic(other) as peer:
        for each in (nic, peer):
            each.open().handshake()
            each.listen()
        monitor = guest.hyperv.connection.monitor
        assert monitor is not None
        for tag in range(100):  # a frame that the switch finds before it sleeps signals nobody
            before = monitor.state["signals"]
            send(nic, frame(tag))
            assert parse_packet(peer.frames(1)[0]).data == frame(tag)
            send(peer, frame(tag + 100))
            assert parse_packet(nic.frames(1)[0]).data == frame(tag + 100)
            if tag >= 4 and monitor.state["signals"] > before:
                break
            time.sleep(tag * 0.001)
        else:
            pytest.fail("the monitor page never woke the switch")
        assert guest.event_flags(0) == other.event_flags(0) == 1 << 1
        assert eventfd.take(guest.irqfd()[0])
        for each in (nic, peer):
            each.close_channel()


def test_channels_interrupt_the_processor_that_they_are_told_to(host: EmbeddedHost, guest: SynicGuest) -> None:
    guest.connect()
    with RawNic(guest) as nic:
        nic.open().handshake()
        assert (guest.event_flags(0), guest.event_flags(1)) == (1 << 1, 0)
        guest.say(wire.ModifyChannel(child_relid=1, target_vp=1))
        assert guest.hear(wire.ModifyChannelResponse).status == 0
        guest.clear_flags(0)
        eventfd.take(guest.irqfd(0)[0])
        nic.query(0x00010114)
        assert (guest.event_flags(0), guest.event_flags(1)) == (0, 1 << 1)
        assert eventfd.take(guest.irqfd(1)[0])
        assert not eventfd.take(guest.irqfd(0)[0])
        guest.say(wire.ModifyChannel(child_relid=1, target_vp=2))
        assert guest.hear(wire.ModifyChannelResponse).status == wire.STATUS_INVALID_PARAMETER
        nic.close_channel()


def test_a_processor_that_goes_takes_its_flags_page_with_it(guest: SynicGuest) -> None:
    """CPU hot-unplug: from then on nothing is written where the page was; back again, it is."""
    guest.connect()
    with RawNic(guest) as nic:
        nic.open().handshake()
        guest.say(wire.ModifyChannel(child_relid=1, target_vp=1))
        guest.hear(wire.ModifyChannelResponse)
        guest.disable(1)
        guest.clear_flags(1)
        nic.query(0x00010114)
        assert guest.event_flags(1) == 0
        guest.enable(1, events=EVENTS + 7 * PAGE)
        nic.query(0x00010114)
        assert guest.event_flags(1) == 0
        assert guest.event_flags(7) == 1 << 1
        nic.close_channel()


def test_buffers_outlive_a_channel_here_as_well(guest: SynicGuest) -> None:
    guest.connect()
    with RawNic(guest) as nic:
        for _ in range(3):
            nic.open().handshake()
            nic.close_channel()


def test_doorbells_are_kvms(host: EmbeddedHost) -> None:
    """A guest that is not monitored signals by hypercall, which KVM turns into the eventfd that the switch sleeps on."""
    with SynicGuest(host, host.nics["nic"], monitored=False) as guest:
        guest.connect()
        with RawNic(guest) as nic:
            nic.open()
            nic.inband(nvsp.Init(min_version=nvsp.VERSION_6_1, max_version=nvsp.VERSION_6_1), 7, completion=True)
            os.eventfd_write(guest.vm.eventfds[1], 1)
            assert nic.next(11).transaction_id == 7
            assert set(guest.vm.eventfds) == {1}
            nic.close_channel()
            guest.say(wire.OpenChannel(child_relid=77))
            guest.hear(wire.OpenChannelResult)
            assert set(guest.vm.eventfds) == {1}


# Devices that come and go.


def test_devices_come_and_go_while_the_guest_runs(host: EmbeddedHost, guest: SynicGuest) -> None:
    guest.connect()
    guest.heard.clear()
    second = host.nics["second"]
    guest.hyperv.offer(second)
    offer = guest.hear(wire.OfferChannel)
    assert (offer.child_relid, offer.offer.instance_guid) == (2, second.offer.instance_guid)
    with pytest.raises(UsageError, match="has this device already"):
        guest.hyperv.offer(second)
    with pytest.raises(UsageError, match="has a client already"):
        host.attach(second)
    guest.hyperv.rescind(second)
    assert guest.hear(wire.RescindChannelOffer).child_relid == 2
    guest.say(wire.RelidReleased(child_relid=2))
    guest.ping()
    guest.hyperv.offer(second)
    assert guest.hear(wire.OfferChannel).child_relid == 2


def test_a_device_offered_again_at_once_comes_when_the_guest_has_let_go_of_it(host: EmbeddedHost, guest: SynicGuest) -> None:
    guest.connect()
    guest.heard.clear()
    nic = host.nics["nic"]
    with RawNic(guest) as card:
        card.open().handshake()
        guest.hyperv.rescind(nic)
        guest.hyperv.offer(nic)
        with pytest.raises(UsageError, match="already"):
            guest.hyperv.offer(nic)
        guest.hear(wire.RescindChannelOffer)
        for handle in (card.receive_gpadl, card.send_gpadl, card._ring_gpadl):
            guest.unshare(handle)
        assert not any(isinstance(message, wire.OfferChannel) for message in guest.listen())
        guest.say(wire.RelidReleased(child_relid=1))
        assert guest.hear(wire.OfferChannel).offer.instance_guid == nic.offer.instance_guid
    with RawNic(guest) as card:
        card.open().handshake()
        card.close_channel()


def test_offered_again_and_taken_away_again_before_the_guest_has_noticed(host: EmbeddedHost, guest: SynicGuest) -> None:
    guest.connect()
    guest.heard.clear()
    nic = host.nics["nic"]
    guest.hyperv.rescind(nic)
    guest.hyperv.offer(nic)
    guest.hyperv.rescind(nic)
    with pytest.raises(UsageError, match="already"):
        guest.hyperv.rescind(nic)
    guest.hear(wire.RescindChannelOffer)
    guest.say(wire.RelidReleased(child_relid=1))
    assert guest.share((256,)).status == wire.STATUS_UNSUCCESSFUL  # there is no such channel
    assert not any(isinstance(message, wire.OfferChannel) for message in guest.listen())


def test_a_device_that_returns_is_offered_to_a_guest_that_connects_anew_instead(host: EmbeddedHost, guest: SynicGuest) -> None:
    guest.connect()
    guest.hyperv.rescind(host.nics["nic"])
    guest.hyperv.offer(host.nics["nic"])
    guest.heard.clear()
    guest.contact()
    guest.say(wire.RequestOffers())
    guest.hear(wire.AllOffersDelivered)
    assert sum(isinstance(message, wire.OfferChannel) for message in guest.heard) == 1


def test_a_guests_devices_are_free_when_it_has_gone(host: EmbeddedHost) -> None:
    for _ in range(2):
        with SynicGuest(host, host.nics["nic"]) as guest:
            guest.hyperv.offer(host.nics["second"])
            guest.connect()
    with pytest.raises(UsageError, match="no client of host"):
        guest.hyperv.offer(host.nics["nic"])
    host.attach(host.nics["nic"], host.nics["second"]).close()


def test_a_host_that_ends_lets_go_of_its_guests() -> None:
    with nothing_left(objects=False):
        host = EmbeddedHost(poll="interrupt")
        guest = SynicGuest(host, host.add_nic())
        guest.connect()
        nic = RawNic(guest)
        nic.open().handshake()
        host.close()
        assert guest.post(wire.Unload().pack()) != hyperv.STATUS_SUCCESS
        assert guest.signal(1) == hyperv.STATUS_INVALID_CONNECTION_ID
        guest.enable()
        nic.close()
        guest.close()


# The end of a connection.


def test_a_guest_that_breaks_a_rule_loses_its_connection_and_may_begin_anew(guest: SynicGuest, other: SynicGuest) -> None:
    guest.connect()
    with RawNic(guest) as nic:
        nic.open().handshake()
        connection = guest.hyperv.connection
        guest.say(b"\xff" * 64)
        eventually(lambda: connection.failed, "its connection ends")
        assert connection.open_channels == 0
        assert isinstance(connection.errors[-1], ProtocolError)
        for _ in range(3):  # it does not know yet
            guest.say(wire.GpadlTeardown(child_relid=1, gpadl=nic.receive_gpadl))
        other.ping()
    guest.heard.clear()
    guest.connect()
    assert not connection.failed
    guest.ping()


def test_a_second_kernel_begins_anew_in_the_middle_of_anything(guest: SynicGuest) -> None:
    """kexec: its contact is the first thing that is heard of it, from another processor, with other pages."""
    guest.connect()
    with RawNic(guest) as nic:
        nic.open().handshake()
        guest.say(wire.OpenChannel(child_relid=99))  # whose answer nobody will take
        guest.target = 1
        guest.heard.clear()
        assert guest.contact(wire.VERSION_WIN8).version_supported == 1
        assert guest.hyperv.connection.open_channels == 0
        guest.say(wire.RequestOffers())
        guest.hear(wire.AllOffersDelivered)
        guest.ping()


@pytest.mark.parametrize("target", [2, 64, 0xFFFFFFFF])
def test_messages_for_a_processor_that_is_not_there(guest: SynicGuest, target: int) -> None:
    guest.enable()
    message = wire.InitiateContact(
        version_requested=wire.VERSION_WIN10_V5_3, target_vcpu=target, target_info=wire.TargetInfo.of(sint=2)
    )
    guest.say(message.pack())
    connection = guest.hyperv.connection
    eventually(lambda: connection.error_count, "it is noticed")
    assert "there are 2" in str(connection.errors[-1])
    guest.connect().ping()


@pytest.mark.parametrize("page", [64 * MIB, 1 << 40, (1 << 64) - PAGE, MONITOR_PAGES[1] + 8])
def test_a_monitor_page_that_is_nowhere(guest: SynicGuest, page: int) -> None:
    guest.enable()
    message = wire.InitiateContact(
        version_requested=wire.VERSION_WIN10_V5_3,
        target_info=wire.TargetInfo.of(sint=2),
        monitor_page1=MONITOR_PAGES[0],
        monitor_page2=page,
    )
    guest.say(message.pack())
    connection = guest.hyperv.connection
    eventually(lambda: connection.error_count, "it is noticed")
    assert "a monitor page" in str(connection.errors[-1])
    assert connection.monitor is None
    guest.connect().ping()


@pytest.mark.parametrize("what", ["monitor page", "rings"])
def test_memory_in_use_is_left_before_it_is_unmapped(host: EmbeddedHost, guest: SynicGuest, what: str) -> None:
    """The one map of all its memory goes: what the host's kernels look at must have ended before."""
    guest.connect()
    connection = guest.hyperv.connection
    with guest.memory(8) as rings:
        if what == "rings":
            assert guest.open(guest.share(rings.pfns).gpadl, 4) == 0
        host.run(lambda: connection.domain.unmap(0, guest.ram.size))
        assert connection.failed
        assert connection.monitor is None
        assert connection.open_channels == 0
        assert ("GPADL" if what == "rings" else "the monitor page") in str(connection.errors[-1])


def test_a_guest_without_monitor_pages_is_not_watched(guest: SynicGuest) -> None:
    guest.enable()
    assert guest.contact(monitor_page1=0, monitor_page2=0).connection_state == wire.CONNECTION_SUCCESSFUL
    assert guest.hyperv.connection.monitor is None
    assert guest.contact(monitor_page1=MONITOR_PAGES[0], monitor_page2=0).connection_state == wire.CONNECTION_FAILED_UNKNOWN


@pytest.mark.parametrize("unloads", [True, False], ids=["unload", "no word"])
def test_nothing_of_a_guests_memory_is_written_once_its_driver_is_gone(
    host: EmbeddedHost, guest: SynicGuest, other: SynicGuest, unloads: bool
) -> None:
    """As rmmod hv_vmbus frees it all: rings, buffers, monitor pages, and the SynIC's pages when they are switched off.

    Linux 6.12 does so without UNLOAD, once its drivers have closed their channels (vmbus_exit sets the state that
    vmbus_initiate_unload looks at).
    """
    guest.connect()
    nic, peer = RawNic(guest), RawNic(other)
    for each in (nic, peer):
        each.open().handshake()
        each.listen()
    send(nic, frame(1))
    peer.frames(1)
    if unloads:
        guest.say(wire.Unload())
        guest.hear(wire.UnloadResponse)
    else:
        nic.close_channel()
        guest.unshare(nic.receive_gpadl)
        guest.unshare(nic.send_gpadl)
    guest.say(wire.RelidReleased(child_relid=1))
    for vp in (0, 1):
        guest.disable(vp)
    size = guest.ram.size - PAGE
    guest.ram.write(INPUT + PAGE, b"\xa5" * (1 << 20))
    guest.ram.write(MONITOR_PAGES[1], b"\xff" * PAGE)  # the page is another's now
    before = guest.ram.read(0, size)
    for tag in range(5):
        send(peer, frame(tag))
    host.set_link(host.nics["nic"], False)
    host.set_link(host.nics["nic"], True)
    guest.hyperv.offer(host.nics["second"])
    guest.hyperv.rescind(host.nics["second"])
    for _ in range(20):
        other.ping()
    assert guest.ram.read(0, size) == before
    nic.close()
    peer.close_channel()
    peer.close()
