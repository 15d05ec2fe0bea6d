"""`Domain`: one client's IO address space.

A client maps memory that it owns (sealed memfds) at IOVAs of its choice; every address in its packets goes through here.
What is not mapped, not mapped for that direction, or runs over a mapping's end is refused, counted and kept, and nothing is touched.
What it has in other files, or at home only, can be in the domain as well, for devices that copy (`map_unmapped`).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import RLock

from ..errors import DmaError, IsolationFault
from ..memory.block import Block
from ..memory.mapping import PAGE, Piece
from .files import Files, Window
from .table import Table
from .translation import (
    DIRECTION,
    DOMAIN,
    FAULT_SLOTS,
    KEPT_FAULTS,
    LAST_ADDRESS,
    NOT_MAPPED,
    NOT_MEMORY,
    OVER_END,
    READ,
    REASONS,
    WRAPS,
    WRITE,
)

IOVA_LIMIT = 1 << 62
"""IOVAs lie below it, so that no sum of an address and a length overflows in a kernel."""

MAX_MAPS = 65535
"""As many as the kernel's VFIO allows by default; a virtual IOMMU makes one for each page that a guest's driver uses."""

RETAINED = 16
"""Replaced tables that may be alive at once; then the data plane is stopped for a moment and they go."""


@dataclass(frozen=True, slots=True)
class DmaMap:
    """One mapping: [iova, iova + size) is a file from `offset` on, at `address`. `access`: READ, WRITE or both, as the device sees it.

    address is 0 for what is not in this process's memory; window is None for what is in no file, but at the client's.
    """

    iova: int
    size: int
    offset: int
    access: int
    window: Window | None
    address: int

    @property
    def end(self) -> int:
        return self.iova + self.size

    @property
    def fd(self) -> int:
        """The domain's descriptor of the file; -1 without one."""
        return self.window.fd if self.window else -1


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

    max_maps, max_bytes: of all maps together. Maps of one file share its descriptor and its mapping (`files`).
    quiesce: a context in which no kernel uses the domain (the worker's pause); entered before memory goes away, never twice at a time.
    revoke: called with (iova, size) before an unmap, so that whoever uses that memory (GPADLs, channels) closes first.
    """

    def __init__(self, device: str, *, max_maps: int = MAX_MAPS, max_bytes: int = 1 << 40) -> None:
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
        self._files = Files()
        self._table = Table(self._state.address)

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
            at = self._check(iova, size, offset, access)
            self._make_room()
            window = self._files.take(fd, offset, size, bool(access & WRITE))
            self._insert(at, DmaMap(iova, size, offset, access, window, window.address(offset)))

    def map_unmapped(self, iova: int, size: int, access: int, fd: int | None = None, offset: int = 0) -> None:
        """The same for memory that is never in this process: of a file that is read and written, or (None) at the client's, who is asked.

        `translate`, `pieces` and kernels refuse it (NOT_MEMORY); `find` finds it. Raises DmaError for other files than local ones.
        """
        with self._lock:
            at = self._check(iova, size, offset, access)
            self._make_room()
            window = None if fd is None else self._files.take_unmapped(fd, bool(access & WRITE))
            self._insert(at, DmaMap(iova, size, offset, access, window, 0))

    def unmap(self, iova: int, size: int) -> int:
        """Take back all maps inside [iova, iova + size); returns their bytes. Raises DmaError where that would split a map."""
        with self._lock:
            _check_range(iova, size)
            end = iova + size
            first, last = bisect_left(self._starts, iova), bisect_left(self._starts, end)
            for entry in self._maps[max(first - 1, 0) : last]:
                if entry.iova < iova < entry.end or entry.iova < end < entry.end:
                    raise DmaError(f"[{iova:#x}, {end:#x}) would split the map [{entry.iova:#x}, {entry.end:#x})")
            if first == last:
                return 0
            self.revoke(iova, size)
            with self.quiesce():
                self._table.remove(iova, end)
                self._table.forget_replaced()
            inside = self._maps[first:last]
            del self._maps[first:last], self._starts[first:last]
            freed = sum(entry.size for entry in inside)
            self._bytes -= freed
            for entry in inside:
                if entry.window is not None:
                    self._files.give_back(entry.window)
            return freed

    def overlaps(self, iova: int, size: int) -> bool:
        """Is any of [iova, iova + size) mapped?"""
        with self._lock:
            at = bisect_left(self._starts, iova + size)
            return at > 0 and self._maps[at - 1].end > iova

    def has_room(self, size: int) -> bool:
        """May another map of `size` bytes be made?"""
        with self._lock:
            return len(self._maps) < self.max_maps and self._bytes + size <= self.max_bytes

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
                raise self.fault(iova, size, access, WRAPS)
            found = []
            at, end = iova, iova + size
            while at < end:
                entry = self.find(at, end - at, access)
                if not entry.address:
                    raise self.fault(at, end - at, access, NOT_MEMORY)
                step = min(end, entry.end) - at
                found.append(Piece(entry.fd, entry.offset + at - entry.iova, step, bool(entry.access & WRITE)))
                at += step
            return found

    def find(self, iova: int, size: int, access: int) -> DmaMap:
        """The map that [iova, iova + size) begins in, and may leave. Raises IsolationFault, and counts it."""
        with self._lock:
            entry = self._at(iova)
            end = iova + size
            reason = self._refusal(entry, iova, min(end, entry.end if entry else end) - iova, access)
            if entry is None or reason:
                raise self.fault(iova, size, access, reason)
            return entry

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
            reason = self._refusal(entry, iova, size, access) or (0 if entry and entry.address else NOT_MEMORY)
            if entry is None or reason:
                raise self.fault(iova, size, access, reason)
            return entry.address + iova - entry.iova

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

    def fault(self, iova: int, size: int, access: int, reason: int) -> IsolationFault:
        """Count and keep a refusal, for who reaches the client's memory in another way; to be raised."""
        with self._lock:
            fault = self._describe(iova, size, access, reason)
            self._own_faults.append(fault)
            self._own_fault_count += 1
            return IsolationFault(self.device, fault.iova, size, fault.direction, fault.reason)

    def _check(self, iova: int, size: int, offset: int, access: int) -> int:
        """Where in the list of maps a new one belongs. Raises DmaError where none can be."""
        _check_range(iova, size)
        if offset < 0 or offset % PAGE:
            raise DmaError(f"file offset {offset:#x} is not a multiple of {PAGE}")
        if access not in (READ, WRITE, READ | WRITE):
            raise DmaError(f"access {access:#x}: take READ ({READ}), WRITE ({WRITE}) or both")
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

    def _make_room(self) -> None:
        """Let replaced tables go before there are too many of them."""
        if self._table.replaced >= RETAINED:
            with self.quiesce():
                self._table.forget_replaced()

    def _insert(self, at: int, entry: DmaMap) -> None:
        self._maps.insert(at, entry)
        self._starts.insert(at, entry.iova)
        self._bytes += entry.size
        self._table.insert(entry.iova, entry.end, entry.address, entry.access)


def _check_range(iova: int, size: int) -> None:
    if iova < 0 or size <= 0 or iova % PAGE or size % PAGE or iova + size > IOVA_LIMIT:
        raise DmaError(f"[{iova:#x}, {iova + size:#x}): take multiples of {PAGE} bytes below {IOVA_LIMIT:#x}")
