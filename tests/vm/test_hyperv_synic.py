"""A SynIC's pages: message slots, event flags, and what becomes of them when the guest moves the pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.host.raw_client import eventually
from tests.vm.synic_guest import BUFFERS, EVENTS, FLAGS, MESSAGES, SLOT, SynicGuest
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.bell import strike
from vfio_vmbus.memory.kernel import step
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vm import vmbus
from vfio_vmbus.vm.memory import MIB
from vfio_vmbus.vm.synic import Synic
from vfio_vmbus.vmbus.gpadl import gpadl_messages, whole_pages
from vfio_vmbus.wire import hyperv
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.hyperv import SlotHeader


@step("void(i8)")
def _strike(number: int) -> None:
    strike(number)


@pytest.fixture(scope="module")
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        host.add_nic("nic")
        yield host


@pytest.fixture
def guest(host: EmbeddedHost) -> Iterator[SynicGuest]:
    with nothing_left(objects=False), SynicGuest(host, host.nics["nic"], cpus=2) as guest:
        yield guest


@contextmanager
def synic() -> Iterator[tuple[Synic, SharedMemory, int]]:
    """A SynIC by itself, two pages, and the address of the first."""
    with SharedMemory(4 * PAGE) as memory, memory.map() as mapping:
        made = Synic(eventfd.make(), eventfd.make())
        made.place(mapping.address, mapping.address + PAGE)
        yield made, memory, mapping.address


# Message slots.


def test_a_message_is_put_into_a_free_slot_and_interrupts() -> None:
    with synic() as (one, memory, _), memory.map() as page:
        assert one.post(b"first message")
        assert eventfd.take(one.interrupt)
        slot = page.read(SLOT, 256)
        header = SlotHeader.unpack(slot)
        assert header == SlotHeader(message_type=1, payload_size=13, flags=0, sender=0)
        assert slot[16:29] == b"first message"


def test_a_slot_that_was_not_taken_keeps_its_message_and_asks_for_its_end() -> None:
    with synic() as (one, memory, _), memory.map() as page:
        assert one.post(b"first")
        assert eventfd.take(one.interrupt)
        assert not one.post(b"second")
        assert not eventfd.take(one.interrupt)
        assert page.read(SLOT + 16, 5) == b"first"
        assert SlotHeader.unpack(page.read(SLOT, 16)).flags == 1
        page.write(SLOT, bytes(4))
        assert one.post(b"second")
        assert SlotHeader.unpack(page.read(SLOT, 16)).flags == 0
        assert page.read(SLOT + 16, 6) == b"second"


@pytest.mark.parametrize("size", [0, 8, 240])
def test_messages_of_any_size_leave_what_is_around_their_slot(size: int) -> None:
    with synic() as (one, memory, _), memory.map() as page:
        page.write(0, b"\xee" * PAGE)
        page.write(SLOT, bytes(4))
        assert one.post(b"x" * size)
        assert page.read(0, SLOT) == b"\xee" * SLOT
        assert page.read(SLOT + 16 + size, 240 - size) == b"\xee" * (240 - size)
        assert page.read(SLOT + 256, PAGE - SLOT - 256) == b"\xee" * (PAGE - SLOT - 256)


def test_without_a_page_there_is_nobody_to_tell() -> None:
    with synic() as (one, memory, address), memory.map() as page:
        one.place(0, 0)
        assert not one.post(b"message")
        assert not eventfd.take(one.interrupt)
        assert page.read(0, PAGE) == bytes(PAGE)
        one.place(address + 2 * PAGE, 0)
        assert one.post(b"message")
        assert page.read(2 * PAGE + SLOT + 16, 7) == b"message"


# Event flags.


@pytest.mark.parametrize("relid", [1, 31, 32, 33, 511])
def test_a_bell_sets_its_channels_flag_and_interrupts_once(relid: int) -> None:
    with synic() as (one, memory, _), memory.map() as page:
        number = one.bell(relid)
        assert one.bell(relid) == number
        for _ in range(3):
            _strike(number)
        assert eventfd.take(one.interrupt)
        assert not eventfd.take(one.interrupt)
        flags = int.from_bytes(page.read(PAGE + FLAGS, 256), "little")
        assert flags == 1 << relid
        page.write(PAGE + FLAGS, bytes(256))
        _strike(number)
        assert eventfd.take(one.interrupt)


def test_flags_move_with_their_page() -> None:
    with synic() as (one, memory, address), memory.map() as page:
        number = one.bell(5)
        assert one.place(address, address + 2 * PAGE)
        assert not one.place(address, address + 2 * PAGE)
        _strike(number)
        assert page.read(PAGE, PAGE) == bytes(PAGE)
        assert int.from_bytes(page.read(2 * PAGE + FLAGS, 8), "little") == 1 << 5
        assert one.place(0, 0)
        page.write(0, bytes(4 * PAGE))
        for _ in range(3):
            _strike(number)
            _strike(one.bell(6))
        assert page.read(0, 4 * PAGE) == bytes(4 * PAGE)


# A guest's registers.


def waiting(guest: SynicGuest) -> deque[bytes]:
    """Messages that wait for the guest."""
    return guest.hyperv.connection.carrier._outbox  # type: ignore[attr-defined, no-any-return]


def test_pages_count_when_they_and_the_synic_are_enabled(host: EmbeddedHost, guest: SynicGuest) -> None:
    """Without a page an answer waits for one; while the SynIC is off there is nobody to answer."""
    side, on = guest.hyperv, hyperv.ENABLED
    for control, events, messages, waits in ((0, EVENTS | on, MESSAGES | on, 0), (on, EVENTS | on, MESSAGES, 1)):
        side.synic_changed(0, control, events, messages)
        guest.ram.write(MESSAGES, bytes(PAGE))
        assert guest.post(wire.InitiateContact(version_requested=1).pack()) == 0
        host.run(lambda: None)  # behind the message
        assert len(waiting(guest)) == waits
        assert guest.slot()[0].message_type == 0
    side.synic_changed(0, on, EVENTS | on, MESSAGES | on)
    assert guest.hear(wire.VersionResponse).version_supported == 0
    assert guest.listen() == []


@pytest.mark.parametrize("page", [64 * MIB, 64 * MIB - 1, 0xFEE00000, 1 << 32, 1 << 51, (1 << 64) - 4096, 3 << 30])
def test_pages_where_there_is_no_memory_are_none(guest: SynicGuest, page: int) -> None:
    guest.hyperv.synic_changed(0, 1, page | 1, page | 1)
    assert guest.post(wire.InitiateContact(version_requested=1).pack()) == 0
    if page == 64 * MIB - 1:  # bits below the page's are no part of its address
        eventually(lambda: guest.ram.read(64 * MIB - PAGE + SLOT, 4) != bytes(4), "an answer in the last page")
    else:
        eventually(lambda: len(waiting(guest)) == 1, "an answer waits")
    guest.hyperv.synic_changed(0, 1, EVENTS | 1, MESSAGES | 1)
    if page != 64 * MIB - 1:
        assert guest.hear(wire.VersionResponse).version_supported == 0


def test_a_queue_is_delivered_one_by_one_as_the_guest_takes_them(guest: SynicGuest) -> None:
    guest.enable()
    assert guest.contact().version_supported == 1
    guest.say(wire.RequestOffers())
    eventually(lambda: guest.slot()[0].flags & 1, "the second message is waited for")
    offer = wire.parse_message(guest.take() or b"")
    assert isinstance(offer, wire.OfferChannel)
    assert guest.eoms == 1
    eventually(lambda: guest.slot()[0].message_type, "the next one")
    assert isinstance(wire.parse_message(guest.take() or b""), wire.AllOffersDelivered)
    assert guest.eoms == 1  # nothing was behind it


def test_what_waits_goes_to_the_page_where_it_has_moved(guest: SynicGuest) -> None:
    guest.enable()
    assert guest.contact().version_supported == 1
    guest.say(wire.RequestOffers())
    eventually(lambda: guest.slot()[0].flags & 1, "the second message is waited for")
    moved = MESSAGES + 8 * PAGE
    guest.hyperv.synic_changed(0, 1, EVENTS | 1, moved | 1)
    eventually(lambda: guest.ram.read(moved + SLOT, 4) != bytes(4), "the second message is in the new page")
    assert isinstance(wire.parse_message(guest.ram.read(moved + SLOT + 16, 8)), wire.AllOffersDelivered)


def test_what_waits_for_a_kernel_is_not_its_successors(guest: SynicGuest) -> None:
    guest.enable()
    assert guest.contact().version_supported == 1
    guest.say(wire.RequestOffers())
    eventually(lambda: guest.slot()[0].flags & 1, "the second message is waited for")
    guest.disable()
    assert len(waiting(guest)) == 0
    guest.ram.write(MESSAGES, bytes(PAGE))
    guest.enable()
    assert guest.slot()[0].message_type == 0
    guest.connect().ping()


def test_what_is_answered_while_a_processor_is_off_is_not_its_successors(guest: SynicGuest) -> None:
    guest.connect().disable()
    guest.say(*gpadl_messages(1, 7, [whole_pages([BUFFERS // PAGE])]))
    eventually(lambda: guest.hyperv.connection.gpadl_sizes, "the host has made the GPADL")
    guest.enable()
    assert guest.slot()[0].message_type == 0
    guest.connect().ping()


def test_a_guest_that_takes_nothing_is_not_listened_to_any_more(host: EmbeddedHost, guest: SynicGuest) -> None:
    """Its answers are bounded; when it takes them, it goes on."""
    guest.connect()
    bad = wire.OpenChannel(child_relid=99).pack()  # each is refused, with an answer
    sent = 0
    while guest.post(bad) == hyperv.STATUS_SUCCESS or sent < vmbus.MAX_OUTBOX + vmbus.MAX_INBOX:
        sent += 1
        host.run(lambda: None)
    assert len(waiting(guest)) <= vmbus.MAX_OUTBOX + 8
    for _ in range(vmbus.MAX_OUTBOX):
        guest.hear(wire.OpenChannelResult)
    eventually(lambda: guest.post(bad) == hyperv.STATUS_SUCCESS, "it is listened to again")
