"""Access by address: what loads, stores, copies and records do, compiled or interpreted, and the checks of the latter."""

import os

import numpy as np
import pytest

from vfio_vmbus.memory import access
from vfio_vmbus.memory.access import copy, viewer
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import INTERPRETED, kernel
from vfio_vmbus.memory.libc import clock_ns, eventfd_signal, sys_poll, sys_read, sys_write
from vfio_vmbus.memory.registry import OutOfBounds, check, register, unregister

load8, load16, load32, load64 = access.load8, access.load16, access.load32, access.load64
store8, store16, store32, store64 = access.store8, access.store16, access.store32, access.store64


@kernel("i8(i8, i8)")
def every_width(target: int, value: int) -> int:
    store64(target, value)
    store32(target + 8, value)
    store16(target + 12, value)
    store8(target + 14, value)
    access.store32_release(target + 16, value)
    access.store64_release(target + 24, value)
    access.fence()
    access.pause()
    return load8(target) + load16(target) + load32(target) + load64(target)


@kernel("i8(i8, i8, i8)")
def copied(target: int, source: int, size: int) -> int:
    copy(target, source, size)
    return size


RECORD = np.dtype([("plain", "i8"), ("row", "i8", (3,)), ("inner", [("deep", "i8")])])
record_at = viewer(RECORD)


@kernel("i8(i8)")
def work_on_record(address: int) -> int:
    record = record_at(address)
    record.plain += 5
    record.row[2] = record.plain * 2
    record.inner.deep = -1
    return record.row[2]


def test_loads_and_stores_of_every_width() -> None:
    block = Block("u1", 32)
    value = -2
    total = every_width(block.address, value)
    assert total == 0xFE + 0xFFFE + 0xFFFFFFFE - 2
    raw = block.array.tobytes()
    assert raw[:15] == b"\xfe" + b"\xff" * 7 + b"\xfe\xff\xff\xff" + b"\xfe\xff" + b"\xfe"
    assert raw[15:] == b"\0" + b"\xfe\xff\xff\xff" + bytes(4) + b"\xfe" + b"\xff" * 7


def test_copies_of_every_length_touch_nothing_else() -> None:
    source, target = Block("u1", 1024), Block("u1", 1024)
    source.array[:] = np.random.default_rng(3).integers(1, 256, 1024)
    for size in [*range(300), 511, 512, 513, 960]:
        for skew in (0, 1, 7):
            target.array[:] = 0
            copied(target.address + 32 + skew, source.address + skew, size)
            assert target.array[32 + skew : 32 + skew + size].tobytes() == source.array[skew : skew + size].tobytes()
            assert not target.array[: 32 + skew].any()
            assert not target.array[32 + skew + size :].any()


def test_records_are_read_and_written_by_name() -> None:
    block = Block(RECORD, 2)
    address = block.address + RECORD.itemsize
    block.array[1]["plain"] = 2
    assert work_on_record(address) == 14
    assert block.array.view("i8").tolist() == [0, 0, 0, 0, 0, 7, 0, 0, 14, -1]


@pytest.mark.parametrize("kind", [[("a", "i8"), ("b", "u4")], [("a", "f8")], np.dtype([("a", "i1"), ("b", "i8")], align=True)])
def test_records_hold_int64_only(kind: object) -> None:
    with pytest.raises(TypeError, match="int64"):
        viewer(np.dtype(kind))


@pytest.mark.skipif(not INTERPRETED, reason="only interpreted kernels check each access")
@pytest.mark.parametrize("outside", [-8, -1, 25, 32, 1 << 40])
def test_interpreted_kernels_stop_at_the_end_of_their_memory(outside: int) -> None:
    block = Block("u1", 32)
    with pytest.raises(OutOfBounds, match="outside registered memory"):
        store64(block.address + outside, 1)
    with pytest.raises(OutOfBounds):
        load64(block.address + outside)
    with pytest.raises(OutOfBounds):
        copy(block.address + outside, block.address, 16)
    with pytest.raises(OutOfBounds):
        copy(block.address, block.address + outside, 8)
    with pytest.raises(OutOfBounds):
        work_on_record(block.address + outside)
    with pytest.raises(OutOfBounds):
        sys_write(1, block.address + outside, 8)


def test_the_registry_knows_blocks_while_they_live() -> None:
    block = Block("i8", 4)
    address = block.address
    assert address % 128 == 0
    check(address, 32)
    check(address + 31, 1)
    for start, size in ((address - 1, 1), (address + 31, 2), (address + 32, 1), (address, -1)):
        with pytest.raises(OutOfBounds):
            check(start, size)
    del block
    with pytest.raises(OutOfBounds):
        check(address, 1)


def test_memory_is_registered_once() -> None:
    register(4096, 8)
    try:
        with pytest.raises(OutOfBounds, match="registered already"):
            register(4096, 8)
    finally:
        unregister(4096)


def test_fields_of_a_block_by_name() -> None:
    block = Block(RECORD)
    block["plain"] = -3
    assert block["plain"] == -3
    assert type(block["plain"]) is int


@kernel("i8(i8, i8, i8)")
def echo(writer: int, reader: int, memory: int) -> int:
    """Write 5 bytes to a pipe, wait for them, read them behind themselves."""
    sent = sys_write(writer, memory, 5)
    store32(memory + 16, reader)
    store32(memory + 20, 1)
    ready = sys_poll(memory + 16, 1, 10_000)
    return sent + 10 * ready + 100 * sys_read(reader, memory + 8, 100)


@kernel("i8(i8, i8)")
def failing(fd: int, memory: int) -> int:
    return sys_read(fd, memory, 8)


@kernel("i8(i8, i8)")
def ring_twice(fd: int, memory: int) -> int:
    before = clock_ns(memory)
    eventfd_signal(fd, memory)
    eventfd_signal(fd, memory)
    return clock_ns(memory) - before


def test_system_calls_from_kernels() -> None:
    block = Block("u1", 128)
    block.array[:5] = np.frombuffer(b"hello", np.uint8)
    reader, writer = os.pipe()
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert echo(writer, reader, block.address) == 5 + 10 + 500
        assert block.array[8:13].tobytes() == b"hello"
        assert failing(writer, block.address) == -9, "EBADF"
        assert failing(bell, block.address) == -11, "EAGAIN"
        assert ring_twice(bell, block.address) >= 0
        assert os.eventfd_read(bell) == 2
    finally:
        for fd in (reader, writer, bell):
            os.close(fd)
