"""Regions of a PCI device as sysfs has them: its configuration space, BARs of memory, BARs of I/O ports.

Source: drivers/pci/pci-sysfs.c of Linux 6.12. Files of memory BARs can be mapped only; those of ports can be read and written only.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Final
from weakref import WeakSet

from ..errors import ClosedError, RescindedError, UnavailableError, UsageError, VfioVmbusError
from ..memory.mapping import Mapping, Piece
from ..vfio.device import CONFIG_REGION, REGION_MMAP, REGION_READ, REGION_WRITE, Region
from ..wire import pci

COMMAND: Final = pci.ConfigHeader.OFFSETS["command"]
_INTEGERS: Final = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
"""Assigned `from_address`, each is one access of the device; a slice of memory is not."""

Check = Callable[[], None]
"""Raises ClosedError once the device is closed."""
Ring = Callable[["SysfsRegion", int], int]
"""An eventfd that stands for a write to a register."""


class SysfsRegion(Region):
    """Bounds and widths: an access is cut into aligned ones of 8 (memory only), 4, 2 and 1 bytes, as many as are needed."""

    widest = 4

    def __init__(self, index: int, size: int, path: Path, check: Check, ring: Ring) -> None:
        self.index = index
        self.size = size
        self.flags = REGION_READ | REGION_WRITE
        self._path = path
        self._check_open = check
        self._ring = ring

    def read(self, offset: int, size: int) -> bytes:
        self._check(offset, size)
        return b"".join(self._load(at, width) for at, width in _accesses(offset, size, self.widest))

    def write(self, offset: int, data: bytes) -> None:
        self._check(offset, len(data))
        for at, width in _accesses(offset, len(data), self.widest):
            self._store(at, data[at - offset : at - offset + width])

    def doorbell(self, offset: int) -> int:
        """As `Region.doorbell`. A thread of this process writes the register: a write by oneself is faster."""
        self._check(offset, 4)
        if offset % 4 or self.index == CONFIG_REGION:
            raise UsageError(f"no doorbell register at {offset:#x} of region {self.index}: take a 32-bit one of a BAR")
        return self._ring(self, offset)

    @abstractmethod
    def release(self) -> None:
        """Close what is open."""

    def vanish(self) -> None:
        """The device is gone; what is mapped of it is to stay harmless."""

    @abstractmethod
    def _load(self, offset: int, width: int) -> bytes: ...

    @abstractmethod
    def _store(self, offset: int, data: bytes) -> None: ...

    def _check(self, offset: int, size: int) -> None:
        self._check_open()
        if size <= 0 or offset < 0 or offset + size > self.size:
            raise UsageError(f"{size} bytes at {offset:#x}: region {self.index} has {self.size:#x}")


class FileRegion(SysfsRegion):
    """Accesses are calls of pread(2) and pwrite(2): I/O ports."""

    def __init__(self, index: int, size: int, path: Path, check: Check, ring: Ring) -> None:
        super().__init__(index, size, path, check, ring)
        self._fd = _open(path)

    def release(self) -> None:
        os.close(self._fd)

    def _load(self, offset: int, width: int) -> bytes:
        try:
            data = os.pread(self._fd, width, offset)
        except OSError as error:
            raise self._refused(error, f"read of {width} bytes at {offset:#x}") from error
        if len(data) != width:
            raise UsageError(f"read of {width} bytes at {offset:#x} of region {self.index}: there are {len(data)}")
        return data

    def _store(self, offset: int, data: bytes) -> None:
        try:
            written = os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise self._refused(error, f"write of {len(data)} bytes at {offset:#x}") from error
        if written != len(data):
            raise UsageError(f"write of {len(data)} bytes at {offset:#x} of region {self.index}: {written} were")

    def _refused(self, error: OSError, what: str) -> VfioVmbusError:
        text = f"{what} of region {self.index}: {error.strerror}"
        if error.errno in (errno.ENODEV, errno.ENXIO):
            return RescindedError(f"{text}; the device is gone")
        if error.errno in (errno.EPERM, errno.EACCES):
            return UnavailableError(f"{text}; a locked-down kernel lets nobody do that")
        return UsageError(text)


class ConfigRegion(FileRegion):
    """The configuration space. refuse: makes the error for a write that lets the device master the bus; None where it may."""

    def __init__(self, path: Path, check: Check, ring: Ring, refuse: Callable[[], VfioVmbusError] | None) -> None:
        super().__init__(CONFIG_REGION, _size(path), path, check, ring)
        self._refuse = refuse
        self._lock = Lock()

    def change_command(self, clear: int, set_: int) -> None:
        """Change bits of the command register. The kernel changes one by itself, COMMAND_INTX_DISABLE, at an interrupt; if that is lost
        here, the line, which is still up, makes another."""
        with self._lock:
            before = int.from_bytes(self._load(COMMAND, 2), "little")
            after = before & ~clear | set_
            if after != before:
                super()._store(COMMAND, after.to_bytes(2, "little"))

    def _store(self, offset: int, data: bytes) -> None:
        low = data[COMMAND - offset] if offset <= COMMAND < offset + len(data) else 0
        if self._refuse is not None and low & pci.COMMAND_MASTER:
            raise self._refuse()
        with self._lock:
            super()._store(offset, data)


class MemoryRegion(SysfsRegion):
    """A BAR of memory at the physical address `start`. It is mapped at once, and accessed there. One of less than a page may begin
    within one; the kernel maps the page."""

    widest = 8

    def __init__(self, index: int, start: int, size: int, path: Path, check: Check, ring: Ring) -> None:
        super().__init__(index, size, path, check, ring)
        self._within = start % mmap.PAGESIZE
        pages = 0 if self._within else size // mmap.PAGESIZE * mmap.PAGESIZE
        self.areas = ((0, pages),) if pages else ()
        self.flags |= REGION_MMAP if pages else 0
        self._fd = _open(path)
        self._mapped_once: WeakSet[Mapping] = WeakSet()
        try:
            self._mapping = self._mapped(0, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, None)
        except VfioVmbusError:
            os.close(self._fd)
            raise

    def map(self, offset: int, size: int, *, wrap_from: int | None = None) -> Mapping:
        """As `Region.map`. Close it before the device. Its registers are accessed as `vfio.kernel.regions` says."""
        self._check_open()
        if size <= 0 or offset < 0 or (offset | size) % mmap.PAGESIZE:
            raise UsageError(f"{size:#x} bytes at {offset:#x}: take whole pages of {mmap.PAGESIZE} bytes")
        if not any(start <= offset and offset + size <= start + length for start, length in self.areas):
            return super().map(offset, size)
        return self._mapped(offset, size, wrap_from)

    def release(self) -> None:
        self._mapping.close()
        os.close(self._fd)

    def vanish(self) -> None:
        for mapping in list(self._mapped_once):
            mapping.blank()

    def _mapped(self, offset: int, size: int, wrap_from: int | None) -> Mapping:
        try:
            mapping = Mapping([Piece(self._fd, offset, size)], wrap_from=wrap_from, populate=False, vanishes=True)
        except OSError as error:
            raise UnavailableError(
                f"{self._path} cannot be mapped: {error}; a locked-down kernel, or one with iomem=strict, lets nobody do that"
            ) from error
        self._mapped_once.add(mapping)
        return mapping

    def _load(self, offset: int, width: int) -> bytes:
        return int(_INTEGERS[width].from_address(self._at(offset)).value).to_bytes(width, "little")

    def _store(self, offset: int, data: bytes) -> None:
        _INTEGERS[len(data)].from_address(self._at(offset)).value = int.from_bytes(data, "little")

    def _at(self, offset: int) -> int:
        if self._mapping.closed:
            raise ClosedError("this region is closed")
        return self._mapping.address + self._within + offset


def _accesses(offset: int, size: int, widest: int) -> list[tuple[int, int]]:
    """(offset, width) of aligned accesses that make up these bytes."""
    found = []
    end = offset + size
    while offset < end:
        width = widest
        while offset % width or offset + width > end:
            width //= 2
        found.append((offset, width))
        offset += width
    return found


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        may = f"; this process (uid {os.geteuid()}) may not: run as root" if error.errno in (errno.EACCES, errno.EPERM) else ""
        raise UnavailableError(f"{path}: {error.strerror}{may}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}") from error
