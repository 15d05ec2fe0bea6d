"""The guest's memory: one sealed memfd, of which a part lies below the hole under 4 GiB and the rest above it; and images of pmem disks.

Addresses of the guest are "gpa" (guest-physical). What the guest names is checked here before this process touches it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import ClosedError, IsolationFault, UnavailableError, UsageError
from ..memory.mapping import Mapping, Piece
from ..memory.shared import SharedMemory

MIB: Final = 1 << 20
GIB: Final = 1 << 30

HOLE: Final = 3 * GIB
"""From here to 4 GiB there is no memory, but interrupt controllers and the window that the ACPI tables give to VMBus."""
ABOVE: Final = 4 * GIB
SMALLEST: Final = 64 * MIB
UNIT: Final = 2 * MIB
"""What sizes and the places of pmem images are multiples of: a large page, and what Linux can make a memory map of."""


@dataclass(frozen=True)
class Range:
    """`size` bytes of the guest's memory from `gpa` on are those of the memfd from `offset` on."""

    gpa: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        return self.gpa + self.size


def layout(size: int) -> tuple[Range, ...]:
    """Where `size` bytes of memory lie. Raises UsageError for a size that cannot be."""
    if size < SMALLEST or size % UNIT:
        raise UsageError(f"memory of {size} bytes: take a multiple of {UNIT // MIB} MiB, {SMALLEST // MIB} MiB at least")
    low = Range(0, min(size, HOLE), 0)
    return (low,) if size <= HOLE else (low, Range(ABOVE, size - HOLE, HOLE))


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class GuestMemory:
    """`size` bytes. Any thread may use it; whoever does stops before it is closed."""

    def __init__(self, size: int) -> None:
        self.ranges = layout(size)
        self.size = size
        have = physical_memory()
        if size > have:
            raise UsageError(f"memory of {size // MIB} MiB: this machine has {have // MIB} MiB")
        with ExitStack() as stack:
            self._file = SharedMemory(size, "vfio-vmbus-guest")
            stack.callback(self._file.close)
            try:
                self._mapping = Mapping([Piece(self._file.fd, 0, size)], populate=False, align=UNIT)
            except OSError as error:
                raise UnavailableError(f"memory of {size // MIB} MiB cannot be mapped: {error.strerror}") from error
            # Large pages where the machine gives them to shared memory (transparent_hugepage/shmem_enabled is "advise" or more):
            # they save most of the faults of a boot, which makes it a third faster in a nested machine. Harmless where it does not.
            _libc.madvise(self._mapping.address, size, _MADV_HUGEPAGE)
            stack.pop_all()

    @property
    def fd(self) -> int:
        """The memfd, for those who map parts of it themselves."""
        return self._file.fd

    @property
    def top(self) -> int:
        """The first address behind all memory."""
        return self.ranges[-1].end

    def find(self, gpa: int, size: int, direction: str = "read") -> Range:
        """The range that has all of [gpa, gpa + size). Raises IsolationFault where none has."""
        for one in self.ranges:
            if one.gpa <= gpa and size >= 0 and gpa + size <= one.end:
                return one
        raise IsolationFault("guest", gpa, size, direction, "no memory is there")

    def address(self, gpa: int, size: int, direction: str = "read") -> int:
        """This process's address of the guest's `gpa`. Raises IsolationFault as `find`."""
        found = self.find(gpa, size, direction)
        if self._mapping.closed:
            raise ClosedError("the guest's memory is unmapped already")
        return self._mapping.address + found.offset + gpa - found.gpa

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of `size` bytes. Raises IsolationFault as `find`."""
        return ctypes.string_at(self.address(gpa, size), size)

    def write(self, gpa: int, data: bytes) -> None:
        """Store bytes. Raises IsolationFault as `find`."""
        ctypes.memmove(self.address(gpa, len(data), "write"), data, len(data))

    def close(self) -> None:
        """Unmap and close it; again is harmless."""
        self._mapping.close()
        self._file.close()


class Pmem:
    """A file as persistent memory at `gpa`: what the guest writes is private to it and gone with it, the file stays as it is.

    size: of the guest's range, the file's rounded up to UNIT; behind the file's end there are zeros.
    Raises UnavailableError for a file that cannot be mapped.
    """

    def __init__(self, path: Path, gpa: int) -> None:
        self.path = path
        self.gpa = gpa
        try:
            with path.open("rb") as file:
                length = os.fstat(file.fileno()).st_size
                if not length:
                    raise UsageError(f"{path} is empty: an image for persistent memory has at least a byte")
                self.size = -(-length // UNIT) * UNIT
                self.address = _map_private(file.fileno(), length, self.size)
        except OSError as error:
            raise UnavailableError(f"{path} cannot be persistent memory: {error.strerror}") from error

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def close(self) -> None:
        """Unmap it; again is harmless."""
        if self.address:
            _libc.munmap(self.address, self.size)
            self.address = 0


def place_pmem(paths: Iterable[Path], top: int) -> list[Pmem]:
    """Map the images one behind the other, above all memory and above 4 GiB."""
    at = max(-(-top // GIB) * GIB, ABOVE)
    with ExitStack() as stack:
        images: list[Pmem] = []
        for path in paths:
            image = Pmem(path, at)
            stack.callback(image.close)
            images.append(image)
            at = -(-image.end // GIB) * GIB
        stack.pop_all()
    return images


def check_width(ends: Sequence[int], bits: int) -> None:
    """Raise UsageError unless addresses up to all of `ends` have at most `bits` bits: what the CPU can address."""
    if max(ends) > 1 << bits:
        raise UsageError(f"memory up to {max(ends):#x}: this CPU addresses {bits} bits of memory")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MADV_HUGEPAGE: Final = 14
_FAILED: Final = ctypes.c_void_p(-1).value


def _map_private(fd: int, length: int, size: int) -> int:
    """`length` bytes of a file and zeros up to `size`, copied on write; the address."""
    both = mmap.PROT_READ | mmap.PROT_WRITE
    base: int = _libc.mmap(None, size, both, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if base == _FAILED:
        raise OSError(errno.ENOMEM, os.strerror(ctypes.get_errno()))
    if _libc.mmap(base, length, both, mmap.MAP_PRIVATE | _MAP_NORESERVE | _MAP_FIXED, fd, 0) == _FAILED:
        code = ctypes.get_errno()
        _libc.munmap(base, size)
        raise OSError(code, os.strerror(code))
    return base
