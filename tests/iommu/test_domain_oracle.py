"""The domain against a list of maps in plain Python: `map`, `unmap`, `translate`, `pieces` and the kernels' lookup say the same."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import iommu_kernels
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vfio_vmbus.errors import DmaError, IsolationFault
from vfio_vmbus.iommu.domain import IOVA_LIMIT, Domain, Fault
from vfio_vmbus.iommu.translation import DIRECTION, NOT_MAPPED, OVER_END, READ, REASONS, WRAPS, WRITE
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left

FILES = 3
FILE_PAGES = 8
SPACE = 12
"""Pages of each of the two places that are mapped: somewhere, and at the upper end."""
BASES = (0x1_0000_0000, IOVA_LIMIT - SPACE * PAGE)
MAX_MAPS = 8
MAX_BYTES = 20 * PAGE
WORD = 1 << 64

accesses = st.sampled_from([READ, WRITE, READ | WRITE])
pages = st.tuples(st.sampled_from(BASES), st.integers(-1, SPACE)).map(lambda place: place[0] + place[1] * PAGE)
near_pages = st.tuples(pages, st.integers(-9, 9)).map(sum)
iovas = st.one_of(
    near_pages, near_pages, st.integers(0, WORD - 1), st.sampled_from([0, 2**63 - 1, 2**63 - PAGE, 2**63, WORD - 1])
)
sizes = st.one_of(
    st.integers(1, 3 * PAGE), st.integers(1, 6).map(lambda n: n * PAGE), st.sampled_from([0, 2**31, 2**32 - 1, 2**62, 2**63 - 1])
)


@dataclass(frozen=True)
class OracleMap:
    iova: int
    size: int
    file: int
    offset: int
    access: int

    @property
    def end(self) -> int:
        return self.iova + self.size

    def holds(self, iova: int) -> bool:
        return self.iova <= iova < self.end


def stamp(file: int, page: int) -> int:
    return 1 + file * 1000 + page


def signed(value: int) -> int:
    return value - WORD if value >> 63 else value


class DomainMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.files = [SharedMemory(FILE_PAGES * PAGE) for _ in range(FILES)]
        for number, file in enumerate(self.files):
            with file.map() as mapping:
                words = np.ctypeslib.as_array((ctypes.c_uint64 * (mapping.size // 8)).from_address(mapping.address))
                words[:] = np.repeat([stamp(number, page) for page in range(FILE_PAGES)], PAGE // 8)
        self.domain = Domain("client", max_maps=MAX_MAPS, max_bytes=MAX_BYTES)
        self.revoked: list[tuple[int, int]] = []
        self.domain.revoke = lambda iova, size: self.revoked.append((iova, size))
        self.maps: list[OracleMap] = []
        self.faults = 0

    def teardown(self) -> None:
        if hasattr(self, "domain"):
            self.domain.close()
            assert self.domain.maps == ()
            for file in self.files:
                file.close()

    @rule(iova=pages, file=st.integers(0, FILES - 1), offset=st.integers(0, FILE_PAGES), count=st.integers(0, 5), access=accesses)
    def map(self, iova: int, file: int, offset: int, count: int, access: int) -> None:
        new = OracleMap(iova, count * PAGE, file, offset * PAGE, access)
        possible = (
            count > 0
            and new.end <= IOVA_LIMIT
            and offset + count <= FILE_PAGES
            and len(self.maps) < MAX_MAPS
            and sum(item.size for item in self.maps) + new.size <= MAX_BYTES
            and not any(item.iova < new.end and new.iova < item.end for item in self.maps)
        )
        fd = self.files[file].fd
        if possible:
            self.domain.map(new.iova, fd, new.offset, new.size, access)
            self.maps.append(new)
        else:
            with pytest.raises(DmaError):
                self.domain.map(new.iova, fd, new.offset, new.size, access)

    @rule(iova=pages, off=st.integers(1, PAGE - 1), which=st.integers(0, 2))
    def map_unaligned(self, iova: int, off: int, which: int) -> None:
        place = [iova, 0, PAGE]
        place[which] += off
        with pytest.raises(DmaError):
            self.domain.map(place[0], self.files[0].fd, place[1], place[2], READ)

    @rule(iova=pages, count=st.integers(1, SPACE))
    def unmap(self, iova: int, count: int) -> None:
        end = iova + count * PAGE
        touched = [item for item in self.maps if item.iova < end and iova < item.end]
        split = any(item.iova < iova or item.end > end for item in touched)
        self.revoked.clear()
        if split or end > IOVA_LIMIT:
            with pytest.raises(DmaError):
                self.domain.unmap(iova, end - iova)
            assert self.revoked == []
            return
        assert self.domain.unmap(iova, end - iova) == sum(item.size for item in touched)
        assert self.revoked == ([(iova, end - iova)] if touched else [])
        self.maps = [item for item in self.maps if item not in touched]

    @precondition(lambda self: self.maps)
    @rule(data=st.data())
    def unmap_one(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.maps))
        assert self.domain.unmap(gone.iova, gone.size) == gone.size
        self.maps.remove(gone)

    def verdict(self, iova: int, size: int, access: int) -> int | OracleMap:
        """The map that grants a request, or the reason why none does."""
        if size <= 0 or iova + size > 2**63 - 1:
            return WRAPS
        entry = next((item for item in self.maps if item.holds(iova)), None)
        if entry is None:
            return NOT_MAPPED
        if iova + size > entry.end:
            return OVER_END
        return entry if entry.access & access == access else DIRECTION

    @rule(iova=iovas, size=sizes, access=accesses)
    def look(self, iova: int, size: int, access: int) -> None:
        expected = self.verdict(iova, size, access)
        found = iommu_kernels.look(self.domain.address, signed(iova), size, access)
        by_kernel = iommu_kernels.translate(self.domain.address, signed(iova), size, access)
        if isinstance(expected, int):
            fault = Fault("client", iova, size, "write" if access & WRITE else "read", REASONS[expected])
            assert (found, by_kernel) == (-expected, 0)
            assert self.domain.faults()[-1] == fault
            with pytest.raises(IsolationFault) as caught:
                self.domain.translate(iova, size, access)
            assert fault in self.domain.faults()
            refusal = caught.value
            assert (refusal.iova, refusal.length, refusal.direction, refusal.reason) == (
                iova,
                size,
                fault.direction,
                fault.reason,
            )
            self.faults += 2
        else:
            address = self.domain.translate(iova, size, access)
            assert found == by_kernel == address
            self.check_content(expected, iova, address)
            if expected.access & READ:
                assert self.domain.read(iova, size) == ctypes.string_at(address, size)

    def check_content(self, entry: OracleMap, iova: int, address: int) -> None:
        at = entry.offset + iova - entry.iova
        whole = stamp(entry.file, at // PAGE).to_bytes(8, "little")
        assert ctypes.string_at(address, 1) == whole[at % 8 : at % 8 + 1]

    @rule(iova=iovas, size=st.one_of(sizes, st.integers(1, SPACE).map(lambda n: n * PAGE)), access=accesses)
    def look_for_pieces(self, iova: int, size: int, access: int) -> None:
        expected, at = [], iova
        while at < iova + size:
            entry = next((item for item in self.maps if item.holds(at)), None)
            if entry is None or entry.access & access != access:
                break
            step = min(entry.end, iova + size) - at
            expected.append((entry.file, entry.offset + at - entry.iova, step, bool(entry.access & WRITE)))
            at += step
        common = self.domain.access(iova, size)
        if size > 0 and at == iova + size:
            files = {self.inode(file.fd): number for number, file in enumerate(self.files)}
            pieces = self.domain.pieces(iova, size, access)
            assert [(files[self.inode(piece.fd)], piece.offset, piece.size, piece.writable) for piece in pieces] == expected
            assert common & access == access
        else:
            with pytest.raises(IsolationFault):
                self.domain.pieces(iova, size, access)
            self.faults += 1
            assert size <= 0 or common & access != access

    @staticmethod
    def inode(fd: int) -> int:
        return os.fstat(fd).st_ino

    @invariant()
    def the_same_maps(self) -> None:
        if hasattr(self, "domain"):
            mine = sorted((item.iova, item.size, item.offset, item.access) for item in self.maps)
            assert [(item.iova, item.size, item.offset, item.access) for item in self.domain.maps] == mine
            assert self.domain.fault_count == self.faults


def test_domain_and_kernels_agree_with_the_oracle() -> None:
    machine = settings(max_examples=60, stateful_step_count=40, deadline=None)
    with nothing_left():
        run = DomainMachine.TestCase
        run.settings = machine
        run("runTest").runTest()
