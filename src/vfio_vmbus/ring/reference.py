"""A ring in plain Python, for reading and as the oracle of the tests: the same rules as `primitives`, byte by byte.

It shares no code with the kernels and needs no double mapping: whatever runs past the end of the data area is cut in two.
Packets are bytes from descriptor to padding, without footer. Rules of Linux drivers/hv/ring_buffer.c: who signals when
(hv_signal_on_write, hv_pkt_iter_close), equal indices mean empty, so the last byte is never filled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .state import BAD_INDEX, BAD_LENGTH, BAD_MOVE, BAD_OFFSET

_CONTROL = 4096
_WRITE, _READ, _MASK, _PENDING, _FEATURES = 0, 4, 8, 12, 64
_DESCRIPTOR = struct.Struct("<HHHHQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class _Reference:
    """One end over `memory`: control page, then data. `broken` is None or (rule, value, limit), and stays."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.size = len(memory) - _CONTROL
        self.index = 0  # own index
        self.shown = 0  # as the other side sees it
        self.room = 0  # bytes free or readable by the last look at the other side's index
        self.signals = 0
        self.packets = 0
        self.bytes = 0
        self.broken: tuple[int, int, int] | None = None

    def _load(self, offset: int) -> int:
        value: int = _U32.unpack_from(self.memory, offset)[0]
        return value

    def _store(self, offset: int, value: int) -> None:
        _U32.pack_into(self.memory, offset, value)

    def _break(self, rule: int, value: int, limit: int) -> None:
        self.broken = self.broken or (rule, value, limit)
        self.room = 0

    def _peer_index(self, offset: int) -> int | None:
        index = self._load(offset)
        if index >= self.size or index % 8:
            self._break(BAD_INDEX, index, self.size)
            return None
        return index

    def _advance(self, total: int) -> None:
        self.index = (self.index + total) % self.size
        self.room -= total
        self.packets += 1

    def _show(self) -> int:
        before, self.shown = self.shown, self.index
        self.bytes += (self.index - before) % self.size
        return before

    def _get(self, index: int, length: int) -> bytes:
        start = _CONTROL + index
        first = bytes(self.memory[start : min(start + length, len(self.memory))])
        return first + bytes(self.memory[_CONTROL : _CONTROL + length - len(first)])

    def _put(self, index: int, data: bytes) -> None:
        start = _CONTROL + index
        fits = min(len(data), len(self.memory) - start)
        self.memory[start : start + fits] = data[:fits]
        self.memory[_CONTROL : _CONTROL + len(data) - fits] = data[fits:]


class OutgoingReference(_Reference):
    """The writer's end."""

    full = 0

    def look(self) -> int:
        """Bytes free now; 0 when broken."""
        if self.broken is None and (read := self._peer_index(_READ)) is not None:
            free = (read - self.index - 1) % self.size + 1
            if self.room <= free <= self.size - (self.index - self.shown) % self.size:
                self.room = free
            else:
                self._break(BAD_MOVE, read, self.size)
        return self.room

    def want(self, size: int) -> int:
        """Ask for a signal when more than `size` bytes become free; the bytes free now."""
        self._store(_PENDING, size)
        return self.look()

    def send(self, packets: Sequence[bytes]) -> int:
        """Write what there is room for, show it at once, and signal if the ring was empty and unmasked; how many."""
        sent = 0
        for packet in packets:
            total = len(packet) + 8
            if self.room <= total and self.look() <= total:
                self.full += 1
                break
            self._put(self.index, packet + _U64.pack(self.index << 32))
            self._advance(total)
            sent += 1
        if sent:
            before = self._show()
            self._store(_WRITE, self.index)
            if self._load(_MASK) == 0 and self._load(_READ) == before:
                self.signals += 1
        return sent


class IncomingReference(_Reference):
    """The reader's end."""

    def ready(self) -> bool:
        """Is there something to read?"""
        if self.broken is None and self.room == 0 and (write := self._peer_index(_WRITE)) is not None:
            ready = (write - self.index) % self.size
            if (self.index - self.shown) % self.size + ready < self.size:
                self.room = ready
            else:
                self._break(BAD_MOVE, write, self.size)
        return self.room > 0

    def hold(self, count: int) -> list[bytes]:
        """Up to `count` packets; their space stays taken until `commit`. Fewer where one breaks a rule."""
        held: list[bytes] = []
        while len(held) < count and self.ready():
            packet = self._next()
            if packet is None:
                break
            held.append(packet)
            self._advance(len(packet) + 8)
        return held

    def _next(self) -> bytes | None:
        _, offset8, length8, _, _ = _DESCRIPTOR.unpack(self._get(self.index, _DESCRIPTOR.size))
        offset, length = offset8 * 8, length8 * 8
        if length < _DESCRIPTOR.size or length + 8 > self.room:
            self._break(BAD_LENGTH, length, self.room - 8)
            return None
        if not _DESCRIPTOR.size <= offset <= length:
            self._break(BAD_OFFSET, offset, length)
            return None
        return self._get(self.index, length)

    def commit(self) -> bool:
        """Give all held space back; signal a writer that waits for more room than it had and now has it."""
        if self.index == self.shown:
            return False
        before = self._show()
        self._store(_READ, self.index)
        pending = self._load(_PENDING)
        if pending == 0 or self._load(_FEATURES) & 1 == 0:
            return False
        write = self._peer_index(_WRITE)
        if write is None:
            return False
        free = (self.index - write - 1) % self.size + 1
        freed = (self.index - before) % self.size
        if free <= pending or free - freed > pending:
            return False
        self.signals += 1
        return True

    def receive(self, count: int) -> list[bytes]:
        """`hold` and `commit` in one."""
        held = self.hold(count)
        self.commit()
        return held

    def mask(self, masked: int) -> bool:
        """Tell the writer whether it need not signal (1) or may (0); is there something to read?"""
        self._store(_MASK, masked)
        return self.ready()
