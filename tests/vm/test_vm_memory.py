"""The guest's memory: what is read, written and refused; images as persistent memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_vmbus.errors import ClosedError, IsolationFault, UnavailableError, UsageError
from vfio_vmbus.memory.shared import require_sealed
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vm.memory import ABOVE, GIB, HOLE, MIB, UNIT, GuestMemory, check_width, physical_memory, place_pmem

BIG = 3 * GIB + 64 * MIB
"""Of which a part lies above 4 GiB; pages that nobody touches cost nothing."""


@pytest.fixture(scope="module")
def big() -> GuestMemory:
    if physical_memory() < BIG:
        pytest.skip(f"this machine has {physical_memory() // MIB} MiB, the guest would have {BIG // MIB}")
    return GuestMemory(BIG)


def test_what_is_written_is_read() -> None:
    with nothing_left():
        memory = GuestMemory(64 * MIB)
        memory.write(0x1234, b"hello")
        assert memory.read(0x1233, 7) == b"\0hello\0"
        assert ctypes.string_at(memory.address(0x1234, 5), 5) == b"hello"
        memory.write(64 * MIB - 3, b"end")
        assert memory.top == 64 * MIB
        assert require_sealed(memory.fd) == 64 * MIB
        memory.close()
        memory.close()
    with pytest.raises(ClosedError):
        memory.read(0, 1)


def test_memory_above_the_hole_is_the_rest_of_the_file(big: GuestMemory) -> None:
    big.write(ABOVE + 5, b"above")
    big.write(HOLE - 5, b"below")
    assert big.address(ABOVE, 1) - big.address(0, 1) == HOLE
    assert big.read(ABOVE + 5, 5) == b"above"
    assert big.top == ABOVE + 64 * MIB


@settings(deadline=None)
@given(
    st.sampled_from([0, HOLE, ABOVE, ABOVE + 64 * MIB, 1 << 52, (1 << 64) - 4096]).flatmap(
        lambda edge: st.integers(max(edge - 5000, 0), edge + 5000)
    ),
    st.integers(-1, 8000),
)
def test_what_leaves_the_memory_is_refused(big: GuestMemory, gpa: int, size: int) -> None:
    inside = any(first <= gpa and gpa + size <= last for first, last in ((0, HOLE), (ABOVE, ABOVE + 64 * MIB))) and size >= 0
    if inside:
        assert len(big.read(gpa, size)) == size
        return
    with pytest.raises(IsolationFault, match="guest"):
        big.read(gpa, size)
    if size > 0:
        with pytest.raises(IsolationFault, match="write"):
            big.write(gpa, bytes(size))


def test_more_than_this_machine_has() -> None:
    with nothing_left(), pytest.raises(UsageError, match="this machine has"):
        GuestMemory((physical_memory() // UNIT + 1) * UNIT)


def test_images_are_private_to_the_guest(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1" * (UNIT + 1))
    second.write_bytes(b"2")
    with nothing_left():
        images = place_pmem([first, second], ABOVE + 64 * MIB)
        assert [(image.gpa, image.size) for image in images] == [(5 * GIB, 2 * UNIT), (6 * GIB, UNIT)]
        assert ctypes.string_at(images[0].address + UNIT, 2) == b"1\0"
        assert ctypes.string_at(images[0].address + 2 * UNIT - 1, 1) == b"\0"
        assert ctypes.string_at(images[1].address, 2) == b"2\0"
        ctypes.memset(images[1].address, 0x33, UNIT)
        for image in images:
            image.close()
            image.close()
    assert second.read_bytes() == b"2"


def test_images_lie_above_4_gib_even_of_a_small_machine(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"x")
    (image,) = place_pmem([file], 64 * MIB)
    assert image.gpa == ABOVE
    image.close()


def test_images_that_cannot_be(tmp_path: Path) -> None:
    empty, fine = tmp_path / "empty", tmp_path / "fine"
    empty.touch()
    fine.write_bytes(b"x")
    with nothing_left():
        with pytest.raises(UsageError, match="is empty"):
            place_pmem([fine, empty], GIB)
        with pytest.raises(UnavailableError, match="No such file"):
            place_pmem([fine, tmp_path / "none"], GIB)
        with pytest.raises(UnavailableError, match="directory"):
            place_pmem([tmp_path], GIB)


def test_addresses_that_the_cpu_does_not_have() -> None:
    check_width([1 << 36], 36)
    with pytest.raises(UsageError, match="36 bits"):
        check_width([4096, (1 << 36) + 1], 36)
