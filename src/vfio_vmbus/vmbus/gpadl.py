"""A GPADL on the wire: one header and as many bodies as its page list needs, because a message has at most 240 bytes."""

from collections.abc import Iterable, Sequence

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.gpa import PAGE_SIZE, PageRange, decode_ranges, encode_ranges
from vfio_vmbus.wire.vmbus import (
    MAX_GPADL_BODY_WORDS,
    MAX_GPADL_HEADER_WORDS,
    MAX_GPADL_RANGE_BYTES,
    STATUS_SUCCESS,
    GpadlBody,
    GpadlHeader,
    Message,
)


def whole_pages(pfns: Sequence[int]) -> PageRange:
    """One range over whole 4096-byte pages, in this order."""
    return PageRange(len(pfns) * PAGE_SIZE, 0, tuple(pfns))


def gpadl_messages(relid: int, handle: int, ranges: Iterable[PageRange]) -> list[Message]:
    """The messages that create a GPADL, full but for the last. Bodies carry number 0, as Linux's do.

    Raises UsageError for ranges that cannot be, for none, and for a list beyond 65528 bytes (8190 pages in one range).
    """
    ranges = tuple(ranges)
    words = encode_ranges(ranges)
    size = len(words) * 8
    if not 0 < size <= MAX_GPADL_RANGE_BYTES:
        raise UsageError(f"a page list of {size} bytes, need 16..{MAX_GPADL_RANGE_BYTES}")
    head, rest = words[:MAX_GPADL_HEADER_WORDS], words[MAX_GPADL_HEADER_WORDS:]
    messages: list[Message] = [
        GpadlHeader(child_relid=relid, gpadl=handle, range_bytes=size, range_count=len(ranges), words=head)
    ]
    for at in range(0, len(rest), MAX_GPADL_BODY_WORDS):
        messages.append(GpadlBody(gpadl=handle, words=rest[at : at + MAX_GPADL_BODY_WORDS]))
    return messages


class Assembly:
    """A GPADL whose bodies are still coming.

    Once refused, its words are counted, so that the bodies under way find their place, but not kept.
    """

    def __init__(self, header: GpadlHeader, max_bodies: int) -> None:
        self.relid = header.child_relid
        self.handle = header.gpadl
        self.range_count = header.range_count
        self.status = STATUS_SUCCESS
        self.reason = ""
        self._expected = header.range_bytes // 8
        self._max_bodies = max_bodies
        self._words: list[int] = []
        self._received = 0
        self._bodies = 0
        self._take(header.words)

    @property
    def pages(self) -> int:
        """Pages in the finished list: all words but one a range."""
        return self._expected - self.range_count

    @property
    def complete(self) -> bool:
        return self._received == self._expected

    def refuse(self, status: int, reason: str) -> None:
        """Keep no more words, and answer with `status` in the end."""
        self.status = status
        self.reason = reason
        self._words.clear()

    def add(self, body: GpadlBody) -> None:
        """Take a body. Raises ProtocolError for one too many, too long, or out of order."""
        self._bodies += 1
        if self._bodies > self._max_bodies:
            raise ProtocolError(f"GPADL {self.handle:#x}: {self._bodies} bodies, limit {self._max_bodies}")
        # Linux numbers none, others count from 0 or from 1; a message cannot be lost, so any of that is in order.
        if body.message_number not in (0, self._bodies - 1, self._bodies):
            raise ProtocolError(
                f"GPADL {self.handle:#x}: body number {body.message_number}, need 0 or {self._bodies - 1}..{self._bodies}"
            )
        self._take(body.words)

    def ranges(self) -> tuple[PageRange, ...]:
        """The finished list. Raises ProtocolError where it does not add up."""
        return decode_ranges(self._words, self.range_count)

    def _take(self, words: tuple[int, ...]) -> None:
        self._received += len(words)
        if self._received > self._expected:
            raise ProtocolError(f"GPADL {self.handle:#x}: {self._received} words of page list, its header says {self._expected}")
        if self.status == STATUS_SUCCESS:
            self._words.extend(words)


def ring_pages(ranges: Sequence[PageRange]) -> int:
    """How many pages a ring in this GPADL can have: 0 unless all ranges are whole pages."""
    if any(item.byte_offset or item.byte_count % PAGE_SIZE for item in ranges):
        return 0
    return sum(len(item.pfns) for item in ranges)
