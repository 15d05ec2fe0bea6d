"""Memory whose page frames are known and stay the same: what a device without an IOMMU is told.

Locked memory may still be moved to other frames (compaction, memory hot-plug); only pinned memory may not. What pins memory for a
process that has no VFIO device is io_uring, whose registered buffers the kernel keeps in place (FOLL_LONGTERM). Frame numbers come from
/proc/self/pagemap. Sources: Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/io_uring.h, io_uring/rsrc.c of Linux 6.12.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from contextlib import ExitStack

from ..errors import DmaError
from .mapping import PAGE, Mapping
from .shared import HUGE_PAGE, SharedMemory

_IO_URING_SETUP, _IO_URING_REGISTER = 425, 427
_REGISTER_BUFFERS = 0
_PARAMETERS = 120
"""Bytes of struct io_uring_params."""
_PAGEMAP = "/proc/self/pagemap"
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_MADV_DONTFORK = 10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class PinnedMemory:
    """`size` bytes, a multiple of 4096, that stay where they are: zeroed, not inherited by children.

    `frames`: the number of each 4096-byte page's frame, whatever the CPU's page size is. `pinned`: False where the kernel has no
    io_uring for us and the memory is locked only. Huge pages are taken where they fit and are to be had.
    Raises DmaError: nothing to pin it with, or nobody who may know the frames (CAP_SYS_ADMIN).
    """

    def __init__(self, size: int, name: str = "vfio-vmbus") -> None:
        with ExitStack() as stack:
            self.memory, self.mapping = _allocate(size, name, stack)
            self.size = size
            self.pinned, self.frames = hold(self.mapping, stack)
            self._resources = stack.pop_all()

    @property
    def contiguous(self) -> bool:
        """Are all frames neighbours, in order?"""
        first = self.frames[0]
        return self.frames == tuple(range(first, first + len(self.frames)))

    def close(self) -> None:
        """Let go of it."""
        self._resources.close()


def hold(mapping: Mapping, stack: ExitStack) -> tuple[bool, tuple[int, ...]]:
    """Keep memory where it is until `stack` is closed: is it pinned (or locked only), and its frames. Raises DmaError as PinnedMemory."""
    pinned = _pin(mapping, stack)
    if not pinned:
        _lock(mapping)
    return pinned, _frames(mapping)


def _allocate(size: int, name: str, stack: ExitStack) -> tuple[SharedMemory, Mapping]:
    for huge in (True, False) if size % HUGE_PAGE == 0 else (False,):
        try:
            with ExitStack() as attempt:
                memory = attempt.enter_context(SharedMemory(size, name, huge=huge))
                mapping = attempt.enter_context(memory.map())
                stack.enter_context(attempt.pop_all())
        except OSError as error:
            if not huge:
                raise DmaError(f"{size} bytes of memory: {error}") from error
            continue
        _libc.madvise(ctypes.c_void_p(mapping.address), ctypes.c_size_t(size), _MADV_DONTFORK)
        return memory, mapping
    raise AssertionError("the last kind of page returns or raises")


def _pin(mapping: Mapping, stack: ExitStack) -> bool:
    """True once an io_uring of its own holds the pages."""
    ring = _libc.syscall(ctypes.c_long(_IO_URING_SETUP), ctypes.c_long(1), (ctypes.c_char * _PARAMETERS)())
    if ring < 0:
        return False
    held = ExitStack()
    held.callback(os.close, ring)
    vector = struct.pack("@PN", mapping.address, mapping.size)
    done = _libc.syscall(
        ctypes.c_long(_IO_URING_REGISTER), ctypes.c_long(ring), ctypes.c_long(_REGISTER_BUFFERS), vector, ctypes.c_long(1)
    )
    if done < 0:
        held.close()
        return False
    stack.enter_context(held)
    return True


def _lock(mapping: Mapping) -> None:
    if _libc.mlock(ctypes.c_void_p(mapping.address), ctypes.c_size_t(mapping.size)):
        reason = os.strerror(ctypes.get_errno())
        raise DmaError(f"{mapping.size} bytes cannot be locked ({reason}): raise the limit (ulimit -l), or run with CAP_IPC_LOCK")


def _frames(mapping: Mapping) -> tuple[int, ...]:
    """Read once the memory is in place. A CPU page of more than 4096 bytes is several frames."""
    count, each = -(-mapping.size // mmap.PAGESIZE), mmap.PAGESIZE // PAGE
    try:
        handle = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DmaError(f"{_PAGEMAP}: {error.strerror}: page frames cannot be known") from error
    try:
        entries = struct.unpack(f"={count}Q", os.pread(handle, 8 * count, mapping.address // mmap.PAGESIZE * 8))
    except (OSError, struct.error) as error:
        raise DmaError(f"{_PAGEMAP} does not tell of {count} pages: {error}") from error
    finally:
        os.close(handle)
    if not all(entry & _PRESENT and entry & _FRAME for entry in entries):
        raise DmaError(f"{_PAGEMAP} hides page frames from this process (uid {os.geteuid()}): it needs CAP_SYS_ADMIN")
    frames = [(entry & _FRAME) * each + part for entry in entries for part in range(each)]
    return tuple(frames[: mapping.size // PAGE])
