"""The card against a driver that does what DPDK's netvsc PMD does over uio_hv_generic, item by item: one queue, raw packets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.host.raw_client import RawClient
from tests.host.raw_nic import RawNic
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.netvsp.vsp import Netvsp
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import MSIX_IRQ
from vfio_vmbus.wire import ndis, nvsp, oid, rndis
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.frame import PPI_CHECKSUM, PPI_HASH, PPI_VLAN, Frame, PacketInfo, Vlan, encode_packet, parse_packet
from vfio_vmbus.wire.gpa import PageRange
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND, Packet

OTHER = bytes.fromhex("02000000beef")


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("prey", allow_spoofing=True)
        host.add_nic("other", allow_spoofing=True)
        yield host


@pytest.fixture
def card(host: EmbeddedHost) -> Netvsp:
    return host.nics["prey"]


@pytest.fixture
def nic(host: EmbeddedHost, card: Netvsp) -> Iterator[RawNic]:
    with nothing_left(objects=False), RawClient(host.attach(card)) as client, RawNic(client.connect()) as nic:
        yield nic
        client.device.reset()


@pytest.fixture
def peer(host: EmbeddedHost) -> Iterator[RawNic]:
    """Another card on the switch, with its driver, that hears everything."""
    with RawClient(host.attach(host.nics["other"])) as client, RawNic(client.connect()) as peer:
        peer.open().handshake()
        peer.listen()
        yield peer
        client.device.reset()


def frame(tag: int, size: int = 100) -> bytes:
    return b"\xff" * 6 + OTHER + b"\x88\xb5" + bytes([tag]) * (size - 14)


def send_in_section(nic: RawNic, messages: bytes, *, section: int = 0, transaction: int = 5) -> None:
    nic.send.mapping.write(section * nic.send_section, messages)
    announce = nvsp.SendRndisPacket(channel_type=nvsp.CHANNEL_DATA, section_index=section, section_size=len(messages))
    nic.inband(announce, transaction, completion=True)


# Opening, closing, opening again.


def test_buffers_shared_before_the_channel_opens_serve_every_opening(
    host: EmbeddedHost, nic: RawNic, card: Netvsp, peer: RawNic
) -> None:
    """CLOSECHANNEL is all the good-bye that comes: version, buffers, filter and RNDIS start anew, the GPADLs are the same."""
    connection = host.connection(nic.client.device)  # type: ignore[arg-type]
    for turn, version in enumerate((nvsp.VERSION_6_1, nvsp.VERSION_5, nvsp.VERSION_6_1)):
        assert card.version is None
        nic.open().handshake(version, mtu=(1514, 9014, 1514)[turn])
        assert card.version == version
        assert nic.query(oid.OID_GEN_CURRENT_PACKET_FILTER) == (0, bytes(4))
        nic.listen()
        send_in_section(peer, encode_packet(Frame(frame(turn))))
        peer.completed(5)
        assert parse_packet(nic.frames(1)[0]).data == frame(turn)
        send_in_section(nic, encode_packet(Frame(frame(turn + 100))))
        nic.completed(5)
        assert parse_packet(peer.frames(1)[0]).data == frame(turn + 100)
        nic.close_channel()
        assert connection.open_channels == 0
        assert card.port is None
    nic.client.unshare(nic.receive_gpadl)
    nic.client.unshare(nic.send_gpadl)


def test_closed_in_the_middle_with_frames_on_their_way(nic: RawNic, peer: RawNic) -> None:
    """Transfers that the driver never completed are forgotten: all sections are free at the next opening."""
    nic.open().handshake()
    nic.listen()
    for turn in range(nic.sections + 8):
        send_in_section(peer, encode_packet(Frame(frame(turn & 0xFF))))
        peer.completed(5)
    nic.close_channel()
    nic.open().handshake()
    nic.listen()
    for turn in range(3):
        send_in_section(peer, encode_packet(Frame(frame(turn))))
        peer.completed(5)
    assert [parse_packet(data).data for data in nic.frames(3)] == [frame(turn) for turn in range(3)]


def test_a_buffer_may_go_while_the_channel_is_closed(nic: RawNic) -> None:
    nic.open().handshake()
    nic.close_channel()
    nic.client.unshare(nic.receive_gpadl)
    nic.receive_gpadl = nic.client.share(nic.receive.pfns).gpadl
    assert nic.open().handshake().status == 0
    nic.close_channel()


# Packets.


@pytest.mark.parametrize("transaction", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_completions_are_whole_messages_and_echo_all_64_bits(nic: RawNic, transaction: int) -> None:
    nic.open().handshake()
    send_in_section(nic, encode_packet(Frame(frame(1))), transaction=transaction)
    nic.completed(transaction)
    nic.say(rndis.encode_message(rndis.KeepaliveRequest(request_id=9)), transaction)
    assert isinstance(nic.hear()[0], rndis.KeepaliveComplete)
    nic.ask(nvsp.SubchannelRequest(count=1), nvsp.SubchannelComplete, transaction)


def test_a_section_holds_eight_messages_with_all_that_dpdk_says_of_each(nic: RawNic, peer: RawNic) -> None:
    """Hash value on each; checksum and VLAN with offloads. Aligned as we asked for."""
    promised = nic.open().handshake()
    assert promised.max_packets_per_message >= 8
    assert promised.max_transfer_size == 0x4000
    align = 1 << promised.alignment_shift
    assert align == 8
    tag = PacketInfo(PPI_VLAN, int(Vlan.of(vlan_id=5, priority=3)).to_bytes(4, "little"))
    hashed = PacketInfo(PPI_HASH, (7).to_bytes(4, "little"))
    checksum = PacketInfo(PPI_CHECKSUM, bytes(4))
    some = [(hashed,), (hashed, checksum), (hashed, tag), (hashed, tag, checksum)] * 2
    messages = [encode_packet(Frame(frame(index, 60 + index), infos), align=align) for index, infos in enumerate(some)]
    assert all(len(message) % align == 0 for message in messages)
    send_in_section(nic, b"".join(messages), section=nic.send.size // nic.send_section - 1, transaction=1 << 40)
    nic.completed(1 << 40)
    got = [parse_packet(data) for data in peer.frames(8)]
    for index, (infos, seen) in enumerate(zip(some, got, strict=True)):
        sent = frame(index, 60 + index)
        tagged = sent[:12] + bytes.fromhex("81006005") + sent[12:]
        assert seen.data == (tagged if tag in infos else sent)


@pytest.mark.parametrize("size", [1500, 4000, 9000])
def test_longer_frames_come_gpa_direct_a_range_a_page(nic: RawNic, peer: RawNic, size: int) -> None:
    """A frame's segments lie anywhere: a range each, none over the end of its page; the RNDIS header has one of its own."""
    for each in (peer, nic):
        if each is peer:
            each.close_channel()
        each.open().handshake(mtu=9014)
    peer.listen()
    data = frame(3, size)
    message = encode_packet(Frame(data, (PacketInfo(PPI_HASH, bytes(4)),)))
    cuts = [0, len(message) - size, *range(len(message) - size + 1400, len(message), 1400), len(message)]
    ranges = []
    for place, (begin, end) in enumerate(pairwise(cuts)):
        offset = (17 * place) % (PAGE - 1400)
        nic.pages.mapping.write(2 * place * PAGE + offset, message[begin:end])  # every other page, so that no two are neighbours
        ranges.append(PageRange(end - begin, offset, (nic.pages.pfns[2 * place],)))
    payload = nvsp.encode_message(nvsp.SendRndisPacket(channel_type=nvsp.CHANNEL_DATA))
    nic.post(
        Packet(packet_type=PACKET_GPA_DIRECT, transaction_id=77, completion_requested=True, pages=tuple(ranges), payload=payload)
    )
    nic.completed(77)
    assert parse_packet(peer.frames(1)[0]).data == data


# RNDIS.


def test_the_filter_is_cleared_right_after_initialize(nic: RawNic) -> None:
    nic.open().handshake()
    assert nic.set(oid.OID_GEN_CURRENT_PACKET_FILTER, bytes(4)) == oid.STATUS_SUCCESS
    assert nic.query(oid.OID_GEN_CURRENT_PACKET_FILTER) == (oid.STATUS_SUCCESS, bytes(4))


def test_receive_scaling_is_asked_for_with_18_bytes(nic: RawNic) -> None:
    nic.open().handshake()
    asked = ndis.RssCapabilities().pack()
    assert len(asked) == 18
    status, value = nic.query(oid.OID_GEN_RECEIVE_SCALE_CAPABILITIES, asked)
    assert (status, len(value)) == (oid.STATUS_SUCCESS, 18)
    said = ndis.RssCapabilities.unpack(value)
    assert (said.header.object_type, said.header.size, said.queue_count) == (ndis.OBJECT_RSS_CAPABILITIES, 18, 1)
    assert said.table_entries == 128  # DPDK has no more queues than this table has entries
    assert nic.query(oid.OID_GEN_RECEIVE_SCALE_CAPABILITIES, asked + bytes(2))[1] == value
    assert nic.query(oid.OID_GEN_RECEIVE_SCALE_CAPABILITIES, asked[:17]) == (oid.STATUS_BUFFER_TOO_SHORT, b"")


@pytest.mark.parametrize(("size", "revision"), [(156, 3), (155, 2), (144, 2), (143, 1), (112, 1)])
def test_offloads_in_the_form_that_was_asked_for(nic: RawNic, size: int, revision: int) -> None:
    nic.open().handshake()
    asked = ndis.ObjectHeader(object_type=ndis.OBJECT_OFFLOAD, revision=revision, size=size).pack().ljust(size, b"\0")
    status, value = nic.query(0xFC01020D, asked)
    said = ndis.parse_offload(value)
    assert (status, said.header.revision) == (oid.STATUS_SUCCESS, revision)
    assert said.header.size == len(value) <= size
    assert said.checksum.ipv4_tx.tcp == 1


def test_no_answer_is_longer_than_the_buffer_it_was_asked_with(nic: RawNic) -> None:
    nic.open().handshake()
    assert nic.query(0xFC01020D, bytes(111)) == (oid.STATUS_BUFFER_TOO_SHORT, b"")
    assert nic.query(oid.OID_802_3_PERMANENT_ADDRESS, bytes(5)) == (oid.STATUS_BUFFER_TOO_SHORT, b"")
    for room in (b"", bytes(6), bytes(40)):  # Linux and DPDK ask for the address with no buffer at all
        assert len(nic.query(oid.OID_802_3_PERMANENT_ADDRESS, room)[1]) == 6
    assert nic.query(0x12345678, bytes(4)) == (oid.STATUS_NOT_SUPPORTED, b"")


def test_changes_of_the_link_are_indicated(host: EmbeddedHost, nic: RawNic, card: Netvsp) -> None:
    nic.open().handshake()
    for up, status in ((False, 0x4001000C), (True, 0x4001000B)):
        host.set_link(card, up)
        indicated, _ = nic.hear()
        assert isinstance(indicated, rndis.IndicateStatus)
        assert indicated.status == status
        assert nic.query(oid.OID_GEN_MEDIA_CONNECT_STATUS) == (0, (0 if up else 1).to_bytes(4, "little"))


def test_a_driver_that_polls_masks_its_interrupts_for_good(nic: RawNic) -> None:
    """interrupt_mask of its own ring says so, and the card signals not once; what it sends is seen all the same."""
    interrupt = eventfd.make()
    nic.client.device.irq(MSIX_IRQ).enable(1, interrupt)
    nic.open().handshake()
    assert eventfd.take(interrupt)
    assert nic.pair is not None
    nic.pair.incoming.mask()
    for turn in range(20):
        send_in_section(nic, encode_packet(Frame(frame(turn))))
        nic.completed(5)
    assert not eventfd.take(interrupt)
    os.close(interrupt)


def test_subchannels_are_refused_in_the_answer(nic: RawNic) -> None:
    """Capabilities promise one queue, so none is granted; the driver goes on with one."""
    nic.open().handshake()
    nic.client.listen().clear()
    granted = nic.ask(nvsp.SubchannelRequest(operation=nvsp.SUBCHANNEL_ALLOCATE, count=3), nvsp.SubchannelComplete)
    assert granted.count == 0
    nic.client.ping()
    assert wire.OfferChannel not in {type(message) for message in nic.client.listen()}


def test_packets_that_want_no_completion_get_none(nic: RawNic) -> None:
    nic.open().handshake()
    nic.send.mapping.write(0, encode_packet(Frame(frame(1))))
    nic.inband(nvsp.SendRndisPacket(section_index=0, section_size=len(encode_packet(Frame(frame(1))))), 3)
    send_in_section(nic, encode_packet(Frame(frame(2))), transaction=4)
    nic.completed(4)
    assert [packet for packet in nic.packets if packet.packet_type in (PACKET_COMPLETION, PACKET_INBAND)] == []
