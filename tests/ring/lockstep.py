"""Two rings side by side: one driven by the ends under test, one by the reference, with the same operations.

After every operation both must show the same answer, the same memory byte by byte, the same counters and the same broken rule.
Either end of the tested ring can itself be the reference, so that each end is also tried against a peer that shares no code with it.
Hostile writes go to both rings. `decode` makes operations out of any bytes, for fuzzing.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from vfio_vmbus.errors import RingError
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.ring.bursts import PACKET
from vfio_vmbus.ring.ends import IncomingRing, OutgoingRing
from vfio_vmbus.ring.reference import IncomingReference, OutgoingReference
from vfio_vmbus.ring.state import RULES

ROWS = 40
"""Most packets of one burst."""


@dataclass(frozen=True)
class Sample:
    """A packet to send: whole 8-byte words between descriptor and data, then `length` bytes of data made from `seed`."""

    kind: int = 6
    flags: int = 0
    trans_id: int = 0
    words: int = 0
    length: int = 0
    seed: int = 0

    @property
    def body(self) -> bytes:
        """Everything behind the descriptor, unpadded."""
        size = 8 * self.words + self.length
        return (bytes(range(256)) * (size // 256 + 2))[self.seed % 256 :][:size]

    @property
    def raw(self) -> bytes:
        """The packet as it must lie in the ring."""
        body = self.body + bytes(-len(self.body) % 8)
        head = struct.pack("<HHHHQ", self.kind, 2 + self.words, 2 + len(body) // 8, self.flags, self.trans_id)
        return head + body


def signed(value: int) -> int:
    """64 bits as the signed number that tables hold."""
    return value - (1 << 64) if value >> 63 else value


class TestedWriter:
    """An OutgoingRing with the reference's methods."""

    def __init__(self, ring: OutgoingRing) -> None:
        self.ring = ring
        self.table = Block(PACKET, ROWS)

    def send(self, samples: list[Sample]) -> int:
        """All of them as one burst out of private memory of exactly their size."""
        bodies = b"".join(sample.body for sample in samples)
        memory = Block("u1", len(bodies))
        memory.array[:] = np.frombuffer(bodies, np.uint8)
        at = 0
        for row, sample in enumerate(samples):
            front = 8 * sample.words
            place = at + front
            self.table.array[row] = (
                place,
                sample.length,
                signed(sample.trans_id),
                sample.kind,
                sample.flags,
                16 + front,
            )
            at += front + sample.length
        before = self.ring.statistics().packets
        try:
            return self.ring.send_burst(memory, self.table, len(samples))
        except RingError:
            return self.ring.statistics().packets - before

    def look(self) -> int:
        try:
            return self.ring.room
        except RingError:
            return 0

    def want(self, size: int) -> int:
        try:
            return self.ring.want(size)
        except RingError:
            return 0


class ReferenceWriter(OutgoingReference):
    """The reference, taking samples."""

    def send(self, samples: list[Sample]) -> int:  # type: ignore[override]
        return super().send([sample.raw for sample in samples])


class TestedReader:
    """An IncomingRing with the reference's methods."""

    def __init__(self, ring: IncomingRing) -> None:
        self.ring = ring
        self.table = Block(PACKET, ROWS)
        self.memory = Block("u1", ring.size)

    def receive(self, count: int) -> list[bytes]:
        try:
            received = self.ring.receive_burst(self.memory, self.table, count)
        except RingError:
            return []
        return [self._whole(row, self.memory.array) for row in self.table.array[:received]]

    def hold(self, count: int) -> list[bytes]:
        try:
            held = self.ring.receive_in_place(self.table, count)
        except RingError:
            return []
        data = np.frombuffer(self.ring.mapping.read(PAGE, self.ring.data.size), np.uint8)
        return [self._whole(row, data) for row in self.table.array[:held]]

    @staticmethod
    def _whole(row: Any, memory: Any) -> bytes:
        """A packet put together again from a row and the memory it points into."""
        begin = int(row["offset"]) - int(row["header"]) + 16
        body = memory[begin : int(row["offset"]) + int(row["length"])].tobytes()
        length8, trans_id = 2 + len(body) // 8, int(row["trans_id"]) % (1 << 64)
        return struct.pack("<HHHHQ", row["kind"], row["header"] // 8, length8, row["flags"], trans_id) + body

    def commit(self) -> bool:
        before = self.ring.statistics().signals
        try:
            return self.ring.commit()
        except RingError:
            return self.ring.statistics().signals > before

    def mask(self, masked: int) -> bool:
        if masked:
            self.ring.mask()
            return False
        try:
            return self.ring.unmask()
        except RingError:
            return False


class ReferenceReader(IncomingReference):
    """The reference, deaf to what `mask` answers when it masks."""

    def mask(self, masked: int) -> bool:
        ready = super().mask(masked)
        return ready and not masked

    def _next(self) -> bytes | None:
        packet = super()._next()  # the flags' top bit is reserved, and nobody hands it on
        return packet and packet[:7] + bytes([packet[7] & 0x7F]) + packet[8:]


def state_of(end: Any) -> tuple[Any, ...]:
    """Counters and fault of an end, whichever kind it is."""
    if isinstance(end, (TestedWriter, TestedReader)):
        counted = end.ring.statistics()
        fault = None
        try:
            end.ring.check()
        except RingError as error:
            fault = str(error).partition(": ")[2]
        full = counted.full if isinstance(end, TestedWriter) else 0
        return counted.packets, counted.bytes, counted.signals, full, fault
    fault = None
    if end.broken:
        rule, value, limit = end.broken
        fault = f"{RULES[rule]}: {value} bytes, limit {limit} bytes"
    return end.packets, end.bytes, end.signals, getattr(end, "full", 0), fault


class Lockstep:
    """The tested ring and the reference's, each of `pages` data pages. A context manager."""

    def __init__(self, pages: int, writer_tested: bool = True, reader_tested: bool = True) -> None:
        self.size = pages * PAGE
        self.oracle = bytearray(PAGE + self.size)
        self.oracle[64] = 1
        self.shared = SharedMemory(PAGE + self.size)
        self.mapping = self.shared.map(wrap_from=PAGE)
        self.mapping.write(64, b"\x01")
        self.view = memoryview((ctypes.c_uint8 * (PAGE + self.size)).from_address(self.mapping.address)).cast("B")
        self.writer: Any = TestedWriter(OutgoingRing(self.mapping)) if writer_tested else ReferenceWriter(self.view)
        self.reader: Any = TestedReader(IncomingRing(self.mapping)) if reader_tested else ReferenceReader(self.view)
        self.reference_writer = ReferenceWriter(memoryview(self.oracle))
        self.reference_reader = ReferenceReader(memoryview(self.oracle))

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *exc: object) -> None:
        self.view.release()
        self.mapping.close()
        self.shared.close()

    def do(self, name: str, *arguments: Any) -> Any:
        """One operation on both rings; their answer. AssertionError where they differ in anything."""
        if name == "poke":
            self._poke(*arguments)
            return None
        if name == "forge":
            self._forge(*arguments)
            return None
        side = "writer" if name in ("send", "look", "want") else "reader"
        tested, reference = getattr(self, side), getattr(self, f"reference_{side}")
        expected = getattr(reference, name)(*arguments)
        answer = getattr(tested, name)(*arguments)
        assert answer == expected, f"{name}{arguments}"
        assert self.view == self.oracle, f"memory after {name}"
        assert state_of(tested) == state_of(reference), f"state after {name}"
        return answer

    def _poke(self, offset: int, data: bytes) -> None:
        """The other side, whoever that is, writes anything anywhere."""
        for memory in (self.view, self.oracle):
            memory[offset : offset + len(data)] = data

    def _forge(self, field: int, value: int) -> None:
        """A hostile writer changes 16 bits of the packet that is read next: 0 type, 1 offset / 8, 2 length / 8, 3 flags."""
        at = PAGE + self.reference_reader.index + 2 * field
        self._poke(at, struct.pack("<H", value))


def decode(data: bytes) -> tuple[int, list[tuple[Any, ...]]]:
    """Ring pages, and operations, out of any bytes: each byte string means something."""
    stream = iter(data)

    def number(size: int = 1) -> int:
        return int.from_bytes(bytes(next(stream) for _ in range(size)), "little")

    operations: list[tuple[Any, ...]] = []
    pages = 1
    try:
        pages = 1 + number() % 3
        while True:
            operations.append(_operation(number, pages))
    except (StopIteration, RuntimeError):  # a generator turns the end of the stream into a RuntimeError
        return pages, operations


def _operation(number: Any, pages: int) -> tuple[Any, ...]:
    choice = number() % 12
    if choice < 3:
        return ("send", [_sample(number) for _ in range(number() % ROWS)])
    if choice < 5:
        return ("receive", number() % ROWS)
    if choice == 5:
        return ("hold", number() % ROWS)
    if choice == 6:
        return ("commit",)
    if choice == 7:
        return ("mask", number() & 1)
    if choice == 8:
        return ("want", number(2) % (pages * PAGE))
    if choice == 9:
        return ("look",)
    if choice == 10:
        return ("forge", number() % 4, number(2))
    offset = (0, 4, 8, 12, 64)[number() % 5]
    value = number(4) if number() & 1 else 8 * number(2) % (pages * PAGE)  # anything, or a place in the ring
    return ("poke", offset, value.to_bytes(4, "little"))


def _sample(number: Any) -> Sample:
    length = number(2) % (64 if number() & 1 else 2000)
    return Sample(number(2), number(2) & 0x7FFF, number(4) << number() % 33, number() % 5, length, number())
