"""Doorbells that are no eventfds: bits in a word that others change, and a file that gets the number 1."""

from __future__ import annotations

import os
import threading

from vfio_vmbus.memory.access import or32
from vfio_vmbus.memory.bell import Bell, strike
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import INTERPRETED, step
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.ring.pair import RingPair


@step("void(i8)")
def _strike(number: int) -> None:
    strike(number)


@step("void(i8, i8, i8)")
def _set_many(word: int, bits: int, times: int) -> None:
    for _ in range(times):
        or32(word, bits)


def test_bits_are_set_and_others_stay() -> None:
    word = Block("u4", 2)
    word.array[:] = (0x80000001, 7)
    bell = Bell(word=word.address, bits=1 << 5)
    _strike(bell.number)
    _strike(bell.number)
    assert word.array.tolist() == [0x80000021, 7]
    assert bell.failed == 0


def test_a_file_gets_the_number_one_in_four_bytes() -> None:
    reading, writing = os.pipe()
    bell = Bell(file=writing)
    _strike(bell.number)
    assert os.read(reading, 100) == b"\1\0\0\0"
    os.close(writing)
    os.close(reading)
    _strike(bell.number)
    assert os.strerror(bell.failed) == "Bad file descriptor"


def test_with_a_word_and_a_file_only_the_first_to_set_the_bit_writes() -> None:
    """As Hyper-V raises an interrupt for an event flag: the receiver clears the bit, then looks."""
    words = Block("u4", 2)
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    bell = Bell(word=words.address, bits=1 << 31, file=fd, width=8)
    for _ in range(3):
        _strike(bell.number)
    assert os.eventfd_read(fd) == 1
    words.array[0] = 0x7FFFFFFF
    _strike(bell.number)
    assert os.eventfd_read(fd) == 1
    assert words.array.tolist() == [0xFFFFFFFF, 0]
    bell.move(words.address + 4)
    _strike(bell.number)
    _strike(bell.number)
    assert os.eventfd_read(fd) == 1
    assert words.array.tolist() == [0xFFFFFFFF, 1 << 31]
    os.close(fd)


def test_a_ring_rings_it() -> None:
    reading, writing = os.pipe()
    bell = Bell(file=writing)
    with SharedMemory(4 * PAGE) as memory, RingPair.fresh(memory, 0, 2 * PAGE, 4 * PAGE, bell.number) as pair:
        assert pair.outgoing.send(b"hello")
        assert os.read(reading, 100) == b"\1\0\0\0"
        assert pair.outgoing.statistics().signals == 1
    os.close(reading)
    os.close(writing)


def test_nobodys_bit_is_lost() -> None:
    if INTERPRETED:
        return  # there it is not atomic, and says so
    word = Block("u4")
    threads = [threading.Thread(target=_set_many, args=(word.address, 1 << bit, 20000)) for bit in range(4)]
    for _ in range(20):
        word.array[0] = 0
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert word.array[0] == 0xF
        threads = [threading.Thread(target=_set_many, args=(word.address, 1 << bit, 20000)) for bit in range(4)]
