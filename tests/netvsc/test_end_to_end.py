"""Driver and embedded host together: versions, MTUs, objects, links, filters, checksums, and frames of all sizes both ways."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.dataplane.checksums import ipv4_filled, l4_filled, made
from tests.netvsc.pair import PATIENCE, SMALL, End, Pair, pair
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.drivers.netvsc.state import GOOD_IP_CHECKSUM, GOOD_L4_CHECKSUM
from vfio_vmbus.errors import RefusedError, RescindedError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.kernel import INTERPRETED
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire import ndis, nvsp, oid

BROADCAST = b"\xff" * 6
GROUP = bytes.fromhex("01005e000001")
CYCLES = 25 if INTERPRETED else 100


@pytest.fixture(scope="module")
def both() -> Iterator[Pair]:
    with pair() as made:
        yield made


def passes(pair: Pair, size: int = 60) -> None:
    """A frame gets through each way."""
    for source, target, back in ((pair.left, pair.right, False), (pair.right, pair.left, True)):
        source.send([pair.frame(size, back=back)])
        assert target.receive(1) == [(pair.frame(size, back=back), 0)]


def eventually(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


# Versions and MTUs.


@pytest.mark.parametrize("version", nvsp.SUPPORTED_VERSIONS, ids=nvsp.version_text)
@pytest.mark.parametrize("older", ["host", "driver"])
def test_every_version(version: int, older: str) -> None:
    """Either side knows nothing newer."""
    versions = tuple(known for known in nvsp.SUPPORTED_VERSIONS if known <= version)
    card, options = ({"versions": versions}, {}) if older == "host" else ({}, {"max_version": version})
    with pair(card=card, **options) as made:
        assert made.left.nic.info.nvsp == nvsp.version_text(version)
        assert made.left.card.version == version
        passes(made)


def test_no_version_in_common() -> None:
    with EmbeddedHost() as host:
        card = host.add_nic("card", versions=(nvsp.VERSION_6_1,))
        with open_device(host.attach(card)) as device:
            with pytest.raises(RefusedError, match="no NVSP version"):
                Netvsc(device, max_version=nvsp.VERSION_6, **SMALL)
            with Netvsc(device, **SMALL) as nic:  # the same device again, and the card is as new
                assert nic.info.nvsp == "6.1"


@pytest.mark.parametrize("mtu", [68, 576, 1500, 1501, 4096, 9000])
def test_every_mtu(mtu: int) -> None:
    """Frames up to the MTU and a VLAN tag pass, longer ones the driver does not send."""
    with pair(mtu=mtu) as made:
        assert made.left.nic.info.mtu == mtu
        for size in (14, mtu + 13, mtu + 14, mtu + 18):
            passes(made, size)
        made.left.send([made.frame(mtu + 19)])
        assert made.left.nic.counters().tx_too_long == 1
        passes(made)


def test_cards_of_different_mtu() -> None:
    """What is too long for the one that it is for is lost on the way, and counted there."""
    with EmbeddedHost() as host:
        cards = [host.add_nic(name) for name in ("long", "short")]
        with (
            open_device(host.attach(cards[0])) as first,
            open_device(host.attach(cards[1])) as second,
            Netvsc(first, mtu=9000, **SMALL) as long,
            Netvsc(second, mtu=1500, **SMALL) as short,
        ):
            made = Pair(host, End(cards[0], first, long), End(cards[1], second, short))
            passes(made, 1514)
            made.left.send([made.frame(1519), made.frame(9014)])
            eventually(lambda: cards[1].counter("filtered") == 2, "frames too long for it")
            made.right.nothing_comes(host)
            passes(made, 1514)


def test_an_mtu_beyond_the_cards() -> None:
    """The host says what it takes, when it is asked, and goes on; our driver was told what to do, and gives up."""
    with EmbeddedHost() as host:
        card = host.add_nic("card", max_mtu=1500)
        function = host.attach(card)
        with open_device(function) as device:
            with pytest.raises(RefusedError, match="MTU 9000: this card takes 1500 bytes at most"):
                Netvsc(device, mtu=9000, **SMALL)
            assert not host.connection(function).errors
            with Netvsc(device, mtu=1500, **SMALL) as nic:
                assert nic.info.link


# Objects.

SIZES = {
    oid.OID_802_3_PERMANENT_ADDRESS: 6,
    oid.OID_802_3_CURRENT_ADDRESS: 6,
    oid.OID_GEN_VENDOR_DESCRIPTION: None,
    oid.OID_GEN_SUPPORTED_LIST: None,
    oid.OID_802_3_MULTICAST_LIST: None,
    oid.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES: ndis.Offload.SIZE,
    oid.OID_GEN_RECEIVE_SCALE_CAPABILITIES: ndis.RssCapabilities.SIZE,
}
"""Bytes of an object's value; all others have 4."""


def test_every_object(both: Pair) -> None:
    """All that the card says it has, and they say of the card what is so."""
    nic, card = both.left.nic, both.left.card
    data = nic.query(oid.OID_GEN_SUPPORTED_LIST)
    known = struct.unpack(f"<{len(data) // 4}I", data)
    assert set(SIZES) <= set(known)
    values = {number: nic.query(number) for number in known}
    for number, value in values.items():
        size = SIZES.get(number, 4)
        assert size is None or len(value) == size, hex(number)

    def number(which: int) -> int:
        return int.from_bytes(nic.query(which), "little")

    assert values[oid.OID_802_3_PERMANENT_ADDRESS] == values[oid.OID_802_3_CURRENT_ADDRESS] == card.mac == nic.mac
    assert number(oid.OID_GEN_LINK_SPEED) * 100 == card.bits_per_second == nic.info.bits_per_second
    assert (number(oid.OID_GEN_MAXIMUM_FRAME_SIZE), number(oid.OID_GEN_MAXIMUM_TOTAL_SIZE)) == (9000, 9014)
    assert number(oid.OID_GEN_MEDIA_CONNECT_STATUS) == oid.MEDIA_STATE_CONNECTED
    assert number(oid.OID_GEN_XMIT_OK) == card.counter("sent_frames")
    assert number(oid.OID_GEN_RCV_OK) == card.counter("received_frames")
    assert values[oid.OID_GEN_VENDOR_DESCRIPTION].endswith(b"\0")
    offload = ndis.parse_offload(values[oid.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES]).checksum
    assert (offload.ipv4_tx.tcp, offload.ipv4_tx.udp, offload.ipv6_tx.tcp, offload.ipv4_rx.ip) == (1, 1, 1, 1)


@pytest.mark.parametrize("number", [0, oid.OID_GEN_FRIENDLY_NAME, 0xFFFFFFFF])
def test_an_object_that_the_card_has_not(both: Pair, number: int) -> None:
    for ask in (lambda: both.left.nic.query(number), lambda: both.left.nic.set(number, bytes(4))):
        with pytest.raises(RefusedError) as caught:
            ask()
        assert caught.value.status == oid.STATUS_NOT_SUPPORTED
    passes(both)


@pytest.mark.parametrize(
    ("number", "value", "status"),
    [
        (oid.OID_GEN_CURRENT_PACKET_FILTER, b"", oid.STATUS_INVALID_LENGTH),
        (oid.OID_GEN_CURRENT_PACKET_FILTER, bytes(3), oid.STATUS_INVALID_LENGTH),
        (oid.OID_802_3_MULTICAST_LIST, bytes(7), oid.STATUS_INVALID_LENGTH),
        (oid.OID_802_3_MULTICAST_LIST, bytes(6 * 33), oid.STATUS_MULTICAST_FULL),
        (oid.OID_GEN_LINK_SPEED, bytes(4), oid.STATUS_NOT_SUPPORTED),
    ],
)
def test_values_that_the_card_does_not_take(both: Pair, number: int, value: bytes, status: int) -> None:
    with pytest.raises(RefusedError) as caught:
        both.left.nic.set(number, value)
    assert caught.value.status == status
    passes(both)


def test_values_that_the_card_takes(both: Pair) -> None:
    nic = both.left.nic
    groups = b"".join(bytes([1, 0, 0x5E, 0, 0, index]) for index in range(32))
    nic.set(oid.OID_802_3_MULTICAST_LIST, groups)
    assert nic.query(oid.OID_802_3_MULTICAST_LIST) == groups
    nic.set(oid.OID_802_3_MULTICAST_LIST, b"")
    assert nic.query(oid.OID_802_3_MULTICAST_LIST) == b""
    nic.set_filter(0x21)
    assert nic.query(oid.OID_GEN_CURRENT_PACKET_FILTER, 4) == struct.pack("<I", 0x21)
    nic.set_filter(oid.PACKET_TYPE_DIRECTED | oid.PACKET_TYPE_BROADCAST)
    passes(both)


# Link and filter.


def link_becomes(end: End, up: bool) -> None:
    def seen() -> bool:
        end.nic.queue.wait(0.05)
        assert end.received() == []
        end.nic.poll()
        return end.nic.link == up

    eventually(seen, f"link {'up' if up else 'down'}")


def test_the_virtual_cable(both: Pair) -> None:
    """Out: both ends are told or can ask, and nothing passes. In again: as before."""
    both.host.set_link(both.left.card, False)
    link_becomes(both.left, False)
    assert both.right.nic.link
    assert both.left.nic.query(oid.OID_GEN_MEDIA_CONNECT_STATUS, 4) == struct.pack("<I", oid.MEDIA_STATE_DISCONNECTED)
    lost = both.left.card.counter("unplugged")
    both.left.send([both.frame()] * 3)
    both.right.send([both.frame(back=True)])
    eventually(lambda: both.left.card.counter("unplugged") == lost + 3, "frames into the void")
    both.left.nothing_comes(both.host)
    both.right.nothing_comes(both.host)
    both.host.set_link(both.left.card, True)
    link_becomes(both.left, True)
    passes(both)


def test_a_cable_that_rattles(both: Pair) -> None:
    for _ in range(7):
        both.host.set_link(both.left.card, False)
        both.host.set_link(both.left.card, True)
    both.host.set_link(both.left.card, False)
    link_becomes(both.left, False)
    both.host.set_link(both.left.card, True)
    link_becomes(both.left, True)
    passes(both)


def test_a_driver_that_comes_while_the_cable_is_out() -> None:
    with EmbeddedHost() as host:
        card = host.add_nic("card")
        host.set_link(card, False)
        with open_device(host.attach(card)) as device, Netvsc(device, **SMALL) as nic:
            assert not nic.info.link
            host.set_link(card, True)
            link_becomes(End(card, device, nic), True)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (0, ""),
        (oid.PACKET_TYPE_DIRECTED, "d"),
        (oid.PACKET_TYPE_BROADCAST, "b"),
        (oid.PACKET_TYPE_ALL_MULTICAST, "g"),
        (oid.PACKET_TYPE_DIRECTED | oid.PACKET_TYPE_BROADCAST, "db"),
        (oid.PACKET_TYPE_PROMISCUOUS, "dbgo"),
    ],
)
def test_the_packet_filter(both: Pair, filters: int, expected: str) -> None:
    """d: for the card, b: for all, g: for a group, o: for others (whom the switch does not know, so that it floods)."""
    targets = {"d": both.right.nic.mac, "b": BROADCAST, "g": GROUP, "o": bytes.fromhex("00155dffffff")}
    both.right.nic.set_filter(filters)
    wanted = [both.frame(target=target, fill=ord(name)) for name, target in targets.items() if name in expected]
    both.left.send([both.frame(target=target, fill=ord(name)) for name, target in targets.items()])
    assert [data for data, _ in both.right.receive(len(wanted))] == wanted
    both.right.nothing_comes(both.host)
    both.right.nic.set_filter(oid.PACKET_TYPE_DIRECTED | oid.PACKET_TYPE_BROADCAST)
    passes(both)


# Checksums.


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("size", [0, 1, 501, 1400])
def test_checksums_for_the_host_to_compute(both: Pair, ipv6: bool, udp: bool, size: int) -> None:
    """They arrive right, and as known to be; a frame without the wish arrives as it was."""
    payload = bytes(index % 256 for index in range(size))
    body = made(ipv6, udp, None, 0, payload, 0, size).frame[12:]
    frame = both.right.nic.mac + both.left.nic.mac + body
    wish = both.left.nic.checksum_wish(ipv6=ipv6, udp=udp, l4_offset=54 if ipv6 else 34)
    both.left.send([frame], wish)
    filled = l4_filled(frame if ipv6 else ipv4_filled(frame) or b"")
    assert both.right.receive(1) == [(filled, GOOD_L4_CHECKSUM if ipv6 else GOOD_L4_CHECKSUM | GOOD_IP_CHECKSUM)]
    both.left.send([frame])
    assert both.right.receive(1) == [(frame, 0)]


def test_a_wish_for_what_is_no_packet(both: Pair) -> None:
    """The frame arrives as it was, and nothing is said of its checksums."""
    both.left.send([both.frame(100)], both.left.nic.checksum_wish())
    assert both.right.receive(1) == [(both.frame(100), 0)]


# Frames.


def exchange(made: Pair, sizes: list[int], seed: int) -> None:
    """Random frames of these sizes both ways at once, as many under way as the buffers hold; all arrive, in order and unchanged."""
    source = random.Random(seed)
    ways = []
    for end, other in ((made.left, made.right), (made.right, made.left)):
        head = other.nic.mac + end.nic.mac
        ways.append((end, other, [(head + source.randbytes(size))[:size] for size in sizes]))
    got: list[list[bytes]] = [[], []]
    step = 24
    for start in range(0, len(sizes), step):
        for end, _, frames in ways:
            end.send(frames[start : start + step])
        for index, (_, other, frames) in enumerate(ways):
            wanted = frames[start : start + step]
            got[index] += [data for data, _ in other.receive(len(wanted))]
    for index, (_, _, frames) in enumerate(ways):
        assert got[index] == frames


@pytest.mark.parametrize("poll", ["busy", "adaptive", "interrupt"])
def test_frames_of_all_sizes(poll: str) -> None:
    """And every counter on the way tells the same."""
    sizes = list(range(14, 1515, 7 if INTERPRETED else 1))
    random.Random(3).shuffle(sizes)
    with pair(poll=poll) as made:
        exchange(made, sizes, seed=1)
        with made.host.switch.worker.paused():
            pass  # the last burst is counted, too
        total = sum(sizes)
        for end in (made.left, made.right):
            counters = end.nic.counters()
            assert (counters.tx_frames, counters.tx_bytes) == (len(sizes), total)
            assert (counters.rx_frames, counters.rx_bytes) == (len(sizes), total)
            assert counters.tx_failed == counters.rx_bad_ranges == counters.rx_bad_messages == counters.bad_completions == 0
            card = end.card
            assert (card.counter("sent_frames"), card.counter("sent_bytes")) == (len(sizes), total)
            assert (card.counter("received_frames"), card.counter("received_bytes")) == (len(sizes), total)
            assert all(card.counter(name) == 0 for name in ("no_buffer", "bad_messages", "bad_sections", "faults", "filtered"))
            assert card.port is not None
            port = card.port.counters()
            assert (port.rx_frames, port.rx_bytes, port.tx_frames, port.tx_bytes) == (len(sizes), total, len(sizes), total)
            assert port.dropped == 0


def test_long_frames_of_all_sizes() -> None:
    """Up to MTU 9000: through sections, through pages, and on the edge between them."""
    step = 131 if INTERPRETED else 13
    sizes = [*range(14, 9015, step), *range(6070, 6110), *range(4030, 4060), *range(8140, 8160), 9014]
    random.Random(4).shuffle(sizes)
    with pair(mtu=9000) as made:
        exchange(made, sizes, seed=2)


def test_small_frames_share_sections(both: Pair) -> None:
    """54 frames of 60 bytes fill one, and cost the ring one packet."""
    sent = both.left.nic.queue.channel.outgoing.statistics().packets
    frames = [both.frame(60, fill=index) for index in range(54)]
    both.left.send(frames)
    assert both.left.nic.queue.channel.outgoing.statistics().packets == sent + 1
    assert [data for data, _ in both.right.receive(len(frames))] == frames


def test_waiting_sleeps_until_the_host_signals(both: Pair) -> None:
    assert not both.right.nic.queue.wait(0.01)
    both.left.send([both.frame()])
    assert both.right.nic.queue.wait(PATIENCE)
    assert both.right.receive(1) == [(both.frame(), 0)]


def test_a_receiver_that_does_not_read() -> None:
    """Frames beyond its sections are lost and counted; then it goes on where it was."""
    with pair(ring_pages=64, receive_buffer=40 * 1792) as made:
        sections = made.right.nic.info.receive_sections
        made.right.received()  # gives back the section of the last answer
        eventually(lambda: made.right.card.counter("free_count") == sections, "all sections free")
        for index in range(sections + 20):
            made.left.send([made.frame(fill=index)])
            made.left.received()
        eventually(lambda: made.right.card.counter("no_buffer") == 20, "frames without a section")
        assert [data[20] for data, _ in made.right.receive(sections)] == list(range(sections))
        made.right.nothing_comes(made.host)
        eventually(lambda: made.right.card.counter("free_count") == sections, "all sections free again")
        passes(made)
        assert made.right.card.port is not None
        assert made.right.card.port.counters().no_room == 20


# Coming and going.


def test_many_times_in_and_out() -> None:
    """The device each time anew, with frames passing, and nothing is left behind."""
    with EmbeddedHost() as host:
        cards = [host.add_nic(name) for name in ("stays", "goes")]
        with open_device(host.attach(cards[0])) as first, Netvsc(first, **SMALL) as stays:
            left = End(cards[0], first, stays)

            def cycle() -> None:
                with open_device(host.attach(cards[1])) as device, Netvsc(device, **SMALL) as nic:
                    passes(Pair(host, left, End(cards[1], device, nic)))

            cycle()
            with nothing_left():
                for _ in range(CYCLES):
                    cycle()
            assert cards[1].counter("sent_frames") == cards[1].counter("received_frames") == CYCLES + 1


def test_many_drivers_on_one_device() -> None:
    """The driver each time anew, on a device that stays open."""
    with EmbeddedHost() as host:
        card = host.add_nic("card")
        with open_device(host.attach(card)) as device:

            def cycle(mtu: int) -> None:
                with Netvsc(device, mtu=mtu, **SMALL) as nic:
                    assert nic.info.mtu == mtu

            cycle(1500)
            with nothing_left():
                for index in range(CYCLES // 4):
                    cycle(1500 + index)


def test_one_client_at_a_time(both: Pair) -> None:
    with pytest.raises(UsageError, match="has a client already"):
        both.host.attach(both.left.card)
    passes(both)


def test_a_driver_that_just_goes() -> None:
    """It closes nothing of its own; the host lets go of everything all the same."""
    with EmbeddedHost() as host:
        card = host.add_nic("card")

        def cycle() -> None:
            with open_device(host.attach(card)) as device:
                nic = Netvsc(device, **SMALL)
                End(card, device, nic).send([BROADCAST + nic.mac + bytes(48)] * 5)
            assert card.port is None
            nic.close()

        cycle()
        with nothing_left():
            for _ in range(3):
                cycle()


def test_a_device_that_is_taken_away(both: Pair) -> None:
    """Its driver hears of it whatever it does; the others stay."""
    card = both.host.add_nic("goes")
    with open_device(both.host.attach(card)) as device:
        nic = Netvsc(device, **SMALL)
        nic.check()
        both.host.rescind(card)
        eventually(lambda: device.rescinded, "the rescind")
        nic.queue.channel.incoming.mapping.blank()  # as where the kernel takes the rings away
        for call in (nic.check, lambda: nic.query(oid.OID_GEN_LINK_SPEED), nic.poll, nic.queue.rx_burst):
            with pytest.raises(RescindedError, match="taken away by its host"):
                call()
        nic.close()
    passes(both)
