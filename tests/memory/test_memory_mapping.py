"""Mappings: pieces side by side, wrapped, guarded at both ends, and only of memory that cannot be pulled away."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_vmbus.errors import ClosedError, DmaError, UsageError
from vfio_vmbus.memory import mapping as mappings
from vfio_vmbus.memory.mapping import PAGE, Mapping, Piece, merge, window
from vfio_vmbus.memory.registry import OutOfBounds, check
from vfio_vmbus.memory.shared import SharedMemory, require_sealed, side_by_side


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    """Four pages, each filled with its own number."""
    with SharedMemory(4 * PAGE) as shared:
        for page in range(4):
            os.pwrite(shared.fd, bytes([page]) * PAGE, page * PAGE)
        yield shared


def test_pieces_lie_side_by_side_in_the_order_given(memory: SharedMemory) -> None:
    pieces = [Piece(memory.fd, 2 * PAGE, PAGE), Piece(memory.fd, 0, 2 * PAGE)]
    with side_by_side(pieces) as mapping:
        assert mapping.read(0, 3 * PAGE) == b"\2" * PAGE + b"\0" * PAGE + b"\1" * PAGE
        mapping.write(PAGE - 1, b"xy")
        assert os.pread(memory.fd, 1, 3 * PAGE - 1) == b"x"
        assert os.pread(memory.fd, 1, 0) == b"y"


def test_pieces_of_several_files(memory: SharedMemory) -> None:
    with SharedMemory(PAGE) as other, side_by_side([Piece(other.fd, 0, PAGE), Piece(memory.fd, 3 * PAGE, PAGE)]) as mapping:
        mapping.write(0, b"other")
        assert os.pread(other.fd, 5, 0) == b"other"
        assert mapping.read(PAGE, 2) == b"\3\3"


def test_a_wrapped_mapping_goes_on_where_it_began(memory: SharedMemory) -> None:
    with memory.map(wrap_from=PAGE) as mapping:
        assert (mapping.size, mapping.span) == (4 * PAGE, 7 * PAGE)
        mapping.write(4 * PAGE - 4, b"abcdefgh")
        assert mapping.read(PAGE, 4) == b"efgh"
        assert mapping.read(4 * PAGE - 4, 8) == b"abcdefgh"
        mapping.write(2 * PAGE, b"once")
        assert mapping.read(5 * PAGE, 4) == b"once"


def test_neighbours_are_merged() -> None:
    pieces = [Piece(7, 0, PAGE), Piece(7, PAGE, PAGE), Piece(7, 2 * PAGE, PAGE, False), Piece(8, 3 * PAGE, PAGE)]
    assert merge(pieces) == [Piece(7, 0, 2 * PAGE), *pieces[2:]]


def test_windows() -> None:
    pieces = [Piece(7, 0, 2 * PAGE), Piece(8, 0, PAGE, False), Piece(9, PAGE, 2 * PAGE)]
    assert window(pieces, PAGE, 3 * PAGE) == [Piece(7, PAGE, PAGE), Piece(8, 0, PAGE, False), Piece(9, PAGE, PAGE)]
    assert window(pieces, 0, 5 * PAGE) == pieces
    assert window(pieces, 2 * PAGE, 0) == []
    for start, size in ((-PAGE, PAGE), (0, 6 * PAGE), (4 * PAGE, 2 * PAGE), (0, -PAGE)):
        with pytest.raises(UsageError, match=f"{size} bytes at {start} are outside pieces of {5 * PAGE} bytes"):
            window(pieces, start, size)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (7 * PAGE, 1), (0, 7 * PAGE + 1), (0, -1), (2**64, 1)])
def test_reads_and_writes_outside_are_refused(memory: SharedMemory, offset: int, size: int) -> None:
    with memory.map(wrap_from=PAGE) as mapping:
        with pytest.raises(UsageError, match="outside a mapping of 28672 bytes"):
            mapping.read(offset, size)
        if size > 0:
            with pytest.raises(UsageError, match="outside a mapping"):
                mapping.write(offset, bytes(size))


def test_nothing_is_reached_after_close(memory: SharedMemory) -> None:
    mapping = memory.map()
    address = mapping.address
    check(address, 4 * PAGE)
    mapping.close()
    mapping.close()
    with pytest.raises(ClosedError, match="unmapped already"):
        mapping.read(0, 1)
    with pytest.raises(OutOfBounds):
        check(address, 1)


TOUCH = """
import ctypes
from vfio_vmbus.memory.shared import SharedMemory
memory = SharedMemory(8192)
mapping = memory.map(wrap_from=4096)
ctypes.string_at(mapping.address, mapping.span)
print("inside", flush=True)
ctypes.string_at({where}, 1)
"""


@pytest.mark.parametrize("where", ["mapping.address - 1", "mapping.address + mapping.span"])
def test_guard_pages_stop_whoever_runs_out(where: str) -> None:
    done = subprocess.run([sys.executable, "-c", TOUCH.format(where=where)], capture_output=True, text=True)
    assert done.stdout == "inside\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("size", [0, -PAGE, 100, PAGE + 8])
def test_memory_is_whole_pages(size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes"):
        SharedMemory(size)
    with pytest.raises(UsageError, match="not whole pages"):
        Mapping([Piece(0, 0, size)])


@pytest.mark.parametrize(("offset", "size"), [(0, 5 * PAGE), (4 * PAGE, PAGE), (-PAGE, PAGE), (PAGE, 0)])
def test_a_map_stays_inside_its_memory(memory: SharedMemory, offset: int, size: int) -> None:
    with pytest.raises(UsageError, match="outside 16384 bytes of shared memory"):
        memory.map(offset, size)


def test_sealed_memory_can_neither_shrink_nor_grow_nor_be_unsealed(memory: SharedMemory) -> None:
    for size in (PAGE, 5 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert require_sealed(memory.fd) == 4 * PAGE


def test_memory_that_can_be_pulled_away_is_refused(tmp_path: object) -> None:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    plain = os.open(f"{tmp_path}/file", os.O_RDWR | os.O_CREAT)
    reader, writer = os.pipe()
    try:
        os.ftruncate(unsealed, PAGE)
        os.ftruncate(plain, PAGE)
        for fd, why in ((unsealed, "without F_SEAL_SHRINK"), (plain, "is not a memfd"), (reader, "is not a memfd")):
            with pytest.raises(DmaError, match=why):
                side_by_side([Piece(fd, 0, PAGE)])
        fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with side_by_side([Piece(unsealed, 0, PAGE)]) as mapping:
            assert mapping.size == PAGE
    finally:
        for fd in (unsealed, plain, reader, writer):
            os.close(fd)
    with pytest.raises(DmaError, match="is not a memfd"):
        require_sealed(unsealed)


def test_pieces_behind_the_end_of_their_memory_are_refused(memory: SharedMemory) -> None:
    for offset, size in ((4 * PAGE, PAGE), (0, 5 * PAGE), (2**62, PAGE), (-PAGE, PAGE)):
        with pytest.raises(DmaError, match=f"{size} bytes at {offset} are outside memory of 16384 bytes"):
            side_by_side([Piece(memory.fd, 0, PAGE), Piece(memory.fd, offset, size)])


def maps() -> int:
    """How many pieces this process's address space has."""
    return Path("/proc/self/maps").read_text().count("\n")


def test_what_the_kernel_refuses_leaves_nothing_behind(memory: SharedMemory) -> None:
    """Memory sealed against writing cannot be mapped for writing."""
    before = maps()
    fd = os.memfd_create("frozen", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
        with pytest.raises(DmaError, match=r"cannot be mapped side by side: .*Operation not permitted"):
            side_by_side([Piece(memory.fd, 0, PAGE), Piece(fd, 0, PAGE)])
    finally:
        os.close(fd)
    assert maps() <= before


def test_all_who_map_have_so_many_pieces_together(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is refused costs nothing, nor does one that the kernel refuses."""
    before = mappings._pieces.count
    monkeypatch.setattr(mappings, "MOST_PIECES", before + 4)
    apart = [Piece(memory.fd, 2 * PAGE, PAGE), Piece(memory.fd, 0, PAGE), Piece(memory.fd, 3 * PAGE, PAGE)]
    with side_by_side(apart), memory.map() as other:
        with pytest.raises(DmaError, match=f"{before + 4} pieces of memory are mapped, 1 more exceed"):
            side_by_side(apart[:1])
        assert other.read(PAGE, 1) == b"\1"
    for wrong in ([Piece(-1, 0, PAGE)], [Piece(memory.fd, 0, PAGE), Piece(-1, 0, PAGE)]):
        with pytest.raises(OSError, match="mmap"):
            Mapping(wrong)
    assert mappings._pieces.count == before
    with pytest.raises(DmaError, match="5 more exceed"):
        side_by_side(apart, wrap_from=PAGE)  # two of them once more
    assert mappings._pieces.count == before
