"""Many maps of few files: one descriptor and one mapping for them; memory that is copied only; a table in leaves against a plain list."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from pathlib import Path

import iommu_kernels
import pytest

from vfio_vmbus.errors import DmaError, IsolationFault
from vfio_vmbus.iommu import files
from vfio_vmbus.iommu.domain import Domain
from vfio_vmbus.iommu.files import MAX_FILES, WINDOW
from vfio_vmbus.iommu.table import Table
from vfio_vmbus.iommu.translation import DIRECTION, DOMAIN, LEAF, NOT_MAPPED, NOT_MEMORY, OVER_END, READ, WRITE
from vfio_vmbus.memory.block import Block
from vfio_vmbus.memory.kernel import INTERPRETED
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import Stock, nothing_left

BASE = 1 << 32
RW = READ | WRITE


@pytest.fixture
def domain() -> Iterator[Domain]:
    with nothing_left(objects=False):
        domain = Domain("client")
        yield domain
        domain.close()


def descriptors() -> int:
    return Stock.take().descriptors.total()


def mapped() -> int:
    return Stock.take().mappings.total()


def test_maps_of_one_file_share_a_descriptor_and_a_mapping(domain: Domain) -> None:
    with SharedMemory(64 * PAGE) as memory, memory.map() as mapping:
        before = descriptors(), mapped()
        for number in range(64):
            mapping.write(number * PAGE, bytes([number]))
            domain.map(BASE + number * 2 * PAGE, memory.fd, (63 - number) * PAGE, PAGE, RW)
        assert (descriptors() - before[0], mapped() - before[1]) == (1, 1)
        again = os.dup(memory.fd)
        domain.map(BASE * 2, again, 0, PAGE, RW)
        os.close(again)
        assert (descriptors() - before[0], mapped() - before[1]) == (1, 1)
        domain.map(BASE * 3, memory.fd, 0, PAGE, READ)  # for reading only: another mapping, with its own protection
        assert (descriptors() - before[0], mapped() - before[1]) == (2, 2)
        assert [domain.read(BASE + n * 2 * PAGE, 1)[0] for n in range(64)] == list(range(63, -1, -1))
        for number in range(1, 64):
            domain.unmap(BASE + number * 2 * PAGE, PAGE)
        assert domain.read(BASE, 1) == b"\x3f"
        domain.close()
        assert (descriptors(), mapped()) == before


def test_the_page_next_to_a_map_is_in_the_mapping_and_out_of_reach(domain: Domain) -> None:
    with SharedMemory(3 * PAGE) as memory:
        domain.map(BASE, memory.fd, PAGE, PAGE, RW)
        for iova, size, reason in ((BASE - 1, 1, NOT_MAPPED), (BASE + PAGE, 1, NOT_MAPPED), (BASE + PAGE - 1, 2, OVER_END)):
            assert iommu_kernels.look(domain.address, iova, size, READ) == -reason
            with pytest.raises(IsolationFault):
                domain.translate(iova, size, READ)


def test_a_map_over_the_edge_of_a_window_or_larger_than_one_has_its_own(domain: Domain) -> None:
    with SharedMemory(3 * WINDOW) as memory:
        with memory.map(WINDOW - PAGE, 2 * PAGE) as edge:
            edge.write(0, b"before")
            edge.write(PAGE, b"behind")
        domain.map(BASE, memory.fd, WINDOW - PAGE, 2 * PAGE, RW)
        domain.map(BASE + WINDOW, memory.fd, 0, 2 * WINDOW, READ)
        domain.map(BASE + 4 * WINDOW, memory.fd, WINDOW, PAGE, RW)
        assert domain.read(BASE, 6) == domain.read(BASE + 2 * WINDOW - PAGE, 6) == b"before"
        assert domain.read(BASE + PAGE, 6) == domain.read(BASE + 4 * WINDOW, 6) == b"behind"
        assert ctypes.string_at(domain.translate(BASE + PAGE - 6, 12, READ), 12)[6:] == b"behind"


def test_a_file_that_grows_has_a_new_window(domain: Domain) -> None:
    import fcntl

    fd = os.memfd_create("grows", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    domain.map(BASE, fd, 0, PAGE, RW)
    with pytest.raises(DmaError, match="outside"):
        domain.map(BASE * 2, fd, PAGE, PAGE, RW)
    os.ftruncate(fd, 2 * PAGE)
    os.pwrite(fd, b"new", PAGE)
    domain.map(BASE * 2, fd, PAGE, PAGE, RW)
    os.close(fd)
    assert domain.read(BASE * 2, 3) == b"new"
    domain.unmap(BASE, PAGE)
    assert domain.read(BASE * 2, 3) == b"new"


def test_a_descriptor_for_reading_does_not_write_because_another_did(domain: Domain) -> None:
    with SharedMemory(PAGE) as memory:
        domain.map(BASE, memory.fd, 0, PAGE, RW)
        weak = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
        with pytest.raises(DmaError, match="not open for reading and writing"):
            domain.map(BASE * 2, weak, 0, PAGE, WRITE)
        domain.map(BASE * 2, weak, 0, PAGE, READ)
        os.close(weak)


def test_files_and_windows_have_a_limit(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    for number in range(MAX_FILES):
        with SharedMemory(PAGE) as memory:
            domain.map(BASE + number * PAGE, memory.fd, 0, PAGE, RW)
    with SharedMemory(PAGE) as memory:
        with pytest.raises(DmaError, match=f"limit {MAX_FILES}"):
            domain.map(BASE * 2, memory.fd, 0, PAGE, RW)
        domain.unmap(BASE, PAGE)
        domain.map(BASE * 2, memory.fd, 0, PAGE, RW)
    domain.close()
    assert descriptors() == before
    monkeypatch.setattr(files, "MAX_WINDOWS", 2)
    with SharedMemory(3 * WINDOW) as memory:
        for number in range(2):
            domain.map(BASE + number * PAGE, memory.fd, number * WINDOW, PAGE, RW)
        with pytest.raises(DmaError, match="limit 2"):
            domain.map(BASE * 2, memory.fd, 2 * WINDOW, PAGE, RW)


def test_memory_that_is_copied_only_is_found_and_not_translated(domain: Domain, tmp_path: Path) -> None:
    with SharedMemory(PAGE) as memory, open(tmp_path / "file", "wb+") as file:
        domain.map(BASE, memory.fd, 0, PAGE, RW)
        domain.map_unmapped(BASE + PAGE, PAGE, READ)
        domain.map_unmapped(BASE + 2 * PAGE, PAGE, RW, file.fileno())
        for iova in (BASE + PAGE, BASE + 2 * PAGE):
            assert iommu_kernels.look(domain.address, iova, 8, READ) == -NOT_MEMORY
            assert iommu_kernels.translate(domain.address, iova, 8, READ) == 0
            with pytest.raises(IsolationFault, match="copied only"):
                domain.translate(iova, 8, READ)
            with pytest.raises(IsolationFault, match="copied only"):
                domain.pieces(BASE, iova + 8 - BASE, READ)
            entry = domain.find(iova, 2 * PAGE, READ)
            assert (entry.iova, entry.address) == (iova, 0)
        assert iommu_kernels.look(domain.address, BASE + PAGE, 8, WRITE) == -DIRECTION
        with pytest.raises(IsolationFault, match="direction"):
            domain.find(BASE + PAGE, 8, WRITE)
        assert {fault.reason for fault in domain.faults()[-2:]} == {"memory that can be copied only, not mapped"}
        assert domain.fault_count == 2 + 2 + 2 + 1
        with pytest.raises(DmaError, match="overlaps"):
            domain.map(BASE + PAGE, memory.fd, 0, PAGE, RW)
        with pytest.raises(DmaError, match="split"):
            domain.map_unmapped(BASE + 8 * PAGE, 2 * PAGE, RW)
            domain.unmap(BASE + 8 * PAGE, PAGE)
        assert domain.unmap(BASE, 16 * PAGE) == 5 * PAGE


@pytest.mark.parametrize("path", ["/", "/dev/null", "/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_files_that_may_make_a_reader_wait_are_refused(domain: Domain, path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"there is no {path} here")
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(DmaError):
        domain.map_unmapped(BASE, PAGE, READ, fd)
    os.close(fd)
    assert domain.maps == ()


def test_the_table_is_a_sorted_list_whatever_is_put_in_and_taken_out() -> None:
    """Leaves split and meet; every address is looked up after each round."""
    chance = random.Random(7)
    state = Block(DOMAIN)
    table = Table(state.address)
    maps: dict[int, int] = {}
    slots = 3 * LEAF if INTERPRETED else 12 * LEAF

    def check() -> None:
        for slot in range(slots):
            found = iommu_kernels.look(state.address, BASE + 2 * slot * PAGE, PAGE, READ)
            assert found == maps.get(slot, -NOT_MAPPED)
        assert iommu_kernels.look(state.address, BASE - 1, 1, READ) == -NOT_MAPPED

    for _ in range(8):
        for slot in chance.sample(range(slots), slots // 2):
            if slot not in maps:
                maps[slot] = (slot + 1) << 20
                table.insert(BASE + 2 * slot * PAGE, BASE + (2 * slot + 1) * PAGE, maps[slot], READ)
        check()
        for _ in range(chance.choice([3, 40])):
            first = chance.randrange(slots)
            last = min(slots, first + chance.choice([1, 1, 5, LEAF, 3 * LEAF]))
            table.remove(BASE + 2 * first * PAGE, BASE + 2 * last * PAGE)
            maps = {slot: address for slot, address in maps.items() if not first <= slot < last}
        check()
        table.forget_replaced()
    table.remove(0, BASE * 2)
    maps.clear()
    check()
    table.remove(0, BASE * 2)
    assert table.replaced <= 2
