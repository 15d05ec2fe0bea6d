"""Signalling the other side by something that is no eventfd: a bit in memory that it watches, or a file that takes a number.

A doorbell is one number for kernels: an eventfd, -1 for nobody, or a bell's `number`, which is minus the address of its record. So
whoever rings an eventfd pays one branch, which always goes the same way.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from .access import inline, or32, store32, viewer
from .block import Block
from .libc import sys_write

NOBODY: Final = -1

BELL = np.dtype(
    [
        ("word", "i8"),  # address of 32 bits that others change, too; 0: there is a file
        ("bits", "i8"),  # what is set there
        ("file", "i8"),  # descriptor that gets the number 1 in 32 bits
        ("failed", "i8"),  # minus the errno of the last write that failed
        ("scratch", "i8"),
    ]
)

_bell_at = viewer(BELL)
_SCRATCH: int = BELL.fields["scratch"][1]  # type: ignore[index]


class Bell:
    """A doorbell that sets `bits` of the 32-bit word at address `word`, or writes to `file`; whose memory and file somebody else keeps.

    Used by one thread at a time, as the ring that has it is.
    """

    def __init__(self, *, word: int = 0, bits: int = 0, file: int = -1) -> None:
        self._record = Block(BELL)
        self._record["word"] = word
        self._record["bits"] = bits
        self._record["file"] = file

    @property
    def number(self) -> int:
        """What rings take as a doorbell, as long as this object lives."""
        return -self._record.address

    @property
    def failed(self) -> int:
        """The errno of the last write that failed, or 0."""
        return -self._record["failed"]


@inline
def strike(number: int) -> None:
    """Signal by the bell with this number."""
    bell = _bell_at(-number)
    if bell.word != 0:
        or32(bell.word, bell.bits)
    else:
        store32(-number + _SCRATCH, 1)
        result = sys_write(bell.file, -number + _SCRATCH, 4)
        if result < 0:
            bell.failed = result
