"""The host's end of a connection against a client that says what it likes: nothing leaks, others are served, a reset makes all well."""

from __future__ import annotations

import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_client import RW, RawClient, eventually

from vfio_vmbus.errors import ProtocolError, RingError
from vfio_vmbus.host.connection import KEPT_ERRORS, MAX_PIECES, Connection
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import Stock, nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vmbus.gpadl import gpadl_messages, whole_pages
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.gpa import PageRange
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_XFER_PAGES, Packet, TransferRange

NEWEST = wire.SUPPORTED_VERSIONS[0]


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        for name in ("prey", "witness", "third"):
            host.add_nic(name)
        yield host


@pytest.fixture(scope="module")
def witness(host: EmbeddedHost) -> Iterator[RawClient]:
    """Another client, whom nothing of all this concerns."""
    with RawClient(host.attach(host.nics["witness"])) as witness:
        witness.connect()
        witness.ping()
        yield witness


@pytest.fixture
def client(host: EmbeddedHost, witness: RawClient) -> Iterator[RawClient]:
    """A client, connected. Afterwards nothing of it is left, and the witness is still served."""
    with nothing_left(objects=False), RawClient(host.attach(host.nics["prey"])) as client:
        client.connect()
        yield client
    witness.ping()


def connection(host: EmbeddedHost, client: RawClient) -> Connection:
    return host.connection(client.device)  # type: ignore[arg-type]


def usable_again(client: RawClient) -> None:
    client.restart()
    client.connect()
    client.ping()


# Messages that are fatal.


def header(handle: int = 50, relid: int = 1, **fields: object) -> wire.GpadlHeader:
    values = {"range_bytes": 16, "range_count": 1, "words": (PAGE, 1)} | fields
    return wire.GpadlHeader(child_relid=relid, gpadl=handle, **values)  # type: ignore[arg-type]


FATAL: dict[str, list[wire.Message | bytes]] = {
    "garbage": [b"\xff" * 64],
    "zeroes": [bytes(16)],
    "nothing": [b""],
    "four bytes": [b"\x01\0\0\0"],
    "beyond 240 bytes": [wire.RequestOffers().pack() + bytes(400)],
    "a number beyond all": [(99).to_bytes(8, "little") + bytes(8)],
    "what only hosts say": [wire.RescindChannelOffer(child_relid=1)],
    "an offer": [wire.AllOffersDelivered()],
    "offers a second time": [wire.RequestOffers()],
    "a close of what is closed": [wire.CloseChannel(child_relid=1)],
    "a close of nothing": [wire.CloseChannel(child_relid=99)],
    "a release of nothing": [wire.RelidReleased(child_relid=99)],
    "a body without a header": [wire.GpadlBody(gpadl=3, words=(1,))],
    "a teardown of nothing": [wire.GpadlTeardown(child_relid=1, gpadl=3)],
    "a header of no ranges": [header(range_count=0, range_bytes=16)],
    "a header that is too long for its bytes": [header(range_bytes=8, words=(PAGE, 1))],
    "a header of odd bytes": [header(range_bytes=17)],
    "a handle twice": [header(range_bytes=24), header(range_bytes=24)],
    "a page beyond all": [header(words=(PAGE, 1 << 52))],
    "the last page of all": [header(words=(PAGE, (1 << 64) - 1))],
    "pages at an offset beyond a page": [header(words=(PAGE | 4096 << 32, 1))],
    "a body too many": [header(range_bytes=24, words=(2 * PAGE, 1)), wire.GpadlBody(gpadl=50, words=(2, 3))],
    "bodies out of order": [header(range_bytes=64, words=(7 * PAGE, 1)), wire.GpadlBody(gpadl=50, message_number=5, words=(2,))],
    "headers without end": [header(handle=number, range_bytes=24) for number in range(1, 66)],
    "bodies without end": [header(range_bytes=65528, words=(PAGE,)), *[wire.GpadlBody(gpadl=50, words=())] * 600],
}


@pytest.mark.parametrize("kind", FATAL)
def test_what_no_guest_says_ends_the_connection(host: EmbeddedHost, client: RawClient, kind: str) -> None:
    client.say(*FATAL[kind][:80])
    if len(FATAL[kind]) > 80:
        for message in FATAL[kind][80:]:
            if client.status[0] & reg.STATUS_FAILED:
                break
            client.say(message)
    client.failed()
    assert eventfd.take(client.interrupt)
    assert isinstance(connection(host, client).errors[-1], ProtocolError)
    usable_again(client)


EARLY: list[wire.Message] = [
    wire.RequestOffers(),
    wire.OpenChannel(child_relid=1),
    wire.CloseChannel(child_relid=1),
    header(),
    wire.GpadlBody(gpadl=1, words=(1,)),
    wire.GpadlTeardown(child_relid=1, gpadl=1),
    wire.RelidReleased(child_relid=1),
    wire.ModifyChannel(child_relid=1, target_vp=0),
    wire.Unload(),
]


@pytest.mark.parametrize("message", EARLY, ids=lambda message: type(message).__name__)
def test_nothing_is_said_before_contact(client: RawClient, message: wire.Message) -> None:
    client.restart()
    client.say(message)
    client.failed()
    usable_again(client)


@pytest.mark.parametrize(
    "packet",
    [
        Packet(packet_type=PACKET_COMPLETION, transaction_id=1, payload=wire.Unload().pack()),
        Packet(packet_type=PACKET_GPA_DIRECT, transaction_id=1, pages=(PageRange(8, 0, (1,)),), payload=wire.Unload().pack()),
        Packet(
            packet_type=PACKET_XFER_PAGES,
            transaction_id=1,
            pageset_id=1,
            ranges=(TransferRange(byte_count=8, byte_offset=0),),
            payload=wire.Unload().pack(),
        ),
        Packet(packet_type=77, transaction_id=1, payload=wire.Unload().pack()),
    ],
    ids=lambda packet: f"type {packet.packet_type}",
)
def test_messages_are_in_band(host: EmbeddedHost, client: RawClient, packet: Packet) -> None:
    client.post(packet)
    client.failed()
    assert f"packet type {packet.packet_type}" in str(connection(host, client).errors[-1])
    usable_again(client)


# The ring itself.

BREAKS: dict[str, Callable[[RawClient], None]] = {
    "write index outside": lambda client: forge(client, client.pair.outgoing.mapping, 0, 0xFFFF_FFF8),
    "write index odd": lambda client: forge(client, client.pair.outgoing.mapping, 0, 12),
    "packet too short": lambda client: forge_packet(client, 2 << 16 | 1 << 32),
    "packet too long": lambda client: forge_packet(client, 6 | 2 << 16 | 0xFFFF << 32),
    "data behind the packet": lambda client: forge_packet(client, 6 | 9 << 16 | 4 << 32),
    "data in the header": lambda client: forge_packet(client, 6 | 1 << 16 | 4 << 32),
}


def forge(client: RawClient, mapping: object, offset: int, value: int) -> None:
    mapping.write(offset, value.to_bytes(4, "little"))  # type: ignore[attr-defined]
    client.bar.write32(reg.REG_DOORBELLS, 1)


def forge_packet(client: RawClient, word: int) -> None:
    """A packet of 40 bytes whose first word is this, made visible."""
    ring = client.pair.outgoing
    at = int.from_bytes(ring.mapping.read(0, 4), "little")
    ring.mapping.write(PAGE + at, word.to_bytes(8, "little"))
    forge(client, ring.mapping, 0, (at + 40) % ring.size)


@pytest.mark.parametrize("how", BREAKS)
def test_a_ring_that_contradicts_itself_ends_the_connection(host: EmbeddedHost, client: RawClient, how: str) -> None:
    BREAKS[how](client)
    client.failed()
    assert isinstance(connection(host, client).errors[-1], RingError)
    usable_again(client)


def fill(client: RawClient) -> None:
    """Leave answers in the ring towards us until the next one finds no room there. (Only then does the host look at our index.)

    A few questions at a time: a host that cannot answer reads no more of them, and we would wait for room for ever.
    """
    size = client.pair.incoming.size
    while size - answered(client) > 64:
        before = answered(client)
        client.say(*[wire.ModifyChannel(child_relid=9, target_vp=0)] * 8)
        eventually(lambda before=before: answered(client) >= min(before + 8 * 40, size - 64), "eight answers of 40 bytes")
        client.heard.clear()


def answered(client: RawClient) -> int:
    """Bytes that wait for us."""
    mapping = client.pair.incoming.mapping
    write, read = (int.from_bytes(mapping.read(at, 4), "little") for at in (0, 4))
    return (write - read) % client.pair.incoming.size


@pytest.mark.parametrize("index", [4, 0xFFFF_FFF8, 7 * PAGE])
def test_a_broken_ring_towards_the_client_is_noticed_once_it_is_full(host: EmbeddedHost, client: RawClient, index: int) -> None:
    fill(client)
    forge(client, client.pair.incoming.mapping, 4, index)
    client.say(*[wire.ModifyChannel(child_relid=9, target_vp=0)] * 4)
    client.failed()
    assert isinstance(connection(host, client).errors[-1], RingError)
    usable_again(client)


def test_taking_a_device_away_from_a_client_with_a_broken_ring_is_no_trouble_of_ours(
    host: EmbeddedHost, client: RawClient
) -> None:
    """Its GPADLs go all the same, and the function can be used again."""
    with client.memory(1) as page:
        assert client.share(page.pfns).status == 0
        fill(client)
        forge(client, client.pair.incoming.mapping, 4, 0xFFFF_FFFF)
        for _ in range(3):  # the first message may still find room
            client.say(wire.ModifyChannel(child_relid=9, target_vp=0))
        host.rescind(host.nics["prey"])
        client.failed()
        client.restart()
        client.connect()
        assert client.heard == []


# What is refused.


def test_pages_that_are_not_the_clients_make_no_gpadl(host: EmbeddedHost, client: RawClient, witness: RawClient) -> None:
    faults = connection(host, client).domain.fault_count
    with client.memory(2) as mine, witness.memory(2) as foreign:
        theirs = foreign.iova + (64 << 20)  # where the client itself has nothing
        witness.device.dma.map(theirs, foreign.memory.fd, 0, 2 * PAGE, RW)
        first = mine.iova // PAGE
        wrong = [
            (first + 2,),
            (first - 1,),
            (first, first + 1, first + 2),
            (theirs // PAGE,),
            (first, theirs // PAGE),
            (0,),
            ((1 << 52) - 1,),
            (first, (1 << 52) - 1),
        ]
        for pfns in wrong:
            assert client.share(pfns).status == wire.STATUS_INVALID_PARAMETER
        assert connection(host, client).domain.fault_count == faults + len(wrong)
        assert connection(host, client).error_count >= len(wrong)
        assert client.share(mine.pfns).status == 0
        client.unshare(client._handle)
        witness.device.dma.unmap(theirs, 2 * PAGE)


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE), (0, PAGE - 1), (8, PAGE - 8), (4095, 1)])
def test_gpadls_are_whole_pages(client: RawClient, offset: int, size: int) -> None:
    with client.memory(1) as page:
        pfns = page.pfns * (1 + (offset + size > PAGE))
        client.say(*gpadl_messages(1, 5, [PageRange(size, offset, pfns)]))
        assert client.hear(wire.GpadlCreated).status == wire.STATUS_INVALID_PARAMETER
        client.ping()


@pytest.mark.parametrize("access", [READ, WRITE])
def test_rings_must_be_readable_and_writable(host: EmbeddedHost, client: RawClient, access: int) -> None:
    with client.memory(8, access) as half, client.memory(8) as whole:
        created = client.share(half.pfns)
        assert created.status == 0
        assert client.open(created.gpadl, 4) == wire.STATUS_INVALID_PARAMETER
        mixed = client.share((*whole.pfns[:6], *half.pfns[:2]))
        assert mixed.status == 0
        assert client.open(mixed.gpadl, 4) == wire.STATUS_INVALID_PARAMETER
        good = client.share(whole.pfns)
        assert client.open(good.gpadl, 4) == 0
        client.say(wire.CloseChannel(child_relid=1))
        for handle in (created.gpadl, mixed.gpadl, good.gpadl):
            client.unshare(handle)
        assert connection(host, client).open_channels == 0


def test_one_gpadl_of_pages_that_are_only_read_and_pages_that_are_only_written(client: RawClient) -> None:
    with client.memory(1, READ) as read, client.memory(1, WRITE) as written:
        assert client.share((*read.pfns, *written.pfns)).status == wire.STATUS_INVALID_PARAMETER


def test_openings_that_cannot_be(host: EmbeddedHost, client: RawClient) -> None:
    with client.memory(8) as rings:
        gpadl = client.share(rings.pfns).gpadl
        for downstream in (0, 1, 7, 8, 9, 0xFFFF_FFFF):
            assert client.open(gpadl, downstream) == wire.STATUS_INVALID_PARAMETER
        for vector in (reg.VECTORS, 1000, 0xFFFF_FFFE):
            assert client.open(gpadl, 4, vector=vector) == wire.STATUS_INVALID_PARAMETER
        assert client.open(gpadl + 1, 4) == wire.STATUS_INVALID_PARAMETER
        assert client.open(gpadl, 4, relid=2) == wire.STATUS_UNSUCCESSFUL
        assert client.open(gpadl, 4) == 0
        assert client.open(gpadl, 4) == wire.STATUS_UNSUCCESSFUL
        client.say(wire.GpadlTeardown(child_relid=1, gpadl=gpadl))
        client.failed()
        assert connection(host, client).open_channels == 0


@pytest.mark.parametrize(("control", "value"), [(0, 12), (4, 4), (4 * PAGE, 4), (4 * PAGE, 0xFFFF_FFF8)])
def test_rings_with_indices_that_cannot_be_do_not_open(client: RawClient, control: int, value: int) -> None:
    with client.memory(8) as rings:
        gpadl = client.share(rings.pfns).gpadl
        rings.mapping.write(control, value.to_bytes(4, "little"))
        host_reads_it_first = control in (4, 4 * PAGE)  # its own ends' indices
        assert client.open(gpadl, 4) == (wire.STATUS_INVALID_PARAMETER if host_reads_it_first else 0)
        rings.mapping.write(control, bytes(4))
        if host_reads_it_first:
            assert client.open(gpadl, 4) == 0


def test_limits_of_gpadls(host: EmbeddedHost, client: RawClient) -> None:
    channels = connection(host, client)._machine._channels
    assert channels.limits.max_gpadls == 1024
    channels.limits = replace(channels.limits, max_gpadls=4)
    with client.memory(1) as page:
        statuses = [client.share(page.pfns).status for _ in range(5)]
        assert statuses == [0] * 4 + [wire.STATUS_INSUFFICIENT_RESOURCES]
        client.unshare(1)
        assert client.share(page.pfns).status == 0


def test_memory_in_too_many_pieces_opens_no_channel(host: EmbeddedHost, client: RawClient) -> None:
    """The same page over and over: each time it is a mapping of its own. What one client may have is bounded."""
    with client.memory(1) as page:
        first = client.share(page.pfns * 8190)
        assert first.status == 0
        assert client.open(first.gpadl, 4000) == 0
        assert 2 * 8190 <= MAX_PIECES < 3 * 8190
        host.run(lambda: connection(host, client)._check_room(4))
        with pytest.raises(ProtocolError, match="limit of 16384"):
            host.run(lambda: connection(host, client)._check_room(5))
        client.say(wire.CloseChannel(child_relid=1))
        client.unshare(first.gpadl)


def test_without_descriptors_left_a_channel_does_not_open(host: EmbeddedHost, client: RawClient) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with client.memory(8) as rings:
        gpadl = client.share(rings.pfns).gpadl
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        spare = [os.dup(client.interrupt)]
        while spare[-1] < highest:
            spare.append(os.dup(client.interrupt))  # no holes below
        try:
            for room in range(4):
                resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1] + 1 + room, hard))
                status = client.open(gpadl, 4)
                assert status in (0, wire.STATUS_UNSUCCESSFUL, wire.STATUS_INSUFFICIENT_RESOURCES)
                if status == 0:
                    break
                assert connection(host, client).open_channels == 0
            assert room > 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
        assert client.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)


def test_errors_are_kept_counted_and_logged_up_to_a_number(
    host: EmbeddedHost, client: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "vfio_vmbus.host"):
        for _ in range(KEPT_ERRORS + 20):
            assert client.share((1,)).status != 0
    mine = connection(host, client)
    assert len(mine.errors) == KEPT_ERRORS
    assert mine.error_count == KEPT_ERRORS + 20
    assert len(caplog.records) == KEPT_ERRORS
    assert all(error.__traceback__ is None for error in mine.errors)


# The end, in the middle of anything.


@contextmanager
def busy(client: RawClient) -> Iterator[None]:
    """A channel open, a GPADL ready and one half made."""
    with client.memory(8) as rings, client.memory(2) as more:
        assert client.open(client.share(rings.pfns).gpadl, 4) == 0
        assert client.share(more.pfns).status == 0
        client.say(gpadl_messages(1, 900, [whole_pages(more.pfns * 30)])[0])
        yield


def test_unload_ends_everything_and_contact_begins_anew(host: EmbeddedHost, client: RawClient) -> None:
    with busy(client):
        client.say(wire.Unload())
        client.hear(wire.UnloadResponse)
        assert connection(host, client).open_channels == 0
        client.connect()
        client.ping()


def test_a_second_contact_begins_anew(host: EmbeddedHost, client: RawClient) -> None:
    with busy(client):
        client.connect(wire.SUPPORTED_VERSIONS[2])
        assert connection(host, client).open_channels == 0
        client.ping()


@pytest.mark.parametrize("end", ["reset", "control", "close"])
def test_a_reset_or_the_end_in_the_middle(host: EmbeddedHost, client: RawClient, end: str) -> None:
    port_count = len(host.switch.ports)
    with busy(client):
        assert len(host.switch.ports) == port_count + 1
        match end:
            case "reset":
                client.device.reset()
            case "control":
                client.bar.write32(reg.REG_CONTROL, reg.CONTROL_RESET)
            case "close":
                host.run(lambda: connection(host, client).close())
        assert len(host.switch.ports) == port_count
    if end != "close":
        usable_again(client)


@pytest.mark.parametrize("how", ["unload", "reset"])
def test_what_a_client_was_done_with_is_offered_to_its_next_connection(client: RawClient, how: str) -> None:
    client.say(wire.RelidReleased(child_relid=1))
    with client.memory(1) as page:
        assert client.share(page.pfns).status == wire.STATUS_UNSUCCESSFUL
    if how == "unload":
        client.say(wire.Unload())
        client.hear(wire.UnloadResponse)
        client.connect()
        client.ping()
    else:
        usable_again(client)


@pytest.mark.parametrize("what", ["rings", "gpadl", "admin ring"])
def test_unmapping_what_is_in_use_ends_the_connection_first(host: EmbeddedHost, client: RawClient, what: str) -> None:
    rings, more = client.memory(8), client.memory(2)
    assert client.open(client.share(rings.pfns).gpadl, 4) == 0
    assert client.share(more.pfns).status == 0
    buffer = {"rings": rings, "gpadl": more, "admin ring": client.buffer}[what]
    if what == "admin ring":
        client.device.dma.unmap(buffer.iova, buffer.size)
        client.failed(reg.ERROR_ADMIN_MEMORY)
        client.device.dma.map(buffer.iova, buffer.memory.fd, 0, buffer.size, RW)
    else:
        buffer.close()
        client.failed()
        assert "was unmapped while GPADL" in str(connection(host, client).errors[-1])
    assert connection(host, client).open_channels == 0
    usable_again(client)


def test_unmapping_what_is_not_in_use_any_more_is_nobodys_business(client: RawClient) -> None:
    rings = client.memory(8)
    gpadl = client.share(rings.pfns).gpadl
    assert client.open(gpadl, 4) == 0
    client.say(wire.CloseChannel(child_relid=1))
    client.unshare(gpadl)
    rings.close()
    client.ping()
    assert client.status == (reg.STATUS_RUNNING, reg.ERROR_NONE)


# Others.


def test_a_flood_of_messages_starves_nobody(client: RawClient, witness: RawClient) -> None:
    enough = threading.Event()
    turns = itertools.count()

    def flood() -> None:
        while not enough.is_set():
            client.say(*[wire.OpenChannel(child_relid=9)] * 20)  # each is refused, with an answer
            client.listen()
            client.heard.clear()
            next(turns)

    thread = threading.Thread(target=flood)
    thread.start()
    eventually(lambda: next(turns) > 20, "a flood")
    for _ in range(20):
        witness.ping()
    enough.set()
    thread.join()
    client.ping()


def test_a_client_that_reads_no_answers_holds_up_nobody_but_itself(
    host: EmbeddedHost, client: RawClient, witness: RawClient
) -> None:
    """The host stops taking its messages until its ring has room; then all of them are answered."""
    requests = 600  # of 24 + 16 bytes, answers likewise: beyond both rings
    said = threading.Thread(target=lambda: client.say(*[wire.OpenChannel(child_relid=9)] * requests))
    said.start()
    waiting = connection(host, client).carrier
    eventually(lambda: len(waiting._outbox) > 0, "answers wait")
    witness.ping()
    assert len(waiting._outbox) < 10
    answers = 0
    while answers < requests:
        client.hear(wire.OpenChannelResult)
        answers += 1
    said.join()
    client.ping()


def test_a_reset_while_answers_wait(host: EmbeddedHost, client: RawClient) -> None:
    fill(client)
    client.say(*[wire.ModifyChannel(child_relid=9, target_vp=0)] * 8)
    eventually(lambda: len(connection(host, client).carrier._outbox) > 0, "answers wait")
    usable_again(client)
    assert len(connection(host, client).carrier._outbox) == 0


def test_a_doorbell_that_its_client_steals_and_makes_blocking_stops_nobody(client: RawClient, witness: RawClient) -> None:
    bell = client.bar.doorbell(reg.REG_DOORBELLS)
    os.set_blocking(bell, True)
    enough = threading.Event()

    def steal() -> None:
        while not enough.is_set():
            os.eventfd_write(bell, 1)
            eventfd.take(bell)

    thread = threading.Thread(target=steal)
    thread.start()
    for _ in range(20):
        client.ping()
        witness.ping()
    enough.set()
    thread.join()


def test_a_full_interrupt_counter_stops_nobody(client: RawClient, witness: RawClient) -> None:
    eventfd.take(client.interrupt)
    os.eventfd_write(client.interrupt, (1 << 64) - 2)
    for _ in range(3):
        client.ping()
        witness.ping()
    client.say(b"")
    client.failed()
    usable_again(client)


def test_doorbells_without_end_are_only_that(client: RawClient, witness: RawClient) -> None:
    before = Stock.take()
    for offset in range(reg.REG_DOORBELLS, reg.BAR0_SIZE, 4):
        client.bar.write32(offset, 1)
    witness.ping()
    assert Stock.take().beyond(before) == {}


# Anything at all.

RELIDS = st.sampled_from([0, 1, 1, 1, 2, 0xFFFF_FFFF])
HANDLES = st.sampled_from([1, 1, 2, 3, 0, 0xFFFF_FFFF])
messages = st.one_of(
    st.just(wire.RequestOffers()),
    st.just(wire.Unload()),
    st.builds(lambda version: wire.InitiateContact(version_requested=version), st.sampled_from([*wire.SUPPORTED_VERSIONS, 0, 1])),
    st.builds(
        lambda relid, gpadl, offset, vector: wire.OpenChannel(
            child_relid=relid, open_id=1, ring_gpadl=gpadl, downstream_page_offset=offset, target_vp=vector
        ),
        RELIDS,
        HANDLES,
        st.sampled_from([0, 2, 4, 4, 4, 7]),
        st.sampled_from([0, 1, 64, 65, wire.VP_INDEX_DISABLE_INTERRUPT]),
    ),
    st.builds(lambda relid: wire.CloseChannel(child_relid=relid), RELIDS),
    st.builds(lambda relid: wire.RelidReleased(child_relid=relid), RELIDS),
    st.builds(lambda relid, vp: wire.ModifyChannel(child_relid=relid, target_vp=vp), RELIDS, st.sampled_from([0, 1, 64, 65])),
    st.builds(lambda relid, gpadl: wire.GpadlTeardown(child_relid=relid, gpadl=gpadl), RELIDS, HANDLES),
    st.builds(lambda gpadl: wire.GpadlBody(gpadl=gpadl, words=(1,)), HANDLES),
    st.binary(max_size=48),
)
shares = st.tuples(RELIDS, HANDLES, st.sampled_from(["mine", "mine", "mine", "foreign", "half"]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(messages, shares, shares, st.sampled_from(["unmap", "link", "pause"])), max_size=25))
def test_whatever_is_said_the_host_lives_and_a_reset_makes_it_well(
    host: EmbeddedHost, client: RawClient, witness: RawClient, steps: list[object]
) -> None:
    usable_again(client)
    with client.memory(8) as rings:
        for step in steps:
            if client.status[0] & reg.STATUS_FAILED:
                break
            match step:
                case (relid, gpadl, whose):
                    pfns = {"mine": rings.pfns, "foreign": (1, 2, 3, 4), "half": (*rings.pfns[:4], 1)}[whose]
                    client.say(*gpadl_messages(relid, gpadl, [whole_pages(pfns)]))
                case "unmap":
                    client.device.dma.unmap(rings.iova, rings.size)
                    client.device.dma.map(rings.iova, rings.memory.fd, 0, rings.size, RW)
                case "link":
                    host.set_link(host.nics["prey"], not host.nics["prey"].link)
                case "pause":
                    host.run(lambda: None)
                case _:
                    client.say(step)  # type: ignore[arg-type]
        witness.ping()
        usable_again(client)
        assert connection(host, client).open_channels == 0
