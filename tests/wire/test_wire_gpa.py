"""Page lists: there and back, and every way in which they may not add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.gpa import MAX_PFN, PageRange, decode_ranges, encode_ranges, page_range, pages_spanned, single_pages

ADDRESSES = st.integers(0, 1 << 48)
LENGTHS = st.integers(1, 1 << 17)


@st.composite
def ranges(draw):
    offset, count = draw(st.integers(0, 4095)), draw(st.integers(1, 20000))
    pages = pages_spanned(count, offset)
    return PageRange(count, offset, tuple(draw(st.lists(st.integers(0, MAX_PFN), min_size=pages, max_size=pages))))


@given(lists=st.lists(ranges(), min_size=1, max_size=4))
def test_a_list_comes_back_as_it_went(lists):
    assert decode_ranges(encode_ranges(lists), len(lists)) == tuple(lists)


@given(lists=st.lists(ranges(), min_size=1, max_size=3), data=st.data())
def test_a_list_cut_anywhere_is_refused(lists, data):
    words = encode_ranges(lists)
    cut = data.draw(st.integers(0, len(words) - 1))
    with pytest.raises(ProtocolError, match="page list: "):
        decode_ranges(words[:cut], len(lists))


@pytest.mark.parametrize(
    ("words", "count", "named"),
    [
        ((), 1, "1 ranges in 0 words"),
        ((1, 7), 0, "0 ranges in 2 words"),
        ((1, 7), 3, "3 ranges in 2 words"),
        ((1, 7), 2, "range 1 of 2 is missing after 2 words"),
        ((0, 7), 1, "range 0 has 0 bytes at offset 0"),
        ((1 | 4096 << 32, 7), 1, "range 0 has 1 bytes at offset 4096"),
        ((0xFFFFFFFF, 7), 1, "range 0 needs 1048576 pages, 1 follow"),
        ((2 | 4095 << 32, 7), 1, "range 0 needs 2 pages, 1 follow"),
        ((1, MAX_PFN + 1), 1, "page number 0x10000000000000, limit 0xfffffffffffff"),
        ((1, 7, 8), 1, "3 words, but 1 ranges take 2"),
    ],
)
def test_lists_that_do_not_add_up_are_refused(words, count, named):
    with pytest.raises(ProtocolError, match=named):
        decode_ranges(words, count)


@pytest.mark.parametrize(
    "item",
    [
        PageRange(0, 0, ()),
        PageRange(1 << 32, 0, (0,) * (1 << 20)),
        PageRange(1, 4096, (0, 0)),
        PageRange(1, 0, ()),
        PageRange(4097, 0, (1,)),
        PageRange(1, 0, (MAX_PFN + 1,)),
        PageRange(1, 0, (-1,)),
    ],
)
def test_a_range_that_cannot_be_is_the_callers_mistake(item):
    with pytest.raises(UsageError, match="range 0: "):
        encode_ranges([item])


@given(address=ADDRESSES, length=LENGTHS)
def test_one_range_and_single_pages_cover_the_same_bytes(address, length):
    whole = page_range(address, length)
    assert whole.pfns[0] * 4096 + whole.byte_offset == address
    assert whole.byte_count == length
    at = address
    for part in single_pages(address, length):
        assert len(part.pfns) == 1
        assert part.pfns[0] * 4096 + part.byte_offset == at
        at += part.byte_count
    assert at == address + length
    assert decode_ranges(encode_ranges([whole]), 1) == (whole,)
