"""Numbers and bytes out of a fuzzer's bytes: each byte string means something."""

from __future__ import annotations


class Ended(Exception):
    """The bytes are used up."""


class Stream:
    """Reads from the front; raises Ended at the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size: int = 1) -> int:
        """Little-endian, of so many bytes."""
        return int.from_bytes(self.bytes(size), "little")

    def bytes(self, size: int) -> bytes:
        """Exactly so many."""
        if self._at + size > len(self._data):
            raise Ended
        self._at += size
        return self._data[self._at - size : self._at]

    def pick(self, *choices: int) -> int:
        """One of these, or any 32 bits."""
        index = self.number() % (len(choices) + 1)
        return choices[index] if index < len(choices) else self.number(4)
