"""What a vfio-user client has mapped for its server: what overlaps, what an unmap would split, and the bytes when it asks by message.

A map's file is read and written by pread and pwrite, so nothing is mapped into this process for it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass

from ...errors import DmaError, IsolationFault
from ...iommu.translation import READ, WRITE


@dataclass(frozen=True)
class ClientMap:
    """[iova, end) is `fd`, which the map owns, from `offset` on."""

    iova: int
    end: int
    fd: int
    offset: int
    access: int


class ClientMemory:
    """The maps of one device, `name`, in order. Who changes it while it may be read holds the connection's lock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._maps: list[ClientMap] = []
        self._starts: list[int] = []

    def __len__(self) -> int:
        return len(self._maps)

    def add(self, iova: int, size: int, fd: int, offset: int, access: int) -> ClientMap:
        """Enter a map, with a duplicate of `fd`. Raises DmaError where one is already, or when this process has too many descriptors."""
        at = bisect_right(self._starts, iova)
        for near in self._maps[max(at - 1, 0) : at + 1]:
            if near.iova < iova + size and iova < near.end:
                raise DmaError(f"[{iova:#x}, {iova + size:#x}) overlaps the map [{near.iova:#x}, {near.end:#x})")
        try:
            made = ClientMap(iova, iova + size, os.dup(fd), offset, access)
        except OSError as error:
            raise DmaError(f"descriptor {fd} cannot be used: {error}") from error
        self._maps.insert(at, made)
        self._starts.insert(at, iova)
        return made

    def within(self, iova: int, size: int) -> list[ClientMap]:
        """The maps inside [iova, iova + size). Raises DmaError where that would split one."""
        first = max(bisect_right(self._starts, iova) - 1, 0)
        last = bisect_right(self._starts, iova + size - 1)
        inside = [each for each in self._maps[first:last] if iova < each.end]
        for each in inside:
            if each.iova < iova or each.end > iova + size:
                raise DmaError(f"[{iova:#x}, {iova + size:#x}) would split the map [{each.iova:#x}, {each.end:#x})")
        return inside

    def remove(self, entry: ClientMap) -> None:
        """Forget a map."""
        at = bisect_right(self._starts, entry.iova) - 1
        del self._maps[at], self._starts[at]
        os.close(entry.fd)

    def clear(self) -> None:
        """Forget all maps."""
        while self._maps:
            self.remove(self._maps[-1])

    def read(self, iova: int, size: int) -> bytes:
        """What the device reads. Raises IsolationFault for what is not mapped for that."""
        pieces = [
            os.pread(each.fd, stop - start, each.offset + start - each.iova) for each, start, stop in self._find(iova, size, READ)
        ]
        return b"".join(pieces)

    def write(self, iova: int, data: bytes) -> None:
        """What the device writes. Raises IsolationFault; nothing is written then."""
        for each, start, stop in self._find(iova, len(data), WRITE):
            os.pwrite(each.fd, data[start - iova : stop - iova], each.offset + start - each.iova)

    def _find(self, iova: int, size: int, access: int) -> list[tuple[ClientMap, int, int]]:
        """Each map of [iova, iova + size), and from where to where in it. They are of sealed memory, as long as when they were mapped."""
        found = []
        at, end = iova, iova + size
        while at < end:
            index = bisect_right(self._starts, at) - 1
            if index < 0 or self._maps[index].end <= at:
                raise self._fault(iova, size, access, "not mapped")
            entry = self._maps[index]
            if not entry.access & access:
                raise self._fault(iova, size, access, "not mapped for this direction")
            found.append((entry, at, min(end, entry.end)))
            at = entry.end
        return found

    def _fault(self, iova: int, size: int, access: int, reason: str) -> IsolationFault:
        return IsolationFault(self._name, iova, size, "write" if access & WRITE else "read", reason)
