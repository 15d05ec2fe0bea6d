"""Regions of a device that the kernel has: parts of the file that its descriptor is, read, written and mapped at an offset for each."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from threading import Lock

from ...errors import ClosedError, RescindedError, UnavailableError, UsageError, VfioVmbusError
from ...memory.mapping import Mapping, Piece
from ...wire import vfio as wire
from ...wire import vfio_ioctl as uapi
from .. import eventfd
from ..device import REGION_MMAP, REGION_WRITE, Region
from .container import ask, capabilities
from .ioctl import call

_PAGE = os.sysconf("SC_PAGESIZE")
_MAPPABLE = range(wire.REGION_BAR0, wire.REGION_BAR5 + 1)
DOORBELL_SIZE = 4
DOORBELL_VALUE = 1
"""What the kernel writes for a doorbell; an eventfd does not say which value."""


class KernelRegion(Region):
    """A region by pread(2), pwrite(2) and mmap(2). An access is one call: for registers, ask for 1, 2, 4 or 8 bytes.

    An access of 8 bytes is one of the device with Linux 6.12; with 6.1 it is two of 4 on x86: map the region where that matters.
    """

    def __init__(self, fd: Callable[[], int], info: wire.RegionInfo, areas: tuple[tuple[int, int], ...]) -> None:
        self.index = info.index
        self.size = info.size
        self.areas = areas
        self.flags = info.flags & (wire.REGION_READ | wire.REGION_WRITE) | (REGION_MMAP if areas else 0)
        self._fd = fd
        self._base = info.offset
        self._doorbells: dict[int, int] = {}
        self._lock = Lock()

    def read(self, offset: int, size: int) -> bytes:
        fd = self._fd()
        self._check(offset, size, wire.REGION_READ)
        try:
            data = os.pread(fd, size, self._base + offset)
        except OSError as error:
            raise self._refused(error, f"read of {size} bytes at {offset:#x}") from error
        if len(data) != size:
            raise UsageError(f"read of {size} bytes at {offset:#x} of region {self.index}: there are {len(data)}")
        return data

    def write(self, offset: int, data: bytes) -> None:
        fd = self._fd()
        self._check(offset, len(data), wire.REGION_WRITE)
        try:
            written = os.pwrite(fd, data, self._base + offset)
        except OSError as error:
            raise self._refused(error, f"write of {len(data)} bytes at {offset:#x}") from error
        if written != len(data):
            raise UsageError(f"write of {len(data)} bytes at {offset:#x} of region {self.index}: {written} were")

    def doorbell(self, offset: int) -> int:
        """As `Region.doorbell`; the kernel writes 1. Raises UnavailableError where it cannot for this register: write to it instead."""
        fd = self._fd()
        self._check(offset, 4, wire.REGION_WRITE)
        if offset % 4 or self.index not in _MAPPABLE:
            raise UsageError(f"no doorbell register at {offset:#x} of region {self.index}: take a 32-bit one of a BAR")
        with self._lock:
            if offset not in self._doorbells:
                self._doorbells[offset] = self._rung_by_kernel(fd, offset)
            return self._doorbells[offset]

    def map(self, offset: int, size: int, *, wrap_from: int | None = None) -> Mapping:
        """As `Region.map`. What is mapped keeps the device open: close it before the device.

        Registers are accessed by `memory.access` in kernels, or by a ctypes integer `from_address`, which is one access; not by slices.
        """
        fd = self._fd()
        if size <= 0 or (offset | size) % _PAGE:
            raise UsageError(f"{size:#x} bytes at {offset:#x}: take whole pages of {_PAGE} bytes")
        if not any(start <= offset and offset + size <= start + length for start, length in self.areas):
            return super().map(offset, size)
        try:
            piece = Piece(fd, self._base + offset, size, bool(self.flags & REGION_WRITE))
            return Mapping([piece], wrap_from=wrap_from, populate=False)
        except OSError as error:
            raise UnavailableError(f"{size:#x} bytes at {offset:#x} of region {self.index} cannot be mapped: {error}") from error

    def release(self) -> None:
        """Close the doorbells."""
        while self._doorbells:
            os.close(self._doorbells.popitem()[1])

    def _rung_by_kernel(self, fd: int, offset: int) -> int:
        bell = eventfd.make()
        wanted = uapi.IoEventFd(flags=DOORBELL_SIZE, offset=self._base + offset, data=DOORBELL_VALUE, fd=bell)
        try:
            call(fd, uapi.DEVICE_IOEVENTFD, bytearray(wanted.pack()), what=f"{offset:#x} of region {self.index}")
        except VfioVmbusError as error:
            os.close(bell)
            if isinstance(error, UsageError):
                raise UnavailableError(
                    f"{error}; the kernel rings no such register (not memory, or of the MSI-X table)"
                ) from error
            raise
        return bell

    def _check(self, offset: int, size: int, right: int) -> None:
        if size <= 0 or offset < 0 or offset + size > self.size:
            raise UsageError(f"{size} bytes at {offset:#x}: region {self.index} has {self.size:#x}")
        if not self.flags & right:
            raise UsageError(f"region {self.index} cannot be {'read' if right == wire.REGION_READ else 'written'}")

    def _refused(self, error: OSError, what: str) -> VfioVmbusError:
        text = f"{what} of region {self.index}: {error.strerror}"
        if error.errno == errno.EIO:
            return UnavailableError(f"{text}; decoding of memory or I/O is off in the command register (configuration space, 4)")
        if error.errno == errno.EBADF:
            return ClosedError(text)
        if error.errno == errno.ENODEV:
            return RescindedError(f"{text}; the device is gone")
        return UsageError(text)


def open_region(device: int, index: int, fd: Callable[[], int]) -> KernelRegion | None:
    """Region `index` of the device; None where there is none. fd: the descriptor, for as long as the device is open."""
    try:
        question = wire.RegionInfo(index=index)
        answer = ask(device, uapi.DEVICE_GET_REGION_INFO, question, "VFIO_DEVICE_GET_REGION_INFO", f"region {index}")
    except UsageError:
        return None
    info = wire.RegionInfo.unpack(answer)
    if info.size == 0:
        return None
    return KernelRegion(fd, info, _areas(info, answer))


def _areas(info: wire.RegionInfo, answer: bytes) -> tuple[tuple[int, int], ...]:
    """What may be mapped: what the sparse capability says, or all of it. A BAR with the MSI-X table in it has no mmap flag where the
    table must not be mapped, and a capability that says so where it may be."""
    if not info.flags & wire.REGION_MMAP:
        return ()
    for header, at in capabilities(answer, info.cap_offset if info.flags & wire.REGION_CAPS else 0):
        if header.id == wire.CAPABILITY_SPARSE_MMAP:
            parts = wire.SparseMmap.unpack(answer, at).areas
            return tuple((part.offset, part.size) for part in parts if part.size and part.offset + part.size <= info.size)
    return ((0, info.size // _PAGE * _PAGE),) if info.size >= _PAGE else ()
