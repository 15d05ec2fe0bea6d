"""A host that lies: the driver counts or raises a typed error, keeps to its own memory, never hangs, and goes on where it can."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.netvsc.driven import RECEIVE_SECTIONS, SEND_SECTIONS, SMALL, Driven, driven
from vfio_vmbus.drivers.netvsc.driver import POOL_SLOTS, Netvsc
from vfio_vmbus.drivers.netvsc.state import MAIL_SLOTS
from vfio_vmbus.errors import (
    ClosedError,
    PeerError,
    ProtocolError,
    RefusedError,
    RingError,
    UsageError,
    VfioVmbusError,
    WaitTimeout,
)
from vfio_vmbus.ring.primitives import READ_INDEX, WRITE_INDEX
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.testing.scripted import MAC, RECEIVE_SECTION, SEND_SECTION, ScriptedDevice, ScriptedHost
from vfio_vmbus.wire import ndis, nvsp, oid, rndis
from vfio_vmbus.wire.frame import Frame, encode_packet
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_INBAND
from vfio_vmbus.wire.rndis import PacketMessage

SIZE = RECEIVE_SECTIONS * RECEIVE_SECTION
FRAME = Frame(b"\5" * 60)


def still_works(rig: Driven) -> None:
    """Frames pass both ways."""
    rig.host.frames.clear()
    while rig.received():
        pass
    assert rig.host.deliver([FRAME])
    assert [data for data, _ in rig.received()] == [FRAME.data]
    assert rig.send([(FRAME.data, 0)]) == 1
    rig.host.turn()
    assert rig.host.frames == [FRAME]


def hit(rig: Driven, what: str) -> int:
    """How much a counter grows while the driver takes in what there is."""
    before = getattr(rig.nic.counters(), what)
    assert rig.received() == []
    return getattr(rig.nic.counters(), what) - before


# Announcements.


@pytest.mark.parametrize(
    "where",
    [(60, SIZE), (60, SIZE - 59), (SIZE + 1, 0), (0xFFFFFFFF, 0), (60, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (8, SIZE - 4)],
)
def test_ranges_outside_of_the_receive_buffer(where: tuple[int, int]) -> None:
    with driven() as rig:
        rig.host.transfer([where], transaction=5)
        assert hit(rig, "rx_bad_ranges") == 1
        still_works(rig)
        assert 5 in rig.host.completed  # the host gets its section back all the same


@pytest.mark.parametrize("forged", [{"count": 0}, {"count": 2}, {"count": 0xFFFFFFFF}, {"pageset": 0}, {"pageset": 0xCAFF}])
def test_transfers_that_lie_about_their_ranges(forged: dict[str, int]) -> None:
    with driven() as rig:
        rig.host.transfer([rig.host.place(encode_packet(FRAME))], **forged)
        assert hit(rig, "rx_bad_ranges") == 1
        still_works(rig)


@pytest.mark.parametrize("offset8", [2, 3])
def test_a_transfer_whose_list_is_payload(offset8: int) -> None:
    with driven() as rig:
        rig.host.transfer([rig.host.place(encode_packet(FRAME))], offset8=offset8)
        assert hit(rig, "rx_bad_ranges") == 1
        still_works(rig)


def test_a_transfer_without_a_list() -> None:
    with driven() as rig:
        rig.host.transfer([], length8=2, offset8=2)
        rig.received()
        with pytest.raises(PeerError):
            for _ in range(3):  # what is left of the packet is read as another one
                rig.nic.poll()
                rig.received()


LIES: list[dict[str, int]] = [
    *({"message_length": value} for value in (0, 8, 43, 200, 0x80000000, 0xFFFFFFFF)),
    *({"data_offset": value} for value in (0, 35, 97, 0x80000000, 0xFFFFFFFF)),
    *({"data_length": value} for value in (0, 13, 61, 1519, 0x80000000, 0xFFFFFFFF)),
    {"data_offset": 0xFFFFFFC0, "data_length": 0x60},
    {"ppi_offset": 0, "ppi_length": 16},
    {"ppi_offset": 36, "ppi_length": 64},
    {"ppi_offset": 0xFFFFFFF0, "ppi_length": 0x20},
    {"ppi_offset": 37, "ppi_length": 12},
]


@pytest.mark.parametrize("lie", LIES, ids=[",".join(f"{name}={value:#x}" for name, value in lie.items()) for lie in LIES])
def test_messages_that_lie(lie: dict[str, int]) -> None:
    good = encode_packet(FRAME)
    forged = replace(PacketMessage.unpack(good), **lie).pack() + good[PacketMessage.SIZE :]
    with driven() as rig:
        rig.host.transfer([rig.host.place(forged)])
        assert hit(rig, "rx_bad_messages") == 1
        assert rig.nic.queue.last_rule() != ""
        still_works(rig)


def test_a_message_that_changes_its_mind() -> None:
    """A message of no known kind is kept for Python as it was when it was looked at; its length is read once."""
    with driven() as rig:
        rig.host.transfer([rig.host.place(struct.pack("<II", 0x77, 1 << 31))])
        assert hit(rig, "mail_lost") == 1
        rig.host.transfer([rig.host.place(struct.pack("<III", 0x77, 12, 0))])
        rig.received()
        with pytest.raises(ProtocolError, match="0x77"):
            rig.nic.poll()
        still_works(rig)


# Completions.

LAST = (1 << 64) - 1


@pytest.mark.parametrize(
    "transaction", [0, SEND_SECTIONS, SEND_SECTIONS + POOL_SLOTS, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
)
def test_completions_of_nothing(transaction: int) -> None:
    with driven() as rig:
        rig.host.complete(transaction, nvsp.SendRndisPacketComplete())
        assert hit(rig, "bad_completions") == 1
        still_works(rig)


def test_completions_of_another_kind_are_counted_and_not_kept() -> None:
    with driven() as rig:
        for index in range(500):
            rig.host.complete((1 << 40) + index, nvsp.InitComplete(status=1))
            rig.received()
            rig.nic.poll()
        assert rig.nic.counters().bad_completions == 500
        still_works(rig)


@pytest.mark.parametrize("payload", [b"", b"\x6c\0\0\0", b"\xff" * 8])
def test_completions_without_contents(payload: bytes) -> None:
    with driven() as rig:
        rig.host.complete(3, payload)
        rig.received()
        rig.nic.poll()
        assert rig.nic.counters().bad_completions == 1
        still_works(rig)


# Messages that answer nothing.


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (rndis.encode_message(rndis.QueryComplete(request_id=999)), "answers request 999"),
        (rndis.encode_message(rndis.KeepaliveRequest(request_id=1)), "answers nothing"),
        (struct.pack("<III", 0x80000004, 12, 0), "message_length 12"),
        (struct.pack("<IIIII", rndis.INDICATE_STATUS, 20, 0, 8, 0xFFFFFFF8), "need 20..20"),
        (rndis.encode_message(rndis.QueryRequest()), "only the guest"),
    ],
)
def test_rndis_messages_that_answer_nothing(message: bytes, text: str) -> None:
    with driven() as rig:
        rig.host.say(message)
        rig.received()
        with pytest.raises(ProtocolError, match=text):
            rig.nic.poll()
        still_works(rig)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (nvsp.SendReceiveBufferComplete(status=1), "answers nothing"),
        (struct.pack("<II", 9999, 0), "0x270f"),
        (nvsp.Init(), "only the guest"),
        (b"", "need 4"),
    ],
)
def test_nvsp_messages_that_answer_nothing(message: Any, text: str) -> None:
    with driven() as rig:
        rig.host.inband(message)
        rig.received()
        with pytest.raises(ProtocolError, match=text):
            rig.nic.poll()
        still_works(rig)


def test_lawful_messages_that_answer_nothing() -> None:
    with driven() as rig:
        rig.host.inband(nvsp.SendVfAssociation(allocated=1, serial=3))
        rig.host.inband(nvsp.encode_indirection_table(range(16)))
        for _ in range(2):
            rig.received()
            rig.nic.poll()
        still_works(rig)


def test_a_packet_of_no_known_type() -> None:
    with driven() as rig:
        rig.host.post(struct.pack("<HHHHQ", 0x77, 2, 2, 0, 0))
        rig.received()
        with pytest.raises(ProtocolError, match="type 119"):
            rig.nic.poll()
        still_works(rig)


@pytest.mark.parametrize("count", [MAIL_SLOTS - 1, 200])
def test_a_flood_of_messages(count: int) -> None:
    """What there is no place for is lost and counted, be it the answer that is awaited: then the wait ends in time."""
    with driven(ring_pages=32, timeout=0.3) as rig:
        flood = [rndis.encode_message(rndis.IndicateStatus(status=oid.STATUS_NETWORK_CHANGE))] * count

        def answer(message: rndis.QueryRequest, info: bytes) -> list[bytes]:
            return [*flood, rndis.encode_message(rndis.QueryComplete(request_id=message.request_id), b"yes!"), *flood]

        rig.host.rndis[rndis.QueryRequest] = answer
        if count < MAIL_SLOTS:
            assert rig.nic.query(oid.OID_GEN_VENDOR_ID) == b"yes!"
        else:
            with pytest.raises(WaitTimeout):
                rig.nic.query(oid.OID_GEN_VENDOR_ID)
        assert rig.nic.counters().mail_lost >= 2 * count - MAIL_SLOTS
        still_works(rig)


# Rings.


@pytest.mark.parametrize("index", [8192, 8193, 4, 0x80000000, 0xFFFFFFF8])
def test_a_write_index_that_cannot_be(index: int) -> None:
    with driven() as rig:
        rig.nic.queue.channel.incoming.mapping.write(WRITE_INDEX, struct.pack("<I", index))
        assert rig.nic.queue.wait(0)
        for call in (rig.nic.queue.rx_burst, rig.nic.poll, lambda: rig.nic.query(oid.OID_GEN_VENDOR_ID)):
            with pytest.raises(RingError, match=f"{index} bytes, limit 8192"):
                call()


@pytest.mark.parametrize("index", [8192, 8193, 4, 0x80000000])
@pytest.mark.parametrize("sending", [True, False])
def test_a_read_index_that_cannot_be(index: int, sending: bool) -> None:
    """It is seen once the room that was there before is used up: by sending, or by having transfers to complete."""
    with driven(send_buffer=150 * SEND_SECTION) as rig:
        rig.nic.queue.channel.outgoing.mapping.write(READ_INDEX, struct.pack("<I", index))
        with pytest.raises(RingError, match=f"{index} bytes, limit 8192"):
            for number in range(400):
                if sending:
                    rig.send([(FRAME.data, 0)])
                else:
                    rig.host.deliver([FRAME], transaction=number)
                    rig.received()
        for call in (rig.nic.queue.rx_burst, rig.nic.poll, lambda: rig.nic.query(oid.OID_GEN_VENDOR_ID)):
            with pytest.raises(RingError):
                call()
        assert rig.nic.queue.wait(0)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (struct.pack("<HHHH", PACKET_INBAND, 2, 0, 0), "0 bytes"),
        (struct.pack("<HHHH", PACKET_INBAND, 2, 1, 0), "8 bytes"),
        (struct.pack("<HHHH", PACKET_INBAND, 2, 4, 0), "32 bytes, limit 16"),
        (struct.pack("<HHHH", PACKET_COMPLETION, 2, 0xFFFF, 0), "524280 bytes"),
        (struct.pack("<HHHH", PACKET_COMPLETION, 3, 2, 0), "24 bytes, limit 16"),
        (struct.pack("<HHHH", PACKET_COMPLETION, 1, 2, 0), "8 bytes, limit 16"),
    ],
)
def test_packet_headers_that_cannot_be(header: bytes, text: str) -> None:
    with driven() as rig:
        rig.host.post(header + bytes(8))
        with pytest.raises(RingError, match=text):
            rig.nic.queue.rx_burst()
        with pytest.raises(RingError, match=text):
            rig.nic.poll()


# The handshake.


def answered(**answers: Callable[..., Any]) -> ScriptedHost:
    """A host that answers these messages otherwise."""
    host = ScriptedHost()
    for name, speak in answers.items():
        if hasattr(rndis, name):
            host.rndis[getattr(rndis, name)] = speak
        else:
            host.nvsp[getattr(nvsp, name)] = speak
    return host


def groups(*sections: tuple[int, int, int], status: int = nvsp.STATUS_SUCCESS) -> Callable[..., nvsp.NvspMessage]:
    """An answer to SendReceiveBuffer: (offset, size, count) of each group."""
    made = tuple(
        nvsp.ReceiveSection(offset=offset, sub_allocation_size=size, sub_allocation_count=count)
        for offset, size, count in sections
    )
    return lambda message: nvsp.SendReceiveBufferComplete(status=status, section_count=len(made), sections=made)


def initialised(**fields: int) -> Callable[..., list[bytes]]:
    def speak(message: rndis.InitializeRequest, info: bytes) -> list[bytes]:
        return [rndis.encode_message(rndis.InitializeComplete(**({"request_id": message.request_id} | fields)))]

    return speak


def sections_of(size: int) -> Callable[..., nvsp.NvspMessage]:
    """An answer to SendSendBuffer."""
    return lambda message: nvsp.SendSendBufferComplete(status=nvsp.STATUS_SUCCESS, section_size=size)


def set_to(status: int) -> Callable[..., list[bytes]]:
    """An answer to SetRequest."""
    return lambda message, info: [rndis.encode_message(rndis.SetComplete(request_id=message.request_id, status=status))]


def objects(**values: bytes) -> ScriptedHost:
    host = ScriptedHost()
    for name, value in values.items():
        host.objects[getattr(oid, name)] = value
    return host


HANDSHAKES: dict[str, tuple[ScriptedHost, type[VfioVmbusError], str]] = {
    "no answer to Init": (answered(Init=lambda message: None), WaitTimeout, "Init"),
    "Init answered by another message": (
        answered(Init=lambda message: nvsp.SendSendBufferComplete()), ProtocolError, "SendSendBufferComplete"),
    "Init answered by nothing": (answered(Init=lambda message: b""), ProtocolError, "need 4"),
    "Init answered by 8 bytes": (answered(Init=lambda message: struct.pack("<II", nvsp.INIT_COMPLETE, 1)), ProtocolError, "need 16"),
    "Init answered by an unknown message": (answered(Init=lambda message: b"\x77" * 40), ProtocolError, "0x77777777"),
    "no version": (ScriptedHost(version=0), RefusedError, "no NVSP version"),
    "another version": (
        answered(Init=lambda message: nvsp.InitComplete(status=1, negotiated_version=0x12345)), RefusedError, "no NVSP version"),
    "no answer to the receive buffer": (answered(SendReceiveBuffer=lambda message: None), WaitTimeout, "SendReceiveBuffer"),
    "receive buffer refused": (answered(SendReceiveBuffer=groups((0, 2048, 4), status=2)), RefusedError, "status 0x2"),
    "no sections": (answered(SendReceiveBuffer=groups()), ProtocolError, "0 groups"),
    "two groups": (answered(SendReceiveBuffer=groups((0, 2048, 4), (8192, 2048, 4))), ProtocolError, "2 groups"),
    "17 groups": (
        answered(SendReceiveBuffer=lambda message: struct.pack("<III", 102, 1, 17) + bytes(17 * 16)), ProtocolError, "17"),
    "more groups than told": (answered(SendReceiveBuffer=lambda message: struct.pack("<III", 102, 1, 3)), ProtocolError, "3"),
    "sections behind the beginning": (answered(SendReceiveBuffer=groups((8, 2048, 4))), ProtocolError, "begins at 0"),
    "sections of no size": (answered(SendReceiveBuffer=groups((0, 0, 64))), ProtocolError, "sections of 0 bytes"),
    "more sections than the buffer holds": (answered(SendReceiveBuffer=groups((0, 2048, 65))), ProtocolError, "65 receive sections"),
    "sections of 4 GiB": (answered(SendReceiveBuffer=groups((0, 0xFFFFFFFF, 0xFFFFFFFF))), ProtocolError, "4294967295"),
    "send buffer refused": (answered(SendSendBuffer=lambda message: nvsp.SendSendBufferComplete(status=2)), RefusedError, "send buffer"),
    "send sections of 0 bytes": (
        answered(SendSendBuffer=sections_of(0)), ProtocolError, "of 0 bytes"),
    "send sections of 127 bytes": (
        answered(SendSendBuffer=sections_of(127)), ProtocolError, "of 127 bytes"),
    "send sections of 4 GiB": (
        answered(SendSendBuffer=sections_of(0xFFFFFFFF)), ProtocolError, "4294967295"),
    "no answer to RNDIS": (answered(InitializeRequest=lambda message, info: []), WaitTimeout, "InitializeRequest"),
    "RNDIS refused": (answered(InitializeRequest=initialised(status=oid.STATUS_FAILURE)), RefusedError, "status 0xc0000001"),
    "RNDIS aligned to 2 GiB": (answered(InitializeRequest=initialised(alignment_shift=31)), ProtocolError, "1 << 31"),
    "RNDIS aligned beyond numbers": (answered(InitializeRequest=initialised(alignment_shift=0xFFFFFFFF)), ProtocolError, "4294967295"),
    "RNDIS answers another request": (answered(InitializeRequest=initialised(request_id=77)), ProtocolError, "request 77"),
    "RNDIS answers another kind": (
        answered(InitializeRequest=lambda message, info: [rndis.encode_message(rndis.SetComplete(request_id=message.request_id))]),
        ProtocolError, "answered by SetComplete"),
    "no answer to a query": (answered(QueryRequest=lambda message, info: []), WaitTimeout, "QueryRequest"),
    "a MAC address of 5 bytes": (objects(OID_802_3_CURRENT_ADDRESS=bytes(5)), ProtocolError, "5 bytes, need 6"),
    "a MAC address of no bytes": (objects(OID_802_3_CURRENT_ADDRESS=b""), ProtocolError, "0 bytes, need 6"),
    "a link state of 3 bytes": (objects(OID_GEN_MEDIA_CONNECT_STATUS=bytes(3)), ProtocolError, "3 bytes, need 4"),
    "offloads of 4 bytes": (objects(OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES=bytes(4)), ProtocolError, "0 bytes"),
    "offloads that say more than they have": (
        objects(OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES=struct.pack("<BBH", ndis.OBJECT_OFFLOAD, 3, 0xFFFF) + bytes(200)),
        ProtocolError, "65535"),
    "the filter refused": (
        answered(SetRequest=set_to(oid.STATUS_INVALID_DATA)), RefusedError, "0xc0010015"),
    "transfers refused and nothing said": (answered(InitializeRequest=lambda message, info: []), WaitTimeout, "0.2 s"),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDSHAKES)
def test_a_handshake_that_goes_wrong(name: str) -> None:
    """It ends with an error that says what was wrong, and leaves nothing behind."""
    host, error, text = HANDSHAKES[name]
    with nothing_left(objects=False), ScriptedDevice(host) as device, pytest.raises(error, match=text):
        Netvsc(device, **(SMALL | {"timeout": 0.2}))


def test_a_device_without_room_for_buffers() -> None:
    host = ScriptedHost()
    host.most_buffers = 1
    with nothing_left(objects=False), ScriptedDevice(host) as device, pytest.raises(RefusedError, match="no more buffers"):
        Netvsc(device, **SMALL)


def test_a_host_that_answers_twice() -> None:
    """The second answer to anything is counted, or an error at the next look; it never answers the next question."""
    host = ScriptedHost()
    lawful = host.nvsp[nvsp.Init]

    def twice(message: nvsp.Init) -> Any:
        answer = lawful(message)
        host.complete((1 << 32) + 1, answer)
        return answer

    host.nvsp[nvsp.Init] = twice
    with driven(host) as rig:
        assert rig.nic.counters().bad_completions == 1
        still_works(rig)
        again = [rndis.encode_message(rndis.QueryComplete(request_id=number), b"old!") for number in (3, 4)]
        rig.host.rndis[rndis.QueryRequest] = lambda message, info: again
        with pytest.raises(ProtocolError, match="answers request 3"):
            rig.nic.query(oid.OID_GEN_VENDOR_ID)


def test_a_host_that_falls_silent() -> None:
    """A question ends in time, and so does closing."""
    host = ScriptedHost()
    with ScriptedDevice(host) as device:
        nic = Netvsc(device, **(SMALL | {"timeout": 0.05}))
        host.rndis.clear()
        with pytest.raises(WaitTimeout, match=r"0\.05 s for the answer to QueryRequest"):
            nic.query(oid.OID_GEN_VENDOR_ID)
        nic.close()


def test_a_host_that_keeps_what_it_is_sent() -> None:
    """It answers, but gives no slot back: when all are gone, a question ends in time."""
    host = ScriptedHost()
    with ScriptedDevice(host) as device:
        nic = Netvsc(device, **(SMALL | {"timeout": 0.2}))
        host.completes = False
        with pytest.raises(WaitTimeout, match="a free slot for QueryRequest"):
            for _ in range(POOL_SLOTS + 1):
                nic.query(oid.OID_GEN_LINK_SPEED)
        assert len(host.outstanding) == POOL_SLOTS
        nic.close()


def test_a_host_that_takes_nothing() -> None:
    """No room in the ring: a question ends in time as well."""
    host = ScriptedHost()
    with ScriptedDevice(host) as device:
        nic = Netvsc(device, **(SMALL | {"timeout": 0.05}))
        host.turn = lambda: False  # type: ignore[method-assign]
        with pytest.raises(WaitTimeout):
            for _ in range(400):
                nic.set_filter(1)
        assert nic.queue.channel.outgoing.room < 8192
        nic.close()


def test_oldest_and_newest_hosts() -> None:
    for version in nvsp.SUPPORTED_VERSIONS:
        with driven(ScriptedHost(version=version), mtu=1500) as rig:
            assert rig.nic.info.nvsp == nvsp.version_text(version)
            assert rig.nic.info.ndis == ("6.30" if version > nvsp.VERSION_4 else "6.1")
            assert (rig.nic.mac, rig.nic.link) == (MAC, True)
            configured = any(isinstance(message, nvsp.SendNdisConfig) for message in rig.host.heard)
            assert configured == (version >= nvsp.VERSION_2)
            still_works(rig)


def test_a_jumbo_mtu_on_the_oldest_host() -> None:
    with ScriptedDevice(ScriptedHost(version=nvsp.VERSION_1)) as device, pytest.raises(RefusedError, match="1500 bytes at most"):
        Netvsc(device, **(SMALL | {"mtu": 9000}))


@pytest.mark.parametrize("mtu", [0, 67, 9001, -1])
def test_an_mtu_that_cannot_be(mtu: int) -> None:
    with ScriptedDevice(ScriptedHost()) as device, pytest.raises(UsageError, match="68 to 9000"):
        Netvsc(device, **(SMALL | {"mtu": mtu}))


def test_after_close() -> None:
    """Queue and card say that they are closed; memory that is gone is not touched."""
    with nothing_left(objects=False):
        with ScriptedDevice(ScriptedHost()) as device:
            nic = Netvsc(device, **SMALL)
            rig = Driven(ScriptedHost(), nic)
            nic.close()
            nic.close()
            with pytest.raises(ClosedError):
                nic.queue.rx_burst()
            with pytest.raises(ClosedError):
                rig.send([(FRAME.data, 0)])
            with pytest.raises(ClosedError):
                nic.query(oid.OID_GEN_VENDOR_ID)
            assert nic.queue.wait(0)  # for nothing: who looks finds out that it is closed
        nic.close()


def test_the_device_is_closed_first() -> None:
    host = ScriptedHost()
    with nothing_left(objects=False):
        with ScriptedDevice(host) as device:
            nic = Netvsc(device, **SMALL)
        nic.close()
