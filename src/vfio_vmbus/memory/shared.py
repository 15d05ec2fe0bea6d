"""Sealed shared memory: a memfd that can be handed to another process and cannot be shrunk under whoever maps it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence

from ..errors import DmaError, UsageError
from .mapping import PAGE, Mapping, Piece

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_PUNCH_HOLE = 0x3
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE"""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


HUGE_PAGE = 2 << 20
"""Bytes of the huge pages that are asked for."""


class SharedMemory:
    """`size` bytes, a multiple of 4096, behind the descriptor `fd`, sealed against shrinking and growing.

    huge: of huge pages, and then a multiple of HUGE_PAGE; where the machine has none left, mapping raises OSError.
    """

    def __init__(self, size: int, name: str = "vfio-vmbus", *, huge: bool = False) -> None:
        self.page = HUGE_PAGE if huge else PAGE
        if size <= 0 or size % self.page:
            raise UsageError(f"shared memory of {size} bytes: take a positive multiple of {self.page}")
        self.size = size
        kind = os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge else 0
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | kind)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(self.fd)
            raise

    def map(self, offset: int = 0, size: int | None = None, *, wrap_from: int | None = None) -> Mapping:
        """Map [offset, offset + size), the rest of the memory by default. Raises UsageError outside of it."""
        size = self.size - offset if size is None else size
        if offset < 0 or size <= 0 or offset + size > self.size:
            raise UsageError(f"{size} bytes at {offset} are outside {self.size} bytes of shared memory")
        return Mapping([Piece(self.fd, offset, size)], wrap_from=wrap_from, align=max(self.page, mmap.PAGESIZE))

    def close(self) -> None:
        """Close the descriptor; mappings stay until they are closed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def require_sealed(fd: int) -> int:
    """The size in bytes of a memfd that is sealed against shrinking; DmaError for any other descriptor.

    Memory that can be taken away while it is mapped kills whoever touches it (SIGBUS), so nothing else is ever mapped. Huge pages are
    refused for that reason, too: a hole punched into them stays one when the pool is empty, seals or not.
    """
    if fd < 0:
        raise DmaError(f"descriptor {fd} is none: only sealed memfds are mapped")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except (OSError, ValueError, OverflowError) as error:  # fcntl answers numbers that cannot be with the latter two
        raise DmaError(f"descriptor {fd} is not a memfd ({error}): only sealed memfds are mapped") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise DmaError(f"descriptor {fd} is a memfd without F_SEAL_SHRINK: seal it against shrinking first")
    page = os.fstatvfs(fd).f_bsize
    if page > mmap.PAGESIZE:
        raise DmaError(f"descriptor {fd} is a memfd of huge pages ({page} bytes): take one of {mmap.PAGESIZE}-byte pages")
    return os.fstat(fd).st_size


def is_sealed(fd: int) -> bool:
    """Can it be mapped?"""
    try:
        require_sealed(fd)
    except DmaError:
        return False
    return True


def side_by_side(pieces: Sequence[Piece], *, wrap_from: int | None = None, populate: bool = True) -> Mapping:
    """Map pieces of sealed memory into one contiguous range; `populate` as for `Mapping`.

    Raises DmaError for memory that is not sealed, too short, or that the kernel refuses to map like this.
    """
    sizes = {fd: require_sealed(fd) for fd in {piece.fd for piece in pieces}}
    for piece in pieces:
        if piece.offset < 0 or piece.offset + piece.size > sizes[piece.fd]:
            raise DmaError(f"{piece.size} bytes at {piece.offset} are outside memory of {sizes[piece.fd]} bytes")
    try:
        return Mapping(pieces, wrap_from=wrap_from, populate=populate)
    except OSError as error:
        raise DmaError(f"these {len(pieces)} pieces of memory cannot be mapped side by side: {error}") from error


def discard(piece: Piece) -> None:
    """Give the pages of a piece back to the machine; whoever reads them next sees zeros. Raises DmaError where the file cannot."""
    if _libc.fallocate(piece.fd, _PUNCH_HOLE, piece.offset, piece.size):
        reason = os.strerror(ctypes.get_errno())
        raise DmaError(f"{piece.size} bytes at {piece.offset} of descriptor {piece.fd} cannot be discarded: {reason}")
