"""Signalling the other side by something that is no eventfd: a bit in memory that it watches, a file that takes a number, or both: the
file then learns of each time that the bit was not set before.

A doorbell is one number for kernels: an eventfd, -1 for nobody, or a bell's `number`, which is minus the address of its record. So
whoever rings an eventfd pays one branch, which always goes the same way.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from .access import inline, load64, or32, store64, viewer
from .block import Block
from .libc import sys_write

NOBODY: Final = -1

BELL = np.dtype(
    [
        ("word", "i8"),  # address of 32 bits that others change, too; 0: there is only a file
        ("bits", "i8"),  # what is set there
        ("file", "i8"),  # descriptor that gets the number 1, or -1: there is only a word
        ("width", "i8"),  # of that number, in bytes
        ("failed", "i8"),  # minus the errno of the last write that failed
        ("scratch", "i8"),
    ]
)

_bell_at = viewer(BELL)
_WORD: int = BELL.fields["word"][1]  # type: ignore[index]
_SCRATCH: int = BELL.fields["scratch"][1]  # type: ignore[index]


class Bell:
    """A doorbell that sets `bits` of the 32-bit word at address `word`, writes to `file`, or both; memory and file are somebody else's.

    width: bytes of the number that the file takes: 4, or 8 (an eventfd, which nobody shares who could make us wait).
    Used by one thread at a time, as the ring that has it is.
    """

    def __init__(self, *, word: int = 0, bits: int = 0, file: int = -1, width: int = 4) -> None:
        self._record = Block(BELL)
        self._record["word"] = word
        self._record["bits"] = bits
        self._record["file"] = file
        self._record["width"] = width

    @property
    def number(self) -> int:
        """What rings take as a doorbell, as long as this object lives."""
        return -self._record.address

    def move(self, word: int) -> None:
        """Set the bits of another word from now on. Kernels may be ringing; the old word stays until they have done so once more."""
        self._record["word"] = word

    @property
    def failed(self) -> int:
        """The errno of the last write that failed, or 0."""
        return -self._record["failed"]


@inline
def strike(number: int) -> None:
    """Signal by the bell with this number."""
    bell = _bell_at(-number)
    word = load64(-number + _WORD)
    if word != 0 and or32(word, bell.bits) & bell.bits != 0:
        return
    if bell.file >= 0:
        store64(-number + _SCRATCH, 1)
        result = sys_write(bell.file, -number + _SCRATCH, bell.width)
        if result < 0:
            bell.failed = result
