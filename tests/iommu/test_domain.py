"""What a domain maps and what it refuses; what happens around an unmap."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import iommu_kernels
import pytest

from vfio_vmbus.errors import DmaError, IsolationFault, WaitTimeout
from vfio_vmbus.iommu.domain import IOVA_LIMIT, RETAINED, Domain
from vfio_vmbus.iommu.translation import KEPT_FAULTS, NOT_MAPPED, READ, WRITE
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left

BASE = 1 << 32
RW = READ | WRITE


@pytest.fixture
def domain() -> Iterator[Domain]:
    with nothing_left(objects=False):
        domain = Domain("client")
        yield domain
        domain.close()


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory(64 * PAGE) as memory:
        yield memory


def memfd(size: int, seals: int, flags: int = 0) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only_view() -> int:
    fd = memfd(PAGE, fcntl.F_SEAL_SHRINK)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def one_end_of_a_pipe() -> int:
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


STRANGERS: dict[str, Callable[[], int]] = {
    "pipe": one_end_of_a_pipe,
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "eventfd": lambda: os.eventfd(0),
    "regular file": lambda: os.open(__file__, os.O_RDONLY),
    "zeroes": lambda: os.open("/dev/zero", os.O_RDWR),
    "folder": lambda: os.open("/", os.O_RDONLY),
    "unsealed": lambda: memfd(PAGE, 0),
    "sealed against growing only": lambda: memfd(PAGE, fcntl.F_SEAL_GROW),
    "short": lambda: memfd(PAGE - 1, fcntl.F_SEAL_SHRINK),
    "empty": lambda: memfd(0, fcntl.F_SEAL_SHRINK),
    "sealed against writing": lambda: memfd(PAGE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE),
    "open for reading only": read_only_view,
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_foreign_descriptors_are_refused(domain: Domain, kind: str) -> None:
    fd = STRANGERS[kind]()
    with pytest.raises(DmaError):
        domain.map(BASE, fd, 0, PAGE, RW)
    os.close(fd)
    with pytest.raises(DmaError):
        domain.map(BASE, fd, 0, PAGE, RW)  # closed by now
    assert domain.maps == ()
    assert iommu_kernels.look(domain.address, BASE, 1, READ) == -NOT_MAPPED


@pytest.mark.parametrize("number", [-1, 1 << 30, 1 << 40])
def test_numbers_that_are_no_descriptors_are_refused(domain: Domain, number: int) -> None:
    with pytest.raises(DmaError):
        domain.map(BASE, number, 0, PAGE, RW)


def test_memory_that_is_sealed_against_writing_is_mapped_for_reading(domain: Domain) -> None:
    fd = memfd(PAGE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    domain.map(BASE, fd, 0, PAGE, READ)
    os.close(fd)
    assert domain.read(BASE, 4) == bytes(4)


def test_memory_of_huge_pages_is_refused(domain: Domain) -> None:
    try:
        fd = memfd(2 << 20, fcntl.F_SEAL_SHRINK, os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"this kernel makes no memfd of huge pages: {error}")
    with pytest.raises(DmaError, match="huge pages"):
        domain.map(BASE, fd, 0, 2 << 20, RW)
    os.close(fd)


def test_a_regular_file_is_refused_even_on_tmpfs(domain: Domain, tmp_path: Path) -> None:
    for folder in (tmp_path, Path("/dev/shm")):
        path = folder / f"domain-test-{os.getpid()}"
        with open(path, "wb+") as file:
            path.unlink()
            file.truncate(PAGE)
            with pytest.raises(DmaError, match=r"SHRINK|not a memfd"):
                domain.map(BASE, file.fileno(), 0, PAGE, READ)


def test_holes_of_a_large_memory_are_not_filled(domain: Domain) -> None:
    """A client may map a terabyte that it does not have; that must not cost the host one."""
    size = 1 << 36
    fd = memfd(size, fcntl.F_SEAL_SHRINK)
    domain.map(BASE, fd, 0, size, RW)
    assert os.fstat(fd).st_blocks == 0
    assert domain.read(BASE + size - 8, 8) == bytes(8)
    os.close(fd)


def test_the_client_may_close_its_descriptor(domain: Domain) -> None:
    with SharedMemory(PAGE) as memory, memory.map() as mapping:
        mapping.write(0, b"still here")
        domain.map(BASE, memory.fd, 0, PAGE, RW)
    assert domain.read(BASE, 10) == b"still here"


@pytest.mark.parametrize(
    ("iova", "offset", "size"),
    [
        (BASE + 1, 0, PAGE),
        (BASE, 1, PAGE),
        (BASE, -PAGE, PAGE),
        (BASE, 0, PAGE - 1),
        (BASE, 0, 0),
        (BASE, 0, -PAGE),
        (-PAGE, 0, PAGE),
        (IOVA_LIMIT, 0, PAGE),
        (IOVA_LIMIT - PAGE, 0, 2 * PAGE),
        (1 << 64, 0, PAGE),
        (BASE, 0, 65 * PAGE),
        (BASE, 64 * PAGE, PAGE),
        (BASE, 1 << 62, PAGE),
        (BASE, 1 << 64, PAGE),
        (BASE, 0, 1 << 39),
    ],
)
def test_ranges_that_cannot_be(domain: Domain, memory: SharedMemory, iova: int, offset: int, size: int) -> None:
    with pytest.raises(DmaError):
        domain.map(iova, memory.fd, offset, size, RW)
    assert domain.maps == ()


@pytest.mark.parametrize("access", [0, 4, 8, -1, RW | 4])
def test_access_is_reading_writing_or_both(domain: Domain, memory: SharedMemory, access: int) -> None:
    with pytest.raises(DmaError, match="access"):
        domain.map(BASE, memory.fd, 0, PAGE, access)


def test_limits_of_number_and_bytes_and_room_again_after_an_unmap(memory: SharedMemory) -> None:
    domain = Domain("client", max_maps=2, max_bytes=4 * PAGE)
    domain.map(BASE, memory.fd, 0, 3 * PAGE, READ)
    with pytest.raises(DmaError, match="limit of 16384 bytes"):
        domain.map(BASE + 8 * PAGE, memory.fd, 0, 2 * PAGE, READ)
    domain.map(BASE + 8 * PAGE, memory.fd, 0, PAGE, READ)
    domain.max_bytes = 1 << 40
    with pytest.raises(DmaError, match="limit 2"):
        domain.map(BASE + 16 * PAGE, memory.fd, 0, PAGE, READ)
    domain.unmap(BASE, 3 * PAGE)
    domain.map(BASE + 16 * PAGE, memory.fd, 0, PAGE, READ)
    domain.close()


def test_an_unmap_takes_whole_maps_and_says_how_many_bytes(domain: Domain, memory: SharedMemory) -> None:
    for number in range(4):
        domain.map(BASE + 2 * number * PAGE, memory.fd, 0, 2 * PAGE, RW)
    for iova, size in ((BASE + PAGE, PAGE), (BASE, PAGE), (BASE, 3 * PAGE), (BASE + PAGE, 3 * PAGE)):
        with pytest.raises(DmaError, match="split"):
            domain.unmap(iova, size)
    assert len(domain.maps) == 4
    assert domain.unmap(BASE + 2 * PAGE, 4 * PAGE) == 4 * PAGE
    assert domain.unmap(BASE + 2 * PAGE, 4 * PAGE) == 0
    assert [entry.iova for entry in domain.maps] == [BASE, BASE + 6 * PAGE]
    domain.close()
    domain.close()
    domain.map(BASE, memory.fd, 0, PAGE, READ)


def test_pages_are_protected_by_direction(domain: Domain, memory: SharedMemory) -> None:
    """Twice over: the table refuses, and the host's own mapping has no right to write either."""
    domain.map(BASE, memory.fd, 0, PAGE, READ)
    address = domain.translate(BASE, PAGE, READ)
    with open("/proc/self/maps") as maps:
        line = next(line for line in maps if line.startswith(f"{address:x}-"))
    assert " r--s " in line
    with pytest.raises(IsolationFault, match="direction"):
        domain.translate(BASE, PAGE, WRITE)


class Pause:
    """A pause that, like a worker's, cannot be entered twice; notes what was still there while it lasted."""

    def __init__(self, domain: Domain) -> None:
        self.events: list[str] = []
        self._domain = domain
        self._inside = False
        domain.quiesce = self.pause
        domain.revoke = lambda iova, size: self.events.append(f"revoke {self.mapped()}")

    def mapped(self) -> bool:
        return iommu_kernels.look(self._domain.address, BASE, PAGE, READ) > 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        assert not self._inside, "a pause within a pause waits for itself"
        self._inside = True
        self.events.append(f"pause {self.mapped()}")
        yield
        self.events.append(f"go on {self.mapped()}")
        self._inside = False


def test_before_memory_goes_its_users_end_and_kernels_pause(domain: Domain, memory: SharedMemory) -> None:
    pause = Pause(domain)
    domain.map(BASE, memory.fd, 0, PAGE, READ)
    assert pause.events == []
    domain.unmap(BASE, PAGE)
    assert pause.events == ["revoke True", "pause True", "go on False"]
    pause.events.clear()
    domain.unmap(BASE, PAGE)
    assert pause.events == []


@pytest.mark.parametrize("maps", [RETAINED - 1, RETAINED, RETAINED + 1, 3 * RETAINED])
def test_replaced_tables_go_in_a_pause_and_never_in_one_within_another(domain: Domain, memory: SharedMemory, maps: int) -> None:
    pause = Pause(domain)
    for number in range(maps):
        domain.map(BASE + number * PAGE, memory.fd, 0, PAGE, READ)
    assert len([event for event in pause.events if event.startswith("pause")]) == (maps - 1) // RETAINED
    for number in range(maps):
        assert domain.unmap(BASE + number * PAGE, PAGE) == PAGE


def test_a_pause_that_fails_leaves_all_as_it_was(domain: Domain, memory: SharedMemory) -> None:
    domain.map(BASE, memory.fd, 0, PAGE, READ)

    @contextmanager
    def stuck() -> Iterator[None]:
        raise WaitTimeout("the worker", 5)
        yield

    quiesce, domain.quiesce = domain.quiesce, stuck
    with pytest.raises(WaitTimeout):
        domain.unmap(BASE, PAGE)
    assert domain.read(BASE, 1) == b"\0"
    for number in range(1, RETAINED):
        domain.map(BASE + number * PAGE, memory.fd, 0, PAGE, READ)
    with pytest.raises(WaitTimeout):
        domain.map(BASE + RETAINED * PAGE, memory.fd, 0, PAGE, READ)
    assert len(domain.maps) == RETAINED
    domain.quiesce = quiesce
    domain.map(BASE + RETAINED * PAGE, memory.fd, 0, PAGE, READ)
    assert domain.unmap(BASE, IOVA_LIMIT - BASE) == (RETAINED + 1) * PAGE


def test_the_latest_faults_are_kept_and_all_are_counted(domain: Domain) -> None:
    for number in range(2 * KEPT_FAULTS + 5):
        assert iommu_kernels.translate(domain.address, number * PAGE, number + 1, WRITE) == 0
        with pytest.raises(IsolationFault) as caught:
            domain.translate(number * PAGE, number + 1, READ)
        assert str(caught.value) == f"client: read of {number + 1} bytes at IOVA {number * PAGE:#x}: not mapped"
    assert domain.fault_count == 2 * (2 * KEPT_FAULTS + 5)
    faults = domain.faults()
    last = range(KEPT_FAULTS + 5, 2 * KEPT_FAULTS + 5)
    for direction, kept in (("read", faults[:KEPT_FAULTS]), ("write", faults[KEPT_FAULTS:])):
        assert [(f.device, f.iova, f.size, f.direction) for f in kept] == [("client", n * PAGE, n + 1, direction) for n in last]


def test_addresses_of_a_64_bit_guest_are_shown_as_it_wrote_them(domain: Domain) -> None:
    for iova in (1 << 63, (1 << 64) - PAGE):
        assert iommu_kernels.translate(domain.address, iova - (1 << 64), PAGE, READ) == 0
        assert domain.faults()[-1].iova == iova
    assert "wraps around" in domain.faults()[-1].reason
