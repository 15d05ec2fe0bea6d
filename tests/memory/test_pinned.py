"""Memory that stays in its page frames, parts of files that can be mapped as a whole only, and aligned mappings."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from vfio_vmbus.errors import DmaError, UsageError
from vfio_vmbus.iommu.physical import PhysicalBuffer, PhysicalSpace
from vfio_vmbus.iommu.translation import READ, WRITE
from vfio_vmbus.memory import pinned
from vfio_vmbus.memory.mapping import PAGE, Mapping, Piece, merge, window
from vfio_vmbus.memory.pinned import PinnedMemory
from vfio_vmbus.memory.shared import HUGE_PAGE, SharedMemory
from vfio_vmbus.testing.leaks import nothing_left


def may_know_frames() -> bool:
    try:
        PinnedMemory(PAGE).close()
    except DmaError as error:
        assert "CAP_SYS_ADMIN" in str(error) or "pagemap" in str(error)
        return False
    return True


KNOWN = pytest.mark.skipif(not may_know_frames(), reason="page frames are hidden from this process (CAP_SYS_ADMIN)")


@KNOWN
@pytest.mark.parametrize("size", [PAGE, 5 * PAGE, HUGE_PAGE])
def test_frames_are_known_and_different(size: int) -> None:
    with nothing_left(objects=False):
        memory = PinnedMemory(size)
        assert len(set(memory.frames)) == size // PAGE
        assert all(memory.frames)
        assert pinned._frames(memory.mapping) == memory.frames
        memory.close()


@KNOWN
def test_without_io_uring_it_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_IO_URING_SETUP", -1)
    memory = PinnedMemory(4 * PAGE)
    assert not memory.pinned
    assert len(memory.frames) == 4
    memory.close()


def makes_huge_pages() -> bool:
    """Does the kernel make them of small ones (Linux 6.1, with shared memory's)?"""
    with nothing_left(objects=False), PhysicalBuffer(HUGE_PAGE, READ, "huge") as buffer:
        return buffer.pfns == tuple(range(buffer.pfns[0], buffer.pfns[0] + HUGE_PAGE // PAGE))


@KNOWN
@pytest.mark.parametrize("pages", [1, 16, HUGE_PAGE // PAGE])
def test_a_buffer_is_in_one_piece_where_huge_pages_are_to_be_had(pages: int) -> None:
    if not makes_huge_pages():
        pytest.skip("this kernel makes no huge pages of small ones, and none are reserved")
    with PhysicalBuffer(pages * PAGE, READ | WRITE, "piece", whole=True) as buffer:
        assert (buffer.size, len(buffer.pfns)) == (pages * PAGE, pages)
        assert buffer.iova == buffer.pfns[0] * PAGE
        with buffer.memory.map(0, PAGE, wrap_from=0) as again:  # as rings are
            buffer.mapping.write(0, b"the same")
            assert again.read(PAGE, 8) == b"the same"
            assert pinned._frames(again)[0] == buffer.pfns[0]
    assert buffer.closed


@KNOWN
def test_scattered_frames_have_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = pinned._frames
    monkeypatch.setattr(pinned, "_frames", lambda mapping: tuple(2 * frame for frame in frames(mapping)))
    with PhysicalBuffer(2 * PAGE, READ, "scattered", whole=True) as buffer:
        assert len(buffer.pfns) == 2
        with pytest.raises(DmaError, match="huge pages"):
            _ = buffer.iova


@KNOWN
def test_buffers_for_a_device_that_nothing_confines() -> None:
    space = PhysicalSpace()
    with nothing_left(objects=False):
        one, two = space.buffer(1, READ), space.buffer(2 * PAGE, READ | WRITE)
        assert (one.size, two.size, two.memory.size) == (PAGE, 2 * PAGE, 2 * PAGE)
        assert not set(one.pfns) & set(two.pfns)
        one.close()
        space.close()
        assert two.closed


def test_frames_that_are_hidden_are_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(pinned, "_PAGEMAP", "/dev/zero")
    with pytest.raises(DmaError, match="hides page frames"):
        PinnedMemory(PAGE)
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "none"):
        monkeypatch.setattr(pinned, "_PAGEMAP", str(path))
        with pytest.raises(DmaError):
            PinnedMemory(PAGE)


def test_a_cpu_page_of_sixteen_vmbus_pages_is_sixteen_frames(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """As on CPUs with pages of 64 KiB: VMBus pages have 4 KiB whatever the CPU has."""

    class Big:
        PAGESIZE = 16 * PAGE

    monkeypatch.setattr(pinned, "mmap", Big)
    here = tmp_path / "pagemap"
    address = 32 * 16 * PAGE
    entries = [0] * 32 + [1 << 63 | 5, 1 << 63 | 9]
    here.write_bytes(b"".join(entry.to_bytes(8, "little") for entry in entries))
    monkeypatch.setattr(pinned, "_PAGEMAP", str(here))

    class Mapped:
        size = 20 * PAGE

    Mapped.address = address
    assert pinned._frames(Mapped) == (*range(80, 96), 144, 145, 146, 147)


def test_a_part_of_what_is_mapped_as_a_whole() -> None:
    with SharedMemory(8 * PAGE) as memory, memory.map() as all_of_it:
        all_of_it.write(0, b"".join(bytes([number]) * PAGE for number in range(8)))
        whole = Piece(memory.fd, 0, 4 * PAGE, whole=(2 * PAGE, 4 * PAGE))
        part = Piece(memory.fd, PAGE, 3 * PAGE, whole=(2 * PAGE, 4 * PAGE))
        with nothing_left(objects=False), Mapping([part], wrap_from=PAGE) as mapping:
            assert [mapping.read(at * PAGE, 1)[0] for at in range(5)] == [3, 4, 5, 4, 5]
            mapping.write(4 * PAGE, b"x")
            assert mapping.read(2 * PAGE, 1) == all_of_it.read(5 * PAGE, 1) == b"x"
        assert merge(window([whole], PAGE, 3 * PAGE)) == [part]
        assert merge(window([whole], 0, PAGE) + window([whole], PAGE, PAGE)) == [
            Piece(memory.fd, 0, 2 * PAGE, whole=(2 * PAGE, 4 * PAGE))
        ]
        before = _areas()
        with pytest.raises(OSError, match="mmap"):
            Mapping([Piece(-1, 0, PAGE, whole=(0, PAGE))])
        assert _areas() == before


def _areas() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("align", [mmap.PAGESIZE, 1 << 16, HUGE_PAGE])
def test_mappings_are_aligned_and_guarded(align: int) -> None:
    with SharedMemory(3 * PAGE) as memory, Mapping([Piece(memory.fd, 0, 3 * PAGE)], align=align) as mapping:
        assert mapping.address % align == 0
        mapping.write(0, b"1" * 3 * PAGE)


def test_huge_pages_where_there_are_some() -> None:
    with pytest.raises(UsageError, match="multiple of 2097152"):
        SharedMemory(PAGE, huge=True)
    try:
        with SharedMemory(HUGE_PAGE, huge=True) as memory, memory.map() as mapping:
            assert mapping.address % HUGE_PAGE == 0
            assert os.fstatvfs(memory.fd).f_bsize == HUGE_PAGE
    except OSError as error:
        pytest.skip(f"this machine has no huge pages: {error}")
