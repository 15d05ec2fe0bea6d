"""System calls from kernels: read, write, poll, sleep, yield and the clock, through libc, without the GIL.

Each returns what libc returns; a negative number is minus the errno.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from numba import types

from .access import inline, load32, load64, store64
from .kernel import INTERPRETED
from .registry import check

EAGAIN = 11
EINTR = 4
POLLIN = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _external(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(name, result(*arguments))


if INTERPRETED:

    def _call(name: str, *arguments: Any) -> int:
        function = getattr(_libc, name)
        function.restype = ctypes.c_ssize_t
        result: int = function(*arguments)
        return result if result >= 0 else -ctypes.get_errno()

    def sys_read(fd: int, address: int, size: int) -> int:
        """read(2) into memory at `address`."""
        check(address, size)
        return _call("read", ctypes.c_int(fd), ctypes.c_void_p(int(address)), ctypes.c_size_t(size))

    def sys_write(fd: int, address: int, size: int) -> int:
        """write(2) from memory at `address`."""
        check(address, size)
        return _call("write", ctypes.c_int(fd), ctypes.c_void_p(int(address)), ctypes.c_size_t(size))

    def sys_poll(table: int, count: int, timeout_ms: int) -> int:
        """poll(2) over a table of struct pollfd."""
        check(table, 8 * count)
        return _call("poll", ctypes.c_void_p(int(table)), ctypes.c_ulong(count), ctypes.c_int(timeout_ms))

    def sys_epoll_wait(epoll: int, events: int, count: int, timeout_ms: int) -> int:
        """epoll_wait(2) into a table of `count` struct epoll_event (16 bytes each at most)."""
        check(events, 16 * count)
        return _call(
            "epoll_wait", ctypes.c_int(epoll), ctypes.c_void_p(int(events)), ctypes.c_int(count), ctypes.c_int(timeout_ms)
        )

    def sys_yield() -> None:
        """sched_yield(2)."""
        os.sched_yield()

    def sys_sleep(scratch: int) -> None:
        """nanosleep(2) for as long as the struct timespec at `scratch` says."""
        check(scratch, 16)
        _call("nanosleep", ctypes.c_void_p(int(scratch)), None)

    def clock_ns(scratch: int) -> int:
        """CLOCK_MONOTONIC in nanoseconds; `scratch` is 16 bytes of private memory."""
        check(scratch, 16)
        _libc.clock_gettime(ctypes.c_int(1), ctypes.c_void_p(int(scratch)))
        return int(load64(scratch)) * 1_000_000_000 + int(load64(scratch + 8))

else:
    _read = _external("read", types.int64, types.int32, types.int64, types.int64)
    _write = _external("write", types.int64, types.int32, types.int64, types.int64)
    _poll = _external("poll", types.int32, types.int64, types.int64, types.int32)
    _epoll_wait = _external("epoll_wait", types.int32, types.int32, types.int64, types.int32, types.int32)
    _errno = _external("__errno_location", types.int64)
    _yield = _external("sched_yield", types.int32)
    _clock = _external("clock_gettime", types.int32, types.int32, types.int64)
    _sleep = _external("nanosleep", types.int32, types.int64, types.int64)

    @inline
    def sys_read(fd: int, address: int, size: int) -> int:
        """read(2) into memory at `address`."""
        result = _read(fd, address, size)
        return result if result >= 0 else -load32(_errno())

    @inline
    def sys_write(fd: int, address: int, size: int) -> int:
        """write(2) from memory at `address`."""
        result = _write(fd, address, size)
        return result if result >= 0 else -load32(_errno())

    @inline
    def sys_poll(table: int, count: int, timeout_ms: int) -> int:
        """poll(2) over a table of struct pollfd."""
        result = types.int64(_poll(table, count, timeout_ms))
        return result if result >= 0 else -load32(_errno())

    @inline
    def sys_epoll_wait(epoll: int, events: int, count: int, timeout_ms: int) -> int:
        """epoll_wait(2) into a table of `count` struct epoll_event (16 bytes each at most)."""
        result = types.int64(_epoll_wait(epoll, events, count, timeout_ms))
        return result if result >= 0 else -load32(_errno())

    @inline
    def sys_yield() -> None:
        """sched_yield(2)."""
        _yield()

    @inline
    def sys_sleep(scratch: int) -> None:
        """nanosleep(2) for as long as the struct timespec at `scratch` says."""
        _sleep(scratch, 0)

    @inline
    def clock_ns(scratch: int) -> int:
        """CLOCK_MONOTONIC in nanoseconds; `scratch` is 16 bytes of private memory."""
        _clock(1, scratch)
        return load64(scratch) * 1_000_000_000 + load64(scratch + 8)


@inline
def sleep_ns(duration: int, scratch: int) -> None:
    """Sleep for less than a second, given in nanoseconds; `scratch` is 16 bytes of private memory."""
    store64(scratch, 0)
    store64(scratch + 8, duration)
    sys_sleep(scratch)


@inline
def eventfd_signal(fd: int, scratch: int) -> None:
    """Add one to an eventfd; `scratch` is 8 bytes of private memory."""
    store64(scratch, 1)
    sys_write(fd, scratch, 8)
