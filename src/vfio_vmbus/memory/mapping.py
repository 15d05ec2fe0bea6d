"""Address space made of pieces of files: mapped side by side, between guard pages, and optionally wrapped.

A ring's data area is mapped twice in a row ("wrapped"), so that a packet which runs past the end of the ring is
contiguous in memory; Linux (drivers/hv/ring_buffer.c) and Hyper-V do the same. A GPADL is mapped from the files behind
its pages into one range.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Lock

from ..errors import ClosedError, UsageError
from . import vanishing
from .registry import register, unregister

PAGE = 4096
"""Bytes of a VMBus page, whatever the CPU's page size."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000
_MREMAP_MAYMOVE_FIXED = 0x3
_FAILED = ctypes.c_void_p(-1).value
_ending = Lock()
"""Held where an address is about to be anybody's again."""

MOST_PIECES = 60_000
"""Mapped at once, by all who map: Linux gives a process 65530 mappings, and without one left it gets neither threads nor memory."""


class _Pieces:
    """How many there are."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, more: int) -> None:
        """Raises OSError for more than this process may have."""
        with self._lock:
            if self.count + more > MOST_PIECES:
                raise OSError(errno.ENOMEM, f"{self.count} pieces of memory are mapped, {more} more exceed {MOST_PIECES}")
            self.count += more

    def remove(self, fewer: int) -> None:
        with self._lock:
            self.count -= fewer


_pieces = _Pieces()


@dataclass(frozen=True)
class Piece:
    """`size` bytes at `offset` of the file `fd`.

    whole: for files that can be mapped from certain offsets only (UIO's maps): such an offset and the bytes there; `offset` is then
    within those.
    """

    fd: int
    offset: int
    size: int
    writable: bool = True
    whole: tuple[int, int] | None = None


def _mmap(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result: int = _libc.mmap(address, size, protection, flags, fd, offset)
    if result == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {size} bytes at file offset {offset}: {os.strerror(code)}")
    return result


def _map_piece(at: int, piece: Piece, flags: int) -> None:
    """Map a piece at an address. A part of what can be mapped only as a whole is moved there out of it."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if piece.writable else 0)
    if piece.whole is None:
        _mmap(at, piece.size, protection, flags | _MAP_FIXED, piece.fd, piece.offset)
        return
    start, size = piece.whole
    base = _mmap(0, size, protection, flags, piece.fd, start)
    try:
        if _libc.mremap(base + piece.offset, piece.size, piece.size, _MREMAP_MAYMOVE_FIXED, at) == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"mremap of {piece.size} bytes at {piece.offset} of {size}: {os.strerror(code)}")
    finally:
        _libc.munmap(base, size)  # what is left of it


def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighbours that are neighbours in their file, too."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        alike = last and (last.fd, last.writable, last.whole) == (piece.fd, piece.writable, piece.whole)
        if last and alike and last.offset + last.size == piece.offset:
            merged[-1] = replace(last, size=last.size + piece.size)
        else:
            merged.append(piece)
    return merged


def window(pieces: Sequence[Piece], start: int, size: int) -> list[Piece]:
    """What of the pieces, laid side by side, is bytes [start, start + size). Raises UsageError outside of them."""
    total = sum(piece.size for piece in pieces)
    if start < 0 or size < 0 or start + size > total:
        raise UsageError(f"{size} bytes at {start} are outside pieces of {total} bytes together")
    cut = []
    at = 0
    for piece in pieces:
        first, last = max(start - at, 0), min(start + size - at, piece.size)
        if first < last:
            cut.append(replace(piece, offset=piece.offset + first, size=last - first))
        at += piece.size
    return cut


class Mapping:
    """A contiguous range of this process's memory over pieces of files.

    address: first byte. size: bytes of the pieces together. A wrapped mapping repeats its pieces' bytes from `wrap_from`
    on, once more, behind itself: `address + size + n` is `address + wrap_from + n`. populate: fault all pages in now, so that
    no kernel waits for that; not for memory of any size that somebody else names, whose holes that would fill.
    align: of `address`, in bytes; huge pages want their own size. vanishes: the file is a device's, and goes with it: whoever touches the
    memory then finds private zeros there.
    Raises OSError where the kernel refuses, UsageError for pieces that are not whole pages and for a wrap_from outside
    of them. A CPU with pages of more than 4096 bytes cannot map (and refuses) what is not aligned to its own.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        wrap_from: int | None = None,
        populate: bool = True,
        align: int = mmap.PAGESIZE,
        vanishes: bool = False,
    ) -> None:
        for piece in pieces:
            if piece.size <= 0 or piece.offset < 0 or (piece.size | piece.offset) % PAGE:
                raise UsageError(f"{piece.size} bytes at file offset {piece.offset} are not whole pages of {PAGE} bytes")
        self.size = sum(piece.size for piece in pieces)
        self.wrap_from = wrap_from
        again = [] if wrap_from is None else window(pieces, wrap_from, self.size - wrap_from)
        self.span = self.size + sum(piece.size for piece in again)
        self._reserved = self.span + mmap.PAGESIZE + align
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        parts = merge([*pieces, *again])
        self._parts = len(parts)
        _pieces.add(self._parts)
        try:
            self._base = _mmap(0, self._reserved, _PROT_NONE, private, -1, 0)
        except OSError:
            _pieces.remove(self._parts)
            raise
        self.address = -(-(self._base + 1) // align) * align
        flags = mmap.MAP_SHARED | (_MAP_POPULATE if populate else 0)
        try:
            at = self.address
            for piece in parts:
                _map_piece(at, piece, flags)
                at += piece.size
        except OSError:
            _libc.munmap(self._base, self._reserved)
            _pieces.remove(self._parts)
            raise
        register(self.address, self.span)
        self.closed = False
        if vanishes:
            vanishing.expect(self)

    def _place(self, offset: int, size: int) -> int:
        if self.closed:
            raise ClosedError("this memory is unmapped already")
        if offset < 0 or size < 0 or offset + size > self.span:
            raise UsageError(f"{size} bytes at offset {offset} are outside a mapping of {self.span} bytes")
        return self.address + offset

    def read(self, offset: int, size: int) -> bytes:
        """A copy of `size` bytes at `offset`, the repeated part included. Raises UsageError outside, ClosedError unmapped."""
        return ctypes.string_at(self._place(offset, size), size)

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes at `offset`. Errors as for `read`."""
        ctypes.memmove(self._place(offset, len(data)), data, len(data))

    def blank(self) -> None:
        """Put private zeros where the files were, for those whose files are taken away: touching them goes on, and means nothing."""
        with _ending:
            if not self.closed:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
                _mmap(self.address, self.span, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)

    def close(self) -> None:
        """Unmap. Whoever runs kernels over this memory stops them first."""
        with _ending:
            if not self.closed:
                self.closed = True
                vanishing.forget(self)
                unregister(self.address)
                _libc.munmap(self._base, self._reserved)
                _pieces.remove(self._parts)

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
