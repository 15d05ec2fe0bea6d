"""The table that kernels look addresses up in (`translation`): made, changed and put in force here.

What was replaced is kept until its user says that no kernel can be reading it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..memory.block import Block
from .translation import ENTRY, LEAF, put_in_force

_FEW = LEAF // 4
"""Entries from which on a leaf stands alone."""

Rows = NDArray[Any]


class Table:
    """The maps of the DOMAIN record at address `domain`, in order. One caller at a time."""

    def __init__(self, domain: int) -> None:
        self._domain = domain
        self._leaves: list[Block] = []
        self._starts: list[int] = []
        self._replaced: list[list[Block]] = []
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
        row = np.array([(iova, end, address, access)], ENTRY)
        if not self._leaves:
            self._replace(0, 0, row)
            return
        place = max(bisect_right(self._starts, iova) - 1, 0)
        rows = self._leaves[place].array
        self._replace(place, place + 1, np.insert(rows, np.searchsorted(rows["iova"], iova), row))

    def remove(self, iova: int, end: int) -> None:
        """Take out the maps that begin within [iova, end)."""
        if not self._leaves:
            return
        first = max(bisect_right(self._starts, iova) - 1, 0)
        last = max(bisect_right(self._starts, end - 1), first + 1)
        head, tail = self._leaves[first].array, self._leaves[last - 1].array
        left = [head[head["iova"] < iova], tail[tail["iova"] >= end]]
        if sum(map(len, left)) < _FEW:  # too few to stand alone
            if last < len(self._leaves):
                left.append(self._leaves[last].array)
                last += 1
            elif first > 0:
                first -= 1
                left.insert(0, self._leaves[first].array)
        self._replace(first, last, np.concatenate(left))

    def _replace(self, first: int, last: int, rows: Rows) -> None:
        """Put `rows` in the place of leaves [first, last), and the new table in force."""
        leaves = [_block(part) for part in _parts(rows)]
        kept = self._directory.array[1:]
        directory = Block(ENTRY, 1 + len(self._leaves) - (last - first) + len(leaves))
        directory.array["iova"][0] = len(directory.array) - 1
        middle = np.array([(leaf.array["iova"][0], 0, leaf.address, len(leaf.array)) for leaf in leaves], ENTRY)
        directory.array[1:] = np.concatenate([kept[:first], middle, kept[last:]])
        self._replaced.append([self._directory, *self._leaves[first:last]])
        self._leaves[first:last] = leaves
        self._starts[first:last] = [int(leaf.array["iova"][0]) for leaf in leaves]
        self._directory = directory
        put_in_force(self._domain, directory.address)


def _parts(rows: Rows) -> Iterator[Rows]:
    """Cut them into leaves, with room for more where they do not fit one."""
    if len(rows) <= LEAF:
        if len(rows):
            yield rows
        return
    count = -(-len(rows) // (LEAF * 3 // 4))
    yield from np.array_split(rows, count)


def _block(rows: Rows) -> Block:
    block = Block(ENTRY, len(rows))
    block.array[:] = rows
    return block
