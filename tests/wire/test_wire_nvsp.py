"""NVSP: the table by side and version, receive sections, the indirection table and its hosts' mistake."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.strategies import structs
from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire import nvsp
from vfio_vmbus.wire.nvsp import decode_indirection_table, encode_indirection_table, encode_message, parse_message
from vfio_vmbus.wire.table import Side

KINDS = list(nvsp.TABLE)


def each(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


def a_sender(kind):
    return Side.HOST if kind.SENDER is Side.HOST else Side.GUEST


@each(KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_message_goes_in_40_bytes_and_comes_back(kind, data):
    message = data.draw(structs(kind))
    packed = encode_message(message)
    assert len(packed) >= nvsp.MESSAGE_SIZE
    assert parse_message(packed, sender=a_sender(kind), version=kind.SINCE) == message


def test_one_number_is_a_request_from_the_guest_and_an_answer_from_the_host():
    for number, request, answer in (
        (nvsp.SUBCHANNEL, nvsp.SubchannelRequest, nvsp.SubchannelComplete),
        (nvsp.PD_API, nvsp.PdApiRequest, nvsp.PdApiComplete),
    ):
        raw = number.to_bytes(4, "little") + bytes(36)
        assert type(parse_message(raw, sender=Side.GUEST)) is request
        assert type(parse_message(raw, sender=Side.HOST)) is answer


@each([kind for kind in KINDS if kind.SENDER is not Side.BOTH and kind.NUMBER not in (nvsp.SUBCHANNEL, nvsp.PD_API)])
def test_the_other_side_may_not_send_it(kind):
    other = Side.GUEST if kind.SENDER is Side.HOST else Side.HOST
    with pytest.raises(ProtocolError, match=f"{kind.__name__} from the {other.value}"):
        parse_message(encode_message(kind()), sender=other)


@each([kind for kind in KINDS if kind.SINCE > nvsp.VERSION_1])
def test_an_older_version_does_not_have_it(kind):
    with pytest.raises(ProtocolError, match=rf"{kind.__name__} needs NVSP [\d.]+, negotiated 1"):
        parse_message(encode_message(kind()), sender=a_sender(kind), version=nvsp.VERSION_1)


@each(KINDS)
def test_a_message_cut_short_is_refused(kind):
    whole = kind().pack()
    for length in range(kind.SIZE):
        with pytest.raises(ProtocolError, match=f"have {length} bytes, need"):
            parse_message(whole[:length], sender=a_sender(kind))


@pytest.mark.parametrize("number", [0, 3, 99, 109, 130, 136, 1 << 31])
def test_numbers_that_nobody_uses_are_refused(number):
    with pytest.raises(ProtocolError, match=f"NVSP: unknown message number {number:#x}, limit 0x87"):
        parse_message(number.to_bytes(4, "little") + bytes(36), sender=Side.HOST)


@pytest.mark.parametrize(
    ("count", "named"), [(3, "need 48 bytes, have 28"), (17, "is 17 elements, limit 16"), (0xFFFFFFFF, "limit 16")]
)
def test_more_receive_sections_than_are_there_are_refused(count, named):
    raw = nvsp.SendReceiveBufferComplete().pack()[:8] + count.to_bytes(4, "little") + bytes(28)
    with pytest.raises(ProtocolError, match=f"section_count.*{named}"):
        parse_message(raw, sender=Side.HOST)


def test_versions_have_the_names_that_people_use():
    assert [nvsp.version_text(version) for version in nvsp.SUPPORTED_VERSIONS] == ["6.1", "6.0", "5.0", "4.0", "2", "1"]


CHANNELS = tuple(range(100, 116))


def test_the_indirection_table_stands_behind_the_40_bytes():
    raw = encode_indirection_table(CHANNELS)
    assert raw[40:44] == (100).to_bytes(4, "little")
    for version in (nvsp.VERSION_5, nvsp.VERSION_6_1):
        assert decode_indirection_table(raw, version) == CHANNELS


def test_a_wrong_offset_of_an_old_host_is_put_right_and_of_a_new_one_refused():
    table = encode_indirection_table(CHANNELS)[40:]
    raw = encode_message(nvsp.SendIndirectionTable(count=16, offset=36 + 64)) + table
    assert decode_indirection_table(raw, nvsp.VERSION_6) == CHANNELS
    with pytest.raises(ProtocolError, match="64 bytes at 100, need 12 or more, and an end within 104"):
        decode_indirection_table(raw, nvsp.VERSION_6_1)


@pytest.mark.parametrize("offset", [0, 11, 41, 0xFFFFFFC0, 0xFFFFFFFF])
def test_an_offset_outside_of_the_message_is_refused(offset):
    raw = encode_message(nvsp.SendIndirectionTable(count=16, offset=offset)) + bytes(64)
    with pytest.raises(ProtocolError, match=f"64 bytes at {offset}"):
        decode_indirection_table(raw, nvsp.VERSION_6_1)


@pytest.mark.parametrize("count", [0, 15, 17, 0xFFFFFFFF])
def test_a_table_of_another_size_is_refused(count):
    raw = encode_message(nvsp.SendIndirectionTable(count=count, offset=40)) + bytes(64)
    with pytest.raises(ProtocolError, match=f"{count} entries, need 16"):
        decode_indirection_table(raw, nvsp.VERSION_6_1)


def test_the_sender_of_a_table_must_have_16_entries():
    with pytest.raises(UsageError, match="15 entries, need 16"):
        encode_indirection_table(CHANNELS[:15])
