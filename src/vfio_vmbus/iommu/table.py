"""The table that kernels look addresses up in (`translation`): made, changed and put in force here.

What was replaced is kept until its user says that no kernel can be reading it.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from ..memory.block import Block
from .translation import ENTRY, LEAF, put_in_force

_FEW = LEAF // 4
"""Entries from which on a leaf stands alone."""

Rows = NDArray[np.int64]
"""Entries as rows of four integers: iova, end, address, access."""


class _Leaf:
    """Entries in a block of their own."""

    def __init__(self, count: int) -> None:
        self.block = Block(ENTRY, count)
        self.rows: Rows = _rows_of(self.block)

    @property
    def start(self) -> int:
        return int(self.rows[0, 0])


class Table:
    """The maps of the DOMAIN record at address `domain`, in order. One caller at a time."""

    def __init__(self, domain: int) -> None:
        self._domain = domain
        self._leaves: list[_Leaf] = []
        self._starts: list[int] = []
        self._replaced: list[object] = []
        self._directory = Block(ENTRY)
        put_in_force(domain, self._directory.address)

    @property
    def replaced(self) -> int:
        """How many earlier tables are kept."""
        return len(self._replaced)

    def forget_replaced(self) -> None:
        """No kernel reads an earlier table any more."""
        self._replaced.clear()

    def insert(self, iova: int, end: int, address: int, access: int) -> None:
        """Another map, which overlaps none."""
        place = max(bisect_right(self._starts, iova) - 1, 0)
        rows = self._leaves[place].rows if self._leaves else np.empty((0, 4), np.int64)
        at = int(np.searchsorted(rows[:, 0], iova))
        leaf = _Leaf(len(rows) + 1)
        leaf.rows[:at] = rows[:at]
        leaf.rows[at] = iova, end, address, access
        leaf.rows[at + 1 :] = rows[at:]
        self._replace(place, place + (len(rows) > 0), [leaf] if len(leaf.rows) <= LEAF else _cut(leaf.rows))

    def remove(self, iova: int, end: int) -> None:
        """Take out the maps that begin within [iova, end)."""
        if not self._leaves:
            return
        first = max(bisect_right(self._starts, iova) - 1, 0)
        last = max(bisect_right(self._starts, end - 1), first + 1)
        head, tail = self._leaves[first].rows, self._leaves[last - 1].rows
        left = [head[head[:, 0] < iova], tail[tail[:, 0] >= end]]
        if sum(map(len, left)) < _FEW:  # too few to stand alone
            if last < len(self._leaves):
                left.append(self._leaves[last].rows)
                last += 1
            elif first > 0:
                first -= 1
                left.insert(0, self._leaves[first].rows)
        self._replace(first, last, _cut(np.concatenate(left)))

    def _replace(self, first: int, last: int, leaves: list[_Leaf]) -> None:
        """Put `leaves` in the place of leaves [first, last), and the new table in force."""
        count = len(self._leaves) - (last - first) + len(leaves)
        directory = Block(ENTRY, 1 + count)
        old, new = _rows_of(self._directory)[1:], _rows_of(directory)[1:]
        directory.array["iova"][0] = count
        new[:first] = old[:first]
        for place, leaf in enumerate(leaves, first):
            new[place] = leaf.start, 0, leaf.block.address, len(leaf.rows)
        new[first + len(leaves) :] = old[last:]
        self._replaced.append((self._directory, self._leaves[first:last]))
        self._leaves[first:last] = leaves
        self._starts[first:last] = [leaf.start for leaf in leaves]
        self._directory = directory
        put_in_force(self._domain, directory.address)


def _rows_of(block: Block) -> Rows:
    return block.array.view(np.int64).reshape(-1, 4)


def _cut(rows: Rows) -> list[_Leaf]:
    """Leaves of these, with room for more where they do not fit one."""
    count = 1 if len(rows) <= LEAF else -(-len(rows) // (LEAF * 3 // 4))
    leaves = []
    for part in np.array_split(rows, count) if len(rows) else []:
        leaf = _Leaf(len(part))
        leaf.rows[:] = part
        leaves.append(leaf)
    return leaves
