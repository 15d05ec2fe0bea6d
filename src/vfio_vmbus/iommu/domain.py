"""`Domain`: one client's IO address space.

A client maps memory that it owns (sealed memfds) at IOVAs of its choice; every address in its packets goes through here.
What is not mapped, not mapped for that direction, or runs over a mapping's end is refused, counted and kept, and nothing is touched.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DmaError, IsolationFault
from ..memory.block import Block
from ..memory.mapping import PAGE, Mapping, Piece
from ..memory.shared import side_by_side
from .translation import (
    DIRECTION,
    DOMAIN,
    ENTRY,
    FAULT_SLOTS,
    KEPT_FAULTS,
    LAST_ADDRESS,
    NOT_MAPPED,
    OVER_END,
    READ,
    REASONS,
    WRAPS,
    WRITE,
    put_in_force,
)

IOVA_LIMIT = 1 << 62
"""IOVAs lie below it, so that no sum of an address and a length overflows in a kernel."""

RETAINED = 16
"""Replaced tables that may be alive at once; then the data plane is stopped for a moment and they go."""


@dataclass(frozen=True)
class DmaMap:
    """One mapping: [iova, iova + size) is `mapping`, over `fd` from `offset` on. `access`: READ, WRITE or both, as the device sees it."""

    iova: int
    size: int
    fd: int
    offset: int
    access: int
    mapping: Mapping

    @property
    def end(self) -> int:
        return self.iova + self.size


@dataclass(frozen=True)
class Fault:
    """A request that was refused: `size` bytes at `iova`; direction "read" or "write" as the device saw it."""

    device: str
    iova: int
    size: int
    direction: str
    reason: str


class Domain:
    """Maps of one client. All methods may be called from any thread.

    max_maps: a map costs this process a descriptor and up to three of the 65530 mappings that Linux lets it have.
    quiesce: a context in which no kernel uses the domain (the worker's pause); entered before memory goes away, never twice at a time.
    revoke: called with (iova, size) before an unmap, so that whoever uses that memory (GPADLs, channels) closes first.
    """

    def __init__(self, device: str, *, max_maps: int = 512, max_bytes: int = 1 << 40) -> None:
        self.device = device
        self.max_maps = max_maps
        self.max_bytes = max_bytes
        self.quiesce: Callable[[], AbstractContextManager[object]] = nullcontext
        self.revoke: Callable[[int, int], None] = lambda iova, size: None
        self._maps: list[DmaMap] = []
        self._starts: list[int] = []
        self._bytes = 0
        self._lock = RLock()
        self._state = Block(DOMAIN)
        self._own_faults: deque[Fault] = deque(maxlen=KEPT_FAULTS)
        self._own_fault_count = 0
        self._retained: list[Block] = []
        self._table = Block(ENTRY)
        self._state["table"] = self._table.address

    @property
    def address(self) -> int:
        """The DOMAIN record, for kernels."""
        return self._state.address

    @property
    def maps(self) -> tuple[DmaMap, ...]:
        with self._lock:
            return tuple(self._maps)

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        """Let the device reach `size` bytes of `fd` at `iova`. Raises DmaError: alignment, overlap, limits, memory not sealed."""
        with self._lock:
            at = self._place(iova, size)
            if offset < 0 or offset % PAGE:
                raise DmaError(f"file offset {offset:#x} is not a multiple of {PAGE}")
            if access not in (READ, WRITE, READ | WRITE):
                raise DmaError(f"access {access:#x}: take READ ({READ}), WRITE ({WRITE}) or both")
            if len(self._retained) >= RETAINED:
                with self.quiesce():
                    self._retained.clear()
            own = _duplicate(fd)
            try:
                mapping = side_by_side([Piece(own, offset, size, bool(access & WRITE))], populate=False)
            except BaseException:
                os.close(own)
                raise
            self._maps.insert(at, DmaMap(iova, size, own, offset, access, mapping))
            self._starts.insert(at, iova)
            self._bytes += size
            row = np.array([(iova, iova + size, mapping.address, access)], self._table.array.dtype)
            self._publish(np.insert(self._table.array[1:], at, row))

    def unmap(self, iova: int, size: int) -> int:
        """Take back all maps inside [iova, iova + size); returns their bytes. Raises DmaError where that would split a map."""
        with self._lock:
            _check_range(iova, size)
            inside = [entry for entry in self._maps if entry.iova < iova + size and iova < entry.end]
            for entry in inside:
                if entry.iova < iova or entry.end > iova + size:
                    raise DmaError(f"[{iova:#x}, {iova + size:#x}) would split the map [{entry.iova:#x}, {entry.end:#x})")
            if not inside:
                return 0
            self.revoke(iova, size)
            rows = self._table.array[1:]
            with self.quiesce():
                self._publish(rows[(rows["iova"] < iova) | (rows["iova"] >= iova + size)])
                self._retained.clear()
            self._maps = [entry for entry in self._maps if not iova <= entry.iova < iova + size]
            self._starts = [entry.iova for entry in self._maps]
            for entry in inside:
                entry.mapping.close()
                os.close(entry.fd)
            freed = sum(entry.size for entry in inside)
            self._bytes -= freed
            return freed

    def close(self) -> None:
        """Take everything back."""
        if self._maps:
            self.unmap(0, IOVA_LIMIT)

    def pieces(self, iova: int, size: int, access: int) -> list[Piece]:
        """The file ranges behind [iova, iova + size), across neighbouring maps. Raises IsolationFault, and counts it.

        Their descriptors are the domain's, open until the memory is unmapped; `revoke` comes before.
        """
        with self._lock:
            if size <= 0:
                raise self._fault(iova, size, access, WRAPS)
            found = []
            at, end = iova, iova + size
            while at < end:
                entry = self._at(at)
                reason = self._refusal(entry, at, min(end, entry.end if entry else end) - at, access)
                if entry is None or reason:
                    raise self._fault(at, end - at, access, reason)
                step = min(end, entry.end) - at
                found.append(Piece(entry.fd, entry.offset + at - entry.iova, step, bool(entry.access & WRITE)))
                at += step
            return found

    def access(self, iova: int, size: int) -> int:
        """The access that all of [iova, iova + size) is mapped with; 0 if any of it is not mapped."""
        with self._lock:
            common = READ | WRITE
            at = iova
            while at < iova + size:
                entry = self._at(at)
                if entry is None:
                    return 0
                common &= entry.access
                at = entry.end
            return common

    def translate(self, iova: int, size: int, access: int) -> int:
        """The address of [iova, iova + size) in this process; it must lie in one map. Raises IsolationFault, and counts it."""
        with self._lock:
            entry = self._at(iova)
            reason = self._refusal(entry, iova, size, access)
            if entry is None or reason:
                raise self._fault(iova, size, access, reason)
            return entry.mapping.address + iova - entry.iova

    def read(self, iova: int, size: int) -> bytes:
        """A copy of [iova, iova + size), which must lie in one map. Raises IsolationFault, and counts it."""
        with self._lock:
            return ctypes.string_at(self.translate(iova, size, READ), size)

    @property
    def fault_count(self) -> int:
        """Requests refused since the start, by kernels and by Python."""
        return self._state["faults"] + self._own_fault_count

    def faults(self) -> list[Fault]:
        """The latest faults: up to 64 of the control plane, then up to 64 of the data plane, each oldest first."""
        with self._lock:
            count = self._state["faults"]
            kept = self._state.array["kept"][0].tolist()
            overwritten = self._state["faults"] - FAULT_SLOTS  # up to this one, if a kernel goes on refusing meanwhile
            first = max(0, count - KEPT_FAULTS, overwritten + 1)
            rows = [kept[index % FAULT_SLOTS] for index in range(first, count)]
            return [*self._own_faults, *(self._describe(*row) for row in rows)]

    def _place(self, iova: int, size: int) -> int:
        """Where in the list of maps a new one belongs. Raises DmaError where none can be."""
        _check_range(iova, size)
        if len(self._maps) >= self.max_maps:
            raise DmaError(f"there are {len(self._maps)} maps, limit {self.max_maps}: map larger pieces")
        if self._bytes + size > self.max_bytes:
            raise DmaError(f"{self._bytes} bytes are mapped, {size} more exceed the limit of {self.max_bytes} bytes")
        at = bisect_right(self._starts, iova)
        for near in self._maps[max(at - 1, 0) : at + 1]:
            if near.iova < iova + size and iova < near.end:
                raise DmaError(f"[{iova:#x}, {iova + size:#x}) overlaps the map [{near.iova:#x}, {near.end:#x})")
        return at

    def _at(self, iova: int) -> DmaMap | None:
        index = bisect_right(self._starts, iova) - 1
        return self._maps[index] if index >= 0 and iova < self._maps[index].end else None

    @staticmethod
    def _refusal(entry: DmaMap | None, iova: int, size: int, access: int) -> int:
        """0, or the reason why `entry` does not grant it. The same rules as the kernels' `lookup`."""
        if size <= 0 or iova < 0 or size > LAST_ADDRESS - iova:
            return WRAPS
        if entry is None:
            return NOT_MAPPED
        if iova + size > entry.end:
            return OVER_END
        return 0 if entry.access & access == access else DIRECTION

    def _describe(self, iova: int, size: int, access: int, reason: int) -> Fault:
        iova &= (1 << 64) - 1  # kernels see a guest's 64 bits as a signed number
        return Fault(self.device, iova, size, "write" if access & WRITE else "read", REASONS[reason])

    def _fault(self, iova: int, size: int, access: int, reason: int) -> IsolationFault:
        fault = self._describe(iova, size, access, reason)
        self._own_faults.append(fault)
        self._own_fault_count += 1
        return IsolationFault(self.device, fault.iova, size, fault.direction, fault.reason)

    def _publish(self, rows: NDArray[Any]) -> None:
        """Put a new table in force. The old one stays until no kernel can be reading it."""
        table = Block(ENTRY, len(rows) + 1)
        table.array["iova"][0] = len(rows)
        table.array[1:] = rows
        self._retained.append(self._table)
        self._table = table
        put_in_force(self.address, table.address)


def _check_range(iova: int, size: int) -> None:
    if iova < 0 or size <= 0 or iova % PAGE or size % PAGE or iova + size > IOVA_LIMIT:
        raise DmaError(f"[{iova:#x}, {iova + size:#x}): take multiples of {PAGE} bytes below {IOVA_LIMIT:#x}")


def _duplicate(fd: int) -> int:
    """A descriptor of our own. Raises DmaError for one that is not open, or when this process has too many."""
    try:
        return os.dup(fd)
    except (OSError, OverflowError) as error:
        raise DmaError(f"descriptor {fd} cannot be used: {error}") from error
