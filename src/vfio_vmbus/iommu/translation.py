"""The lookup of an IOVA inside kernels, and the record of what was refused.

The table is sorted, private to the host and replaced as a whole: a kernel reads its address once and sees either the old or the new
one. Access rights are seen from the device: READ lets the host read (what a driver sends), WRITE lets it write (what it receives).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..memory.access import inline, load64_acquire, viewer

READ = 1
WRITE = 2

NOT_MAPPED = 1
DIRECTION = 2
WRAPS = 3
OVER_END = 4

REASONS = {
    NOT_MAPPED: "not mapped",
    DIRECTION: "not mapped for this direction",
    WRAPS: "empty, or wraps around the address space",
    OVER_END: "runs over the end of its mapping",
}

KEPT_FAULTS = 64
"""Faults whose details are kept, the latest ones; all are counted."""

FAULT = np.dtype([("iova", "i8"), ("size", "i8"), ("access", "i8"), ("reason", "i8")])
ENTRY = np.dtype([("iova", "i8"), ("end", "i8"), ("address", "i8"), ("access", "i8")])
"""One mapping: [iova, end) is at `address`. The first record of a table holds the number of entries in `iova`."""

DOMAIN = np.dtype(
    [
        ("table", "i8"),  # address of the table in force
        ("hint", "i8"),  # entry that was hit last
        ("faults", "i8"),  # number of requests refused
        ("translated", "i8"),  # number of lookups granted
        ("kept", FAULT, (KEPT_FAULTS,)),
    ]
)

_ENTRY_SIZE = ENTRY.itemsize
_FAULT_SIZE = FAULT.itemsize
_KEPT_AT = DOMAIN.fields["kept"][1]  # type: ignore[index]
_TABLE_AT = DOMAIN.fields["table"][1]  # type: ignore[index]

_HEADS = np.dtype([(name, "i8") for name in ("table", "hint", "faults", "translated")])
_domain_at = viewer(_HEADS)
_fault_at = viewer(FAULT)
_entry_at = viewer(ENTRY)


@inline
def refuse(domain: int, iova: int, size: int, access: int, reason: int) -> int:
    """Count and keep a fault. Returns 0."""
    head = _domain_at(domain)
    fault = _fault_at(domain + _KEPT_AT + (head.faults % KEPT_FAULTS) * _FAULT_SIZE)
    fault.iova = iova
    fault.size = size
    fault.access = access
    fault.reason = reason
    head.faults += 1
    return 0


@inline
def _find(table: int, iova: int) -> int:
    """Index of the last entry that starts at or below `iova`; 0 when there is none (entries count from 1)."""
    low = 0
    high = _entry_at(table).iova
    while low < high:
        middle = (low + high + 1) >> 1
        if _entry_at(table + middle * _ENTRY_SIZE).iova <= iova:
            low = middle
        else:
            high = middle - 1
    return low


@inline
def lookup(domain: int, iova: int, size: int, access: int) -> int:
    """The address of [iova, iova + size) if one mapping with this access holds all of it, else minus the reason."""
    if size <= 0 or iova < 0 or iova + size < iova:
        return -WRAPS
    head = _domain_at(domain)
    table = load64_acquire(domain + _TABLE_AT)
    count = _entry_at(table).iova
    if count == 0:
        return -NOT_MAPPED
    index = min(max(head.hint, 1), count)
    entry = _entry_at(table + index * _ENTRY_SIZE)
    if iova < entry.iova or iova >= entry.end:
        index = _find(table, iova)
        entry = _entry_at(table + index * _ENTRY_SIZE)
        if index == 0 or iova >= entry.end:
            return -NOT_MAPPED
        head.hint = index
    if size > entry.end - iova:
        return -OVER_END
    if entry.access & access != access:
        return -DIRECTION
    head.translated += 1
    return entry.address + (iova - entry.iova)


@inline
def translate(domain: int, iova: int, size: int, access: int) -> int:
    """The address of [iova, iova + size) in this process, or 0 after the fault was counted and kept."""
    found: Any = lookup(domain, iova, size, access)
    if found < 0:
        return refuse(domain, iova, size, access, -found)
    return found
