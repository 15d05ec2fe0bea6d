"""The lookup of an IOVA inside kernels, and the record of what was refused.

The table is sorted, private to the host and replaced as a whole: a kernel reads its address once and sees either the old or the new
one. Access rights are seen from the device: READ lets the host read (what a driver sends), WRITE lets it write (what it receives).
Any number of threads may look up at a time; those that refuse (`refuse`, `translate`) are one at a time: the worker that has the client.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..memory.access import inline, load64_acquire, store64_release, viewer
from ..memory.kernel import kernel

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

LAST_ADDRESS = (1 << 63) - 1
"""No request reaches beyond it: sums of addresses and lengths stay positive in a kernel."""

KEPT_FAULTS = 64
"""Faults whose details are kept, the latest ones; all are counted."""
FAULT_SLOTS = KEPT_FAULTS + 1
"""One more, so that those that are kept can be read while the next is being written."""

FAULT = np.dtype([("iova", "i8"), ("size", "i8"), ("access", "i8"), ("reason", "i8")])
ENTRY = np.dtype([("iova", "i8"), ("end", "i8"), ("address", "i8"), ("access", "i8")])
"""One mapping: [iova, end) is at `address`. The first record of a table holds the number of entries in `iova`."""

DOMAIN = np.dtype(
    [
        ("table", "i8"),  # address of the table in force
        ("hint", "i8"),  # entry that was hit last
        ("faults", "i8"),  # number of requests refused
        ("kept", FAULT, (FAULT_SLOTS,)),  # number n is in slot n % FAULT_SLOTS
    ]
)

_ENTRY_SIZE = ENTRY.itemsize
_FAULT_SIZE = FAULT.itemsize
_KEPT_AT = DOMAIN.fields["kept"][1]  # type: ignore[index]
_TABLE_AT = DOMAIN.fields["table"][1]  # type: ignore[index]
_FAULTS_AT = DOMAIN.fields["faults"][1]  # type: ignore[index]

_HEADS = np.dtype([(name, "i8") for name in ("table", "hint", "faults")])
_domain_at = viewer(_HEADS)
_fault_at = viewer(FAULT)
_entry_at = viewer(ENTRY)


@inline
def refuse(domain: int, iova: int, size: int, access: int, reason: int) -> int:
    """Count and keep a fault. Returns 0."""
    count = _domain_at(domain).faults
    fault = _fault_at(domain + _KEPT_AT + (count % FAULT_SLOTS) * _FAULT_SIZE)
    fault.iova = iova
    fault.size = size
    fault.access = access
    fault.reason = reason
    store64_release(domain + _FAULTS_AT, count + 1)
    return 0


@kernel("void(i8, i8)")
def put_in_force(domain: int, table: int) -> None:
    """From now on lookups use the table at address `table`, which is complete."""
    store64_release(domain + _TABLE_AT, table)


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
    if size <= 0 or iova < 0 or size > LAST_ADDRESS - iova:
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
    return entry.address + (iova - entry.iova)


@inline
def translate(domain: int, iova: int, size: int, access: int) -> int:
    """The address of [iova, iova + size) in this process, or 0 after the fault was counted and kept."""
    found: Any = lookup(domain, iova, size, access)
    if found < 0:
        return refuse(domain, iova, size, access, -found)
    return found
