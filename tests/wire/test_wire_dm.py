"""Dynamic memory: messages that say their size, ranges that must add up, page numbers as ranges; and the monitor page's bits."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.strategies import structs
from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire import dm, monitor
from vfio_vmbus.wire.table import Side

KINDS = list(dm.TABLE)


def each(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


@each(KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_message_comes_back_with_its_size(kind, data):
    message = data.draw(structs(kind))
    if kind is dm.BalloonResponse:
        message = kind(flags=dm.RangesBefore.of(range_count=len(message.ranges)), ranges=message.ranges)
    packed = dm.encode_message(message)
    found = dm.parse_message(packed + bytes(8), sender=kind.SENDER, version=kind.SINCE)
    assert found.size == len(packed) == message.nbytes
    assert {name: getattr(found, name) for name in kind.OFFSETS if name != "size"} == {
        name: getattr(message, name) for name in kind.OFFSETS if name != "size"
    }


@each(KINDS)
def test_a_size_that_cannot_be_is_refused(kind):
    packed = bytearray(dm.encode_message(kind()))
    for size in (0, kind.SIZE - 1, len(packed) + 1, 0xFFFF):
        packed[2:4] = size.to_bytes(2, "little")
        with pytest.raises(ProtocolError, match=f"{kind.__name__}: size is {size} bytes"):
            dm.parse_message(bytes(packed), sender=kind.SENDER)


@each(KINDS)
def test_the_other_side_may_not_send_it(kind):
    other = Side.GUEST if kind.SENDER is Side.HOST else Side.HOST
    with pytest.raises(ProtocolError, match=f"{kind.__name__} from the {other.value}"):
        dm.parse_message(dm.encode_message(kind()), sender=other)


def test_an_older_version_has_no_info():
    with pytest.raises(ProtocolError, match=r"InfoMessage needs dynamic memory 1\.0, negotiated 0\.3"):
        dm.parse_message(dm.encode_message(dm.InfoMessage()), sender=Side.HOST, version=dm.VERSION_0_3)


@pytest.mark.parametrize("number", [0, 13, 14, 0xFFFF])
def test_numbers_that_nobody_uses_are_refused(number):
    with pytest.raises(ProtocolError, match="dynamic memory: unknown message number"):
        dm.parse_message(number.to_bytes(2, "little") + b"\x08\0" + bytes(4), sender=Side.HOST)


def test_ranges_must_be_as_many_as_it_says():
    for said, there in ((0, 1), (2, 1), (1 << 30, 3)):
        wrong = dm.BalloonResponse(flags=dm.RangesBefore.of(range_count=said), ranges=(dm.PageSpan(0),) * there)
        with pytest.raises(ProtocolError, match=f"range_count is {said}, {there} ranges follow"):
            dm.parse_message(dm.encode_message(wrong), sender=Side.GUEST)
    packed = bytearray(dm.encode_message(dm.UnballoonRequest(range_count=1, ranges=(dm.PageSpan(0),))))
    packed[12:16] = b"\x02\0\0\0"
    with pytest.raises(ProtocolError, match="range_count is 2"):
        dm.parse_message(bytes(packed), sender=Side.HOST)


def test_as_many_ranges_as_fit_into_a_message():
    spans = (dm.PageSpan(1),) * dm.MAX_RANGES
    full = dm.encode_message(dm.BalloonResponse(flags=dm.RangesBefore.of(range_count=len(spans)), ranges=spans))
    assert len(full) == dm.MAX_MESSAGE_SIZE
    assert dm.parse_message(full, sender=Side.GUEST).ranges == spans
    with pytest.raises(UsageError, match="limit"):
        dm.encode_message(dm.BalloonResponse(ranges=(*spans, dm.PageSpan(1))))


def test_info_says_the_most_pages():
    data = dm.encode_message(dm.InfoMessage(info_size=16), dm.InfoHeader(data_size=8).pack() + (1 << 20).to_bytes(8, "little"))
    header, value = dm.parse_info(data)
    assert header.info_type == dm.INFO_TYPE_MAX_PAGE_CNT
    assert int.from_bytes(value, "little") == 1 << 20
    for wrong in (
        dm.InfoMessage(info_size=17),
        dm.InfoMessage(info_size=7),
        dm.InfoMessage(info_size=15),
        dm.BalloonRequest(page_count=16),
    ):
        with pytest.raises(ProtocolError):
            dm.parse_info(dm.encode_message(wrong, data[dm.InfoMessage.SIZE :]))


@given(pages=st.lists(st.integers(0, 40), unique=True).map(sorted))
def test_spans_are_the_pages_and_no_two_touch(pages):
    spans = list(dm.spans(pages))
    assert [page for span in spans for page in range(span.start_page, span.start_page + span.page_count)] == pages
    for first, second in pairwise(spans):
        assert first.start_page + first.page_count < second.start_page


def test_a_span_has_no_more_pages_than_its_field_holds():
    spans = list(dm.spans(range(dm.MAX_RANGE_PAGES + 2)))
    assert [(span.start_page, span.page_count) for span in spans] == [(0, dm.MAX_RANGE_PAGES), (dm.MAX_RANGE_PAGES, 2)]


def test_versions_have_the_names_that_people_use():
    assert [dm.version_text(version) for version in dm.SUPPORTED_VERSIONS] == ["2.0", "1.0", "0.3"]


def test_a_monitored_channel_has_a_bit():
    assert [monitor.pending_bit(number) for number in (0, 31, 32, 127)] == [(8, 1), (8, 1 << 31), (16, 1), (32, 1 << 31)]
    for number in (-1, 128):
        with pytest.raises(UsageError, match="take 0 to 127"):
            monitor.pending_bit(number)
