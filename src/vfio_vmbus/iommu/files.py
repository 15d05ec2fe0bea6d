"""The files behind one client's maps, and the windows of them that this process has mapped.

A virtual IOMMU maps a guest's memory page by page: thousands of maps of one file. They share one descriptor, and one mapping of the
part of the file that is around them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from ..errors import DmaError
from ..memory.mapping import PAGE, Mapping, Piece
from ..memory.shared import require_sealed, side_by_side

WINDOW: Final = 1 << 30
"""Bytes of a file that are mapped at once for the small maps within."""
MAX_FILES: Final = 256
"""Descriptors that one client may cost."""
MAX_WINDOWS: Final = 1024
"""Each costs up to three of the 65530 mappings that Linux gives a process, and the small ones a gigabyte of its addresses."""

_FILE_SYSTEMS: Final = {
    0x01021994: "tmpfs",
    0x958458F6: "hugetlbfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
}
"""Whose files are read and written by the kernel alone. Others may leave a reader waiting for as long as they like."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(eq=False)
class _File:
    key: tuple[int, int, bool]
    fd: int
    users: int = 0
    windows: dict[tuple[int, int], Window] = field(default_factory=dict)


@dataclass(eq=False)
class Window:
    """Bytes [start, end) of a file, mapped unless they are to be copied only."""

    file: _File
    start: int
    end: int
    mapping: Mapping | None
    users: int = 0

    @property
    def fd(self) -> int:
        return self.file.fd

    def address(self, offset: int) -> int:
        """Where the file's byte `offset` is; 0 when it is nowhere."""
        return self.mapping.address + offset - self.start if self.mapping else 0


class Files:
    """What one client's maps need. `take` and `take_unmapped` are answered by a `give_back` each."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int, bool], _File] = {}
        self._windows = 0

    def take(self, fd: int, offset: int, size: int, writable: bool) -> Window:
        """Bytes [offset, offset + size) of a sealed memfd, mapped. Raises DmaError for any other file, or outside of it."""
        with self._file(fd, writable) as file:
            length = require_sealed(file.fd)
            if offset + size > length:
                raise DmaError(f"{size} bytes at {offset} are outside memory of {length} bytes")
            start = offset // WINDOW * WINDOW
            end = min(start + WINDOW, length // PAGE * PAGE)
            place = (start, end) if offset + size <= end else (offset, offset + size)
            window = file.windows.get(place)
            if window is None:
                if self._windows >= MAX_WINDOWS:
                    raise DmaError(f"memory is scattered over {self._windows} windows of {WINDOW} bytes, limit {MAX_WINDOWS}")
                piece = Piece(file.fd, place[0], place[1] - place[0], writable)
                window = Window(file, *place, side_by_side([piece], populate=False))
                file.windows[place] = window
                self._windows += 1
            return _used(window)

    def take_unmapped(self, fd: int, writable: bool) -> Window:
        """A file that is read and written, but not mapped. Raises DmaError for what is no file of a local file system."""
        _require_local_file(fd)
        with self._file(fd, writable) as file:
            return _used(file.windows.setdefault((0, 0), Window(file, 0, 0, None)))

    def give_back(self, window: Window) -> None:
        """One map less uses it; with the last it goes."""
        window.users -= 1
        window.file.users -= 1
        if not window.users:
            del window.file.windows[window.start, window.end]
            if window.mapping is not None:
                window.mapping.close()
                self._windows -= 1
        if not window.file.users:
            self._drop(window.file)

    @contextmanager
    def _file(self, fd: int, writable: bool) -> Iterator[_File]:
        """Our own descriptor of the file that the client's `fd` is; without a user it goes again."""
        key = _key_of(fd, writable)
        file = self._files.get(key)
        if file is None:
            if len(self._files) >= MAX_FILES:
                raise DmaError(f"maps of {len(self._files)} files, limit {MAX_FILES}")
            try:
                file = self._files[key] = _File(key, os.dup(fd))
            except OSError as error:
                raise DmaError(f"descriptor {fd} cannot be used: {error}") from error
        try:
            yield file
        finally:
            if not file.users:
                self._drop(file)

    def _drop(self, file: _File) -> None:
        del self._files[file.key]
        os.close(file.fd)


def _used(window: Window) -> Window:
    window.users += 1
    window.file.users += 1
    return window


def _key_of(fd: int, writable: bool) -> tuple[int, int, bool]:
    """What tells files apart. Raises DmaError for a descriptor that is not open for this."""
    try:
        status, mode = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, OverflowError, ValueError) as error:
        raise DmaError(f"descriptor {fd} cannot be used: {error}") from error
    if mode != os.O_RDWR and (writable or mode != os.O_RDONLY):
        raise DmaError(f"descriptor {fd} is not open for {'reading and writing' if writable else 'reading'}")
    return status.st_dev, status.st_ino, writable


def _require_local_file(fd: int) -> None:
    try:
        mode = os.fstat(fd).st_mode
    except (OSError, OverflowError) as error:
        raise DmaError(f"descriptor {fd} cannot be used: {error}") from error
    if not stat.S_ISREG(mode):
        raise DmaError(f"descriptor {fd} is neither memory nor a file")
    buffer = (ctypes.c_ulong * 64)()  # struct statfs begins with the type, and is smaller than this
    if _libc.fstatfs(fd, buffer) or buffer[0] not in _FILE_SYSTEMS:
        raise DmaError(f"descriptor {fd} is a file of file system {buffer[0]:#x}: take {', '.join(_FILE_SYSTEMS.values())}")
