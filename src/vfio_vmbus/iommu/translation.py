"""The lookup of an IOVA inside kernels, and the record of what was refused.

The table is sorted, private to the host, and in two steps: a directory, and leaves with a number of maps each. Neither is ever changed:
with each map a leaf and the directory are replaced, so a kernel reads the directory's address once and sees either the old or the new
table. Access rights are seen from the device: READ lets the host read (what a driver sends), WRITE lets it write (what it receives).
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
NOT_MEMORY = 5
FILE_FAILED = 6

REASONS = {
    NOT_MAPPED: "not mapped",
    DIRECTION: "not mapped for this direction",
    WRAPS: "empty, or wraps around the address space",
    OVER_END: "runs over the end of its mapping",
    NOT_MEMORY: "memory that can be copied only, not mapped",
    FILE_FAILED: "the file behind it cannot be read or written there",
}

LAST_ADDRESS = (1 << 63) - 1
"""No request reaches beyond it: sums of addresses and lengths stay positive in a kernel."""

KEPT_FAULTS = 64
"""Faults whose details are kept, the latest ones; all are counted."""
FAULT_SLOTS = KEPT_FAULTS + 1
"""One more, so that those that are kept can be read while the next is being written."""

FAULT = np.dtype([("iova", "i8"), ("size", "i8"), ("access", "i8"), ("reason", "i8")])
ENTRY = np.dtype([("iova", "i8"), ("end", "i8"), ("address", "i8"), ("access", "i8")])
"""One mapping: [iova, end) is at `address`, 0 where it is not in this process's memory. A leaf is an array of these.

A row of the directory: the leaf whose first mapping begins at `iova` is at `address` and has `access` entries. The first record of a
directory holds the number of its rows in `iova`."""

_LEAF_BITS = 7
LEAF = 1 << _LEAF_BITS
"""Entries that a leaf has at most."""

DOMAIN = np.dtype(
    [
        ("table", "i8"),  # address of the directory in force
        ("hint", "i8"),  # entry that was hit last: its row of the directory, times LEAF, plus its index in the leaf
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
    """From now on lookups use the directory at address `table`, which is complete."""
    store64_release(domain + _TABLE_AT, table)


@inline
def _last_before(rows: int, count: int, iova: int) -> int:
    """Index of the last of `count` sorted rows that starts at or below `iova`; -1 when there is none."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) >> 1
        if _entry_at(rows + middle * _ENTRY_SIZE).iova <= iova:
            low = middle + 1
        else:
            high = middle
    return low - 1


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
    row = min(head.hint >> _LEAF_BITS, count - 1)
    leaf = _entry_at(table + (row + 1) * _ENTRY_SIZE)
    entry = _entry_at(leaf.address + min(head.hint & (LEAF - 1), leaf.access - 1) * _ENTRY_SIZE)
    if iova < entry.iova or iova >= entry.end:
        row = _last_before(table + _ENTRY_SIZE, count, iova)
        if row < 0:
            return -NOT_MAPPED
        leaf = _entry_at(table + (row + 1) * _ENTRY_SIZE)
        index = _last_before(leaf.address, leaf.access, iova)
        entry = _entry_at(leaf.address + index * _ENTRY_SIZE)
        if iova >= entry.end:
            return -NOT_MAPPED
        head.hint = row * LEAF + index
    if size > entry.end - iova:
        return -OVER_END
    if entry.access & access != access:
        return -DIRECTION
    if entry.address == 0:
        return -NOT_MEMORY
    return entry.address + (iova - entry.iova)


@inline
def translate(domain: int, iova: int, size: int, access: int) -> int:
    """The address of [iova, iova + size) in this process, or 0 after the fault was counted and kept."""
    found: Any = lookup(domain, iova, size, access)
    if found < 0:
        return refuse(domain, iova, size, access, -found)
    return found
