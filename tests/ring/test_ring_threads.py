"""A writer and a reader at the same time, on threads of their own: every byte arrives once, and no wake-up is lost."""

import ctypes
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import INTERPRETED
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.ring.bursts import PACKET
from vfio_vmbus.ring.ends import IncomingRing, OutgoingRing

PATIENCE = 60.0
"""Seconds after which a side that waits gives up; only a defect makes it wait that long."""
POOL = np.random.default_rng(1).integers(0, 256, 1 << 16, np.uint8)
"""Packet `n` carries POOL[place(n) : place(n) + length(n)]."""
BURST = 32


def place(number: int) -> int:
    return number * 7919 % 60_000


def length(number: int, longest: int) -> int:
    return 8 * (1 + number * 31 % (longest // 8))


class Writer:
    """Sends packets 0 .. total - 1 in bursts; `wait` is called when the ring is full."""

    def __init__(self, ring: OutgoingRing, total: int, longest: int, wait: Callable[[], None]) -> None:
        self.ring, self.total, self.longest, self.wait = ring, total, longest, wait

    def run(self) -> None:
        memory, table = Block("u1", len(POOL)), Block(PACKET, BURST)
        memory.array[:] = POOL
        done = 0
        while done < self.total:
            numbers = range(done, min(done + BURST, self.total))
            rows = [(place(n), length(n, self.longest), n, 6, 0, 16) for n in numbers]
            table.array[: len(rows)] = rows
            sent = self.ring.send_burst(memory, table, len(rows))
            done += sent
            if sent == 0:
                self.wait()


class Reader:
    """Receives `total` packets and compares each; `wait` is called when the ring is empty. Every other burst in place."""

    def __init__(self, ring: IncomingRing, total: int, longest: int, wait: Callable[[], None]) -> None:
        self.ring, self.total, self.longest, self.wait = ring, total, longest, wait

    def run(self) -> None:
        copied, table = Block("u1", 1 << 16), Block(PACKET, BURST)
        area = self.ring.data
        data = np.frombuffer((ctypes.c_uint8 * area.size).from_address(area.address), np.uint8)
        done = bursts = 0
        while done < self.total:
            bursts += 1
            if bursts % 2:
                received = self.ring.receive_burst(copied, table)
                self.compare(done, received, table, copied.array)
            else:
                received = self.ring.receive_in_place(table)
                self.compare(done, received, table, data)
                self.ring.commit()
            done += received
            if received == 0:
                self.wait()

    def compare(self, first: int, count: int, table: Block, memory: np.ndarray) -> None:
        for number, row in zip(range(first, first + count), table.array[:count].tolist(), strict=True):
            offset, size, trans_id, *_ = row
            assert (trans_id, size) == (number, length(number, self.longest))
            expected = POOL[place(number) : place(number) + size]
            assert memory[offset : offset + size].tobytes() == expected.tobytes(), f"content of packet {number}"


@contextmanager
def two_mappings(pages: int) -> Iterator[tuple[OutgoingRing, IncomingRing, int, int]]:
    """Both ends, mapped apart, and the doorbells: for the reader, for the writer."""
    size = (1 + pages) * PAGE
    to_reader, to_writer = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    with SharedMemory(size) as memory, memory.map(wrap_from=PAGE) as one, memory.map(wrap_from=PAGE) as other:
        one.write(64, b"\1")
        yield OutgoingRing(one, to_reader), IncomingRing(other, to_writer), to_reader, to_writer
    os.close(to_reader)
    os.close(to_writer)


def run_both(writer: Writer, reader: Reader) -> None:
    """Until both are done; what the reader found wrong is raised here."""
    problems: list[BaseException] = []

    def work() -> None:
        try:
            writer.run()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        reader.run()
    except Exception:
        if problems:
            raise problems[0] from None
        raise
    thread.join(PATIENCE)
    assert not problems
    assert not thread.is_alive()


def impatient() -> Callable[[], None]:
    """A wait that only yields the CPU, and gives up after PATIENCE seconds in all."""
    deadline = time.monotonic() + PATIENCE

    def wait() -> None:
        assert time.monotonic() < deadline, "no progress"
        os.sched_yield()

    return wait


def test_every_byte_arrives_once_while_both_poll() -> None:
    total = 5_000 if INTERPRETED else 100_000
    with two_mappings(4) as (outgoing, incoming, _, _):
        run_both(Writer(outgoing, total, 400, impatient()), Reader(incoming, total, 400, impatient()))
        assert outgoing.statistics().packets == incoming.statistics().packets == total
        assert outgoing.statistics().bytes == incoming.statistics().bytes


@pytest.mark.parametrize("longest", [64, 1500])
def test_no_wake_up_is_lost_while_both_sleep(longest: int) -> None:
    """A side that finds nothing to do arms its signal, looks once more, and sleeps until its doorbell rings."""
    total = 2_000 if INTERPRETED else 20_000
    with two_mappings(1) as (outgoing, incoming, to_reader, to_writer):

        def sleep(bell: int) -> None:
            assert select.select([bell], [], [], PATIENCE)[0], "slept through: the signal was lost"
            os.eventfd_read(bell)

        def wait_for_room() -> None:
            largest = longest + 24
            if outgoing.want(largest) <= largest:
                sleep(to_writer)
            outgoing.want(0)

        def wait_for_packets() -> None:
            if not incoming.unmask():
                sleep(to_reader)
            incoming.mask()

        incoming.mask()
        run_both(Writer(outgoing, total, longest, wait_for_room), Reader(incoming, total, longest, wait_for_packets))
        assert outgoing.statistics().signals > 0
