"""Signalling an eventfd that somebody else holds, too, without ever waiting.

Whoever shares an eventfd can fill its counter and make it a blocking one at any moment: a write(2) to it would then wait for ever. The
kernel's own way to signal never waits (a full counter stays full), and asynchronous I/O leads to it: each completion of a request
with IOCB_FLAG_RESFD signals an eventfd. The request here reads nothing from an empty file, and so completes at once.
Source: Linux include/uapi/linux/aio_abi.h, fs/aio.c, fs/eventfd.c.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct
from contextlib import suppress
from typing import Final

import numpy as np
from numba import types

from .access import inline, load32, load64, store32
from .block import Block
from .kernel import INTERPRETED
from .libc import eventfd_signal
from .registry import check, register

log = logging.getLogger("vfio_vmbus.memory")

_NUMBERS = {"x86_64": (206, 209), "aarch64": (0, 2)}
"""io_setup and io_submit."""
_IO_SETUP, _IO_SUBMIT = _NUMBERS.get(platform.machine(), (-1, -1))
_EVENTS: Final = 64
_RING_SIZE: Final = 64
"""Bytes of the completion ring's header that are looked at."""
_HEAD, _TAIL = 8, 12
_PREAD: Final = 0
_RESFD: Final = 1

SIGNAL = np.dtype(
    [
        ("data", "u8"),
        ("key", "u4"),
        ("rw_flags", "i4"),
        ("opcode", "u2"),
        ("priority", "i2"),
        ("file", "u4"),
        ("buffer", "u8"),
        ("size", "u8"),
        ("offset", "i8"),
        ("reserved", "u8"),
        ("flags", "u4"),
        ("eventfd", "u4"),
        ("list", "i8"),  # address of this record: the list of requests that io_submit wants
        ("context", "i8"),  # address of the word that says which context this process has
        ("scratch", "i8", (2,)),  # for other system calls
    ]
)
"""A request (struct iocb, 64 bytes), and what is needed to submit it. Used by one thread at a time."""

_EVENTFD: int = SIGNAL.fields["eventfd"][1]  # type: ignore[index]
_CONTEXT_AT: int = SIGNAL.fields["context"][1]  # type: ignore[index]
_LIST: int = SIGNAL.fields["list"][1]  # type: ignore[index]
SCRATCH: int = SIGNAL.fields["scratch"][1]  # type: ignore[index]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _system_call(number: int, first: int, second: int, third: int) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), ctypes.c_long(first), ctypes.c_long(second), ctypes.c_void_p(third))
    return result if result >= 0 else -ctypes.get_errno()


def _set_up() -> int:
    """A context for this process, for life. -1 where the kernel has none for us."""
    context = ctypes.c_ulong(0)
    result = _system_call(_IO_SETUP, _EVENTS, ctypes.addressof(context), 0) if _IO_SETUP >= 0 else -1
    if result < 0:
        log.warning("no asynchronous I/O (%s): who shares an eventfd with us can make us wait", os.strerror(-result))
        return -1
    register(context.value, _RING_SIZE)
    return context.value


_context: Final = ctypes.c_int64(_set_up())
"""This process's context, -1: it has none. 0: it was forked, and has signalled nothing yet."""
_CONTEXT_WORD: Final = ctypes.addressof(_context)
register(_CONTEXT_WORD, 8)
os.register_at_fork(after_in_child=lambda: setattr(_context, "value", 0))  # a parent's context is none of its child's


def _ensure_context() -> int:
    """Which context it is. Threads that are first at once make one each, and use the last."""
    if _context.value == 0:
        _context.value = _set_up()
    return _context.value


_EMPTY: Final = os.memfd_create("vfio-vmbus-empty", os.MFD_CLOEXEC)


def signal_record() -> Block:
    """A SIGNAL record, for `signal`."""
    _ensure_context()
    record = Block(SIGNAL)
    record["opcode"] = _PREAD
    record["file"] = _EMPTY
    record["flags"] = _RESFD
    record["list"] = record.address
    record["context"] = _CONTEXT_WORD
    return record


if INTERPRETED:

    def _submit(context: int, requests: int) -> int:
        check(requests, 8)
        return _system_call(_IO_SUBMIT, int(context), 1, int(requests))

else:
    _syscall = types.ExternalFunction("syscall", types.int64(types.int64, types.int64, types.int64, types.int64))

    @inline
    def _submit(context: int, requests: int) -> int:
        return _syscall(_IO_SUBMIT, context, 1, requests)


@inline
def signal(fd: int, record: int) -> None:
    """Add one to an eventfd; `record` is the address of a SIGNAL record."""
    context = load64(load64(record + _CONTEXT_AT))
    if context > 0:
        store32(record + _EVENTFD, fd)
        if _submit(context, record + _LIST) == 1:
            store32(context + _HEAD, load32(context + _TAIL))  # it has completed: make room for the next one
            return
    eventfd_signal(fd, record + SCRATCH)


_TEMPLATE: Final = signal_record().array.tobytes()
"""What `signal_now` fills in: making a Block takes longer than signalling."""


def signal_now(fd: int) -> None:
    """The same from Python, from any thread; not compiled."""
    record = ctypes.create_string_buffer(_TEMPLATE, len(_TEMPLATE))
    address = ctypes.addressof(record)
    struct.pack_into("I", record, _EVENTFD, fd)
    struct.pack_into("q", record, _LIST, address)
    context = _ensure_context()
    if context > 0 and _system_call(_IO_SUBMIT, context, 1, address + _LIST) == 1:
        ring = (ctypes.c_uint32 * 4).from_address(context)
        ring[_HEAD // 4] = ring[_TAIL // 4]
    else:
        with suppress(BlockingIOError):
            os.eventfd_write(fd, 1)
