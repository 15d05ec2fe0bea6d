"""The VMBus messages as a whole: the table, and what a hostile peer may send."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.strategies import structs
from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire import vmbus
from vfio_vmbus.wire.guids import CLASS_GUIDS, CLASS_NAMES
from vfio_vmbus.wire.table import Side, Table
from vfio_vmbus.wire.vmbus import MESSAGES, GpadlBody, GpadlHeader, Message, parse_message

KINDS = list(MESSAGES.values())
FREE_OF_CHECKS = [kind for kind in KINDS if kind not in (GpadlHeader, GpadlBody)]


def each(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


@each(FREE_OF_CHECKS)
@settings(max_examples=20)
@given(data=st.data())
def test_the_parser_finds_the_class_by_its_number(kind, data):
    message = data.draw(structs(kind))
    assert parse_message(message.pack(), sender=kind.SENDER, version=kind.SINCE) == message


@each(KINDS)
def test_the_other_side_may_not_send_it(kind):
    other = Side.HOST if kind.SENDER is Side.GUEST else Side.GUEST
    with pytest.raises(ProtocolError, match=f"{kind.__name__} from the {other.value}, only the {kind.SENDER.value}"):
        parse_message(kind().pack(), sender=other)


@each([kind for kind in KINDS if kind.SINCE > vmbus.VERSION_WIN8])
def test_an_older_connection_does_not_have_it(kind):
    with pytest.raises(ProtocolError, match=rf"{kind.__name__} needs VMBus \d\.\d, negotiated 2\.4"):
        parse_message(kind().pack(), version=vmbus.VERSION_WIN8)


@each(KINDS)
def test_a_message_cut_short_is_refused(kind):
    whole = kind().pack()
    for length in range(kind.SIZE):
        with pytest.raises(ProtocolError, match=f"have {length} bytes, need"):
            parse_message(whole[:length])


@each(FREE_OF_CHECKS)
def test_what_follows_a_message_is_ignored_up_to_the_limit(kind):
    whole = kind().pack()
    assert parse_message(whole.ljust(vmbus.MAX_MESSAGE_SIZE, b"\xee")) == kind()
    with pytest.raises(ProtocolError, match="message of 241 bytes, limit 240"):
        parse_message(whole.ljust(vmbus.MAX_MESSAGE_SIZE + 1, b"\xee"))


@pytest.mark.parametrize("number", [0, 18, 23, 25, 0xFFFFFFFF])
def test_an_unknown_number_is_refused(number):
    with pytest.raises(ProtocolError, match=f"unknown message number {number:#x}, limit 0x18"):
        parse_message(number.to_bytes(4, "little") + bytes(236))


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (GpadlHeader(range_bytes=16, range_count=0, words=(1, 2)), "0 ranges in 16 bytes"),
        (GpadlHeader(range_bytes=8, range_count=1, words=(1,)), "1 ranges in 8 bytes"),
        (GpadlHeader(range_bytes=17, range_count=1, words=(1, 2)), "1 ranges in 17 bytes"),
        (GpadlHeader(range_bytes=16, range_count=0xFFFF, words=(1, 2)), "65535 ranges in 16 bytes"),
        (GpadlHeader(range_bytes=16, range_count=1, words=(1, 2, 3)), "3 words, range_bytes is 16"),
        (GpadlBody(), "no words, need 1"),
    ],
)
def test_gpadl_messages_that_contradict_themselves_are_refused(message, named):
    with pytest.raises(ProtocolError, match=named):
        parse_message(message.pack())


@given(words=st.integers(2, vmbus.MAX_GPADL_HEADER_WORDS), padding=st.integers(0, 7))
def test_the_padding_of_a_ring_behind_a_gpadl_is_no_page(words, padding):
    message = GpadlHeader(range_bytes=8 * words, range_count=1, words=tuple(range(words)))
    packed = message.pack() + bytes(padding)
    assert parse_message(packed[: vmbus.MAX_MESSAGE_SIZE]) == message


def test_a_full_gpadl_header_and_body_fill_a_message():
    for kind, words in ((GpadlHeader, 27), (GpadlBody, 28)):
        message = kind(words=(1,) * words)
        assert vmbus.MAX_MESSAGE_SIZE - 8 < message.nbytes <= vmbus.MAX_MESSAGE_SIZE


def test_the_interrupt_page_and_the_target_info_share_a_field():
    contact = vmbus.InitiateContact(target_info=vmbus.TargetInfo.of(sint=2, vtl=0, feature_flags=5))
    assert contact.pack()[16:24] == bytes.fromhex("0200000005000000")
    assert vmbus.InitiateContact(target_info=vmbus.TargetInfo(0x1234000)).interrupt_page == 0x1234000


def test_versions_are_asked_for_from_new_to_old():
    assert [vmbus.version_text(version) for version in vmbus.SUPPORTED_VERSIONS] == [
        "5.3",
        "5.2",
        "5.1",
        "5.0",
        "4.1",
        "4.0",
        "3.0",
        "2.4",
    ]


def test_every_class_has_one_name():
    assert len(CLASS_NAMES) == len(CLASS_GUIDS)


def test_two_messages_of_one_side_cannot_have_one_number():
    table: Table[Message] = Table("Test", str)
    table.add(vmbus.Unload, 1, since=0, sender=Side.GUEST)
    table.add(vmbus.UnloadResponse, 1, since=0, sender=Side.HOST)
    with pytest.raises(TypeError, match="Test message 1 of RequestOffers is Unload's"):
        table.add(vmbus.RequestOffers, 1, since=0, sender=Side.BOTH)
