"""Page lists of GPA-direct packets that name memory which is not the attacker's, or not for this use, or that lie about it."""

from __future__ import annotations

from collections.abc import Iterable

from ...memory.mapping import PAGE
from ...wire import nvsp
from ..attacker import PART, WHOLE, Attack, Attacker, Outcome, marked_message, range_words

ALIAS = 1 << 52
"""Added to a page number it gives the same address, if that is computed in 64 bits."""


def _one_range_each(attacker: Attacker, ranges: Iterable[tuple[int, int, list[int]]]) -> Outcome:
    """A packet for each (size, offset, pages)."""
    for size, offset, pfns in ranges:
        attacker.pages(range_words(size, offset, pfns))
    return attacker.outcome()


def _own(attacker: Attacker) -> list[int]:
    return list(attacker.trap.pfns)


def unmapped(attacker: Attacker) -> Outcome:
    """Low pages, high ones, and the gaps beside its own mappings."""
    first, last = attacker.trap.pfns[0] - 1, attacker.trap.pfns[-1] + 1
    return _one_range_each(attacker, [(WHOLE, 0, [pfn]) for pfn in (0, 1, 0xFEE00, first, last, (1 << 38) - 1, (1 << 49) - 1)])


def host_addresses(attacker: Attacker) -> Outcome:
    return _one_range_each(attacker, [(WHOLE, 0, [address // PAGE]) for address in attacker.prey.addresses])


def foreign(attacker: Attacker) -> Outcome:
    """The victim's pages alone, behind own ones, and across two of them."""
    own, ranges = _own(attacker), []
    for iova in attacker.prey.iovas:
        pfn = iova // PAGE
        ranges += [(WHOLE, 0, [pfn]), (WHOLE, PAGE - PART, [own[0], pfn]), (WHOLE, PAGE - PART, [pfn, pfn + 1])]
    return _one_range_each(attacker, ranges)


def direction(attacker: Attacker) -> Outcome:
    """Memory that the host may write, but not read."""
    deaf = list(attacker.deaf.pfns)
    return _one_range_each(
        attacker, [(WHOLE, 0, deaf[:1]), (PAGE, PAGE - PART, deaf[:2]), (WHOLE, PAGE - PART, [_own(attacker)[0], deaf[0]])]
    )


def over_the_end(attacker: Attacker) -> Outcome:
    """Ranges that begin in its last page and end behind it."""
    last = attacker.trap.pfns[-1]
    return _one_range_each(
        attacker, [(WHOLE, PAGE - PART, [last, last + 1]), (PAGE + 1, 0, [last, last + 1]), (2 * PAGE, 0, [last, last + 1])]
    )


def half_forbidden(attacker: Attacker) -> Outcome:
    """Several ranges, of which the last one is forbidden: nothing of the first ones may pass either."""
    own = _own(attacker)
    attacker.pages([*range_words(WHOLE, 0, own[:1]), *range_words(WHOLE, 0, [own[-1] + 1])], ranges=2)
    attacker.pages([*range_words(WHOLE, 0, own[:1]), *range_words(8, 0, own[1:2]), *range_words(8, 0, [0])], ranges=3)
    attacker.fill_section(0, marked_message(attacker.mac)[:PART])
    attacker.pages(range_words(WHOLE - PART, 0, [own[-1] + 1]), section=(0, PART))
    return attacker.outcome()


def wrapped(attacker: Attacker) -> Outcome:
    """Page numbers whose addresses wrap around 64 bits, to its own memory or to nothing."""
    own = attacker.trap.pfns[0]
    pfns = [own + ALIAS, own + (ALIAS << 3), own | 1 << 63, own | 1 << 50, (1 << 64) - 1, (1 << 52) - 1, (1 << 51), (1 << 63) - 1]
    return _one_range_each(attacker, [(WHOLE, 0, [pfn]) for pfn in pfns])


def huge(attacker: Attacker) -> Outcome:
    """Ranges longer than any list of pages behind them, or without a byte."""
    own = _own(attacker)
    sizes = (0xFFFFFFFF, 0xFFFFF000, 0x80000000, 1 << 20, 16385, 5 * PAGE, 0)
    return _one_range_each(attacker, [(size, 0, own) for size in sizes])


def offsets(attacker: Attacker) -> Outcome:
    """Offsets beyond the first page."""
    own = _own(attacker)
    return _one_range_each(
        attacker, [(WHOLE, offset, own[:2]) for offset in (PAGE, PAGE + 8, 1 << 20, 1 << 31, 0xFFFFFFFF, 0xFFFFFE00)]
    )


def range_counts(attacker: Attacker) -> Outcome:
    """Counts of ranges that the list does not hold, and lists that end too early or too late."""
    one = range_words(WHOLE, 0, _own(attacker)[:1])
    for ranges in (0, 2, 3, 64, 65, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF):
        attacker.pages(one, ranges=ranges)
    attacker.pages([*one, *one, 0, 0], ranges=1)
    attacker.pages(one[:1], ranges=1)
    for offset8 in (2, 3, 4):
        attacker.pages(one, offset8=offset8)
    return attacker.outcome()


def many_pieces(attacker: Attacker) -> Outcome:
    """More ranges than a host need keep: 65 and more of a few bytes each."""
    own = attacker.trap.pfns[0]
    for count in (65, 128, 500):
        words = [word for index in range(count) for word in range_words(8, (index * 16) % PAGE, [own])]
        attacker.pages(words, ranges=count)
    return attacker.outcome()


def questions(attacker: Attacker) -> Outcome:
    """Control messages in memory that is not mapped, not for reading, or another client's."""
    bad = [0, attacker.trap.pfns[-1] + 1, attacker.deaf.pfns[0], (1 << 52) - 1, *(iova // PAGE for iova in attacker.prey.iovas)]
    for pfn in bad:
        attacker.pages(range_words(28, 0, [pfn]), channel=nvsp.CHANNEL_CONTROL)
    return attacker.outcome()


def too_long_a_question(attacker: Attacker) -> Outcome:
    """A control message of four pages."""
    attacker.pages(range_words(4 * PAGE, 0, _own(attacker)), channel=nvsp.CHANNEL_CONTROL)
    return attacker.outcome()


MEMORY = (
    Attack("pages/unmapped", "GPA-direct packets with pages that nobody mapped", unmapped),
    Attack("pages/host", "GPA-direct packets with addresses of the host's own memory", host_addresses),
    Attack("pages/foreign", "GPA-direct packets with another client's pages", foreign),
    Attack("pages/direction", "GPA-direct packets with pages that the host may only write", direction),
    Attack("pages/over-end", "ranges that run over the end of a mapping", over_the_end),
    Attack("pages/half", "packets of which only a part is forbidden", half_forbidden),
    Attack("pages/wrapped", "page numbers whose addresses wrap around 64 bits", wrapped),
    Attack("pages/huge", "ranges of up to 4 GiB behind one page number, and empty ones", huge),
    Attack("pages/offset", "offsets beyond the first page", offsets),
    Attack("pages/counts", "lists with more, fewer or no ranges than announced", range_counts),
    Attack("pages/pieces", "hundreds of ranges in one packet", many_pieces),
    Attack("pages/questions", "control messages in forbidden memory", questions),
    Attack("pages/long-question", "a control message of 16 KiB", too_long_a_question),
)
