"""Lists of guest pages: what a GPADL is made of, and what a GPA-direct packet points at.

A list is a stream of 64-bit words: for each range one header word (byte count, then byte offset into the
first page, 32 bits each), then one word per page with its number (address / 4096). How many pages a range
has follows from count and offset. Source: include/linux/hyperv.h (struct gpa_range), Hyper-V's own limits.
VMBus pages have 4096 bytes whatever the CPU's page size is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.layout import U32, Struct, struct

PAGE_SIZE = 4096
PAGE_SHIFT = 12
MAX_PFN = (1 << 52) - 1  # a page number is a 64-bit address without its 12 low bits


@struct(size=8)
class GpaRange(Struct):
    """Header of a range; its page numbers follow."""

    byte_count: U32 = 0
    byte_offset: U32 = 0


@dataclass(frozen=True)
class PageRange:
    """`byte_count` bytes from `byte_offset` in page `pfns[0]` on, side by side through the pages `pfns`."""

    byte_count: int
    byte_offset: int
    pfns: tuple[int, ...]


def pages_spanned(byte_count: int, byte_offset: int) -> int:
    """How many pages `byte_count` bytes touch that begin `byte_offset` bytes into the first one."""
    return (byte_offset + byte_count + PAGE_SIZE - 1) >> PAGE_SHIFT


def encode_ranges(ranges: Iterable[PageRange]) -> tuple[int, ...]:
    """The words of a list. UsageError where an offset, a count or a page number cannot be."""
    words: list[int] = []
    for index, item in enumerate(ranges):
        need = pages_spanned(item.byte_count, item.byte_offset)
        if not 0 < item.byte_count < 1 << 32 or not 0 <= item.byte_offset < PAGE_SIZE:
            raise UsageError(
                f"range {index}: {item.byte_count} bytes at offset {item.byte_offset}; "
                f"a range has 1..{(1 << 32) - 1} bytes and begins within {PAGE_SIZE} bytes"
            )
        if len(item.pfns) != need:
            raise UsageError(f"range {index}: {item.byte_count} bytes in {len(item.pfns)} pages, need {need}")
        if not all(0 <= pfn <= MAX_PFN for pfn in item.pfns):
            raise UsageError(f"range {index}: a page number is not in 0..{MAX_PFN:#x}")
        words.append(item.byte_count | item.byte_offset << 32)
        words.extend(item.pfns)
    return tuple(words)


def decode_ranges(words: Sequence[int], range_count: int) -> tuple[PageRange, ...]:
    """The ranges of a list of exactly `range_count`. ProtocolError for anything that does not add up."""
    if not 0 < range_count <= len(words):
        raise ProtocolError(f"page list: {range_count} ranges in {len(words)} words, need 1..{len(words)}")
    ranges: list[PageRange] = []
    at = 0
    for index in range(range_count):
        if at >= len(words):
            raise ProtocolError(f"page list: range {index} of {range_count} is missing after {at} words")
        byte_count, byte_offset = words[at] & 0xFFFFFFFF, words[at] >> 32
        at += 1
        if byte_count == 0 or byte_offset >= PAGE_SIZE:
            raise ProtocolError(
                f"page list: range {index} has {byte_count} bytes at offset {byte_offset}; "
                f"need at least 1 byte, at offset 0..{PAGE_SIZE - 1}"
            )
        pages = pages_spanned(byte_count, byte_offset)
        if pages > len(words) - at:
            raise ProtocolError(f"page list: range {index} needs {pages} pages, {len(words) - at} follow")
        pfns = tuple(words[at : at + pages])
        if max(pfns) > MAX_PFN:
            raise ProtocolError(f"page list: range {index}: page number {max(pfns):#x}, limit {MAX_PFN:#x}")
        ranges.append(PageRange(byte_count, byte_offset, pfns))
        at += pages
    if at != len(words):
        raise ProtocolError(f"page list: {len(words)} words, but {range_count} ranges take {at}")
    return tuple(ranges)


def page_range(address: int, length: int) -> PageRange:
    """One range over contiguous memory: `length` bytes at `address` (an IOVA, in bytes)."""
    offset = address & (PAGE_SIZE - 1)
    first = address >> PAGE_SHIFT
    return PageRange(length, offset, tuple(range(first, first + pages_spanned(length, offset))))


def single_pages(address: int, length: int) -> tuple[PageRange, ...]:
    """The same memory as one range a page, the form in which Linux's netvsc sends its frames."""
    ranges: list[PageRange] = []
    while length > 0:
        offset = address & (PAGE_SIZE - 1)
        part = min(length, PAGE_SIZE - offset)
        ranges.append(PageRange(part, offset, (address >> PAGE_SHIFT,)))
        address += part
        length -= part
    return tuple(ranges)
