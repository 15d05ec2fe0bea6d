"""Memory whose file can be taken away while it is mapped: sysfs' and UIO's files of a device that goes.

The kernel unmaps it then, and who touches it gets SIGBUS, which would end the process. Here that puts zeros in its place, so that the
thread goes on, and hears from its device what has happened; DPDK does so for PCI devices that are unplugged (drivers/bus/pci).
The answer may be Python: a fault is no interruption, but comes where a kernel or ctypes touches that memory, never within the
interpreter or malloc.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from typing import Any, Final, Protocol

_SA_SIGINFO: Final = 4
_CODE_AT, _ADDRESS_AT = 8, 16
"""Of siginfo_t, where pointers have 64 bits."""

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Vanishing(Protocol):
    """A mapping. blank: put private zeros in its place."""

    address: int
    span: int

    def blank(self) -> None: ...


_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.sigaction.argtypes = (ctypes.c_int, ctypes.POINTER(_Action), ctypes.POINTER(_Action))
_mappings = dict[int, Vanishing]()
_before = _Action()
"""What SIGBUS did before."""
_lock = threading.Lock()
_installed = False


def expect(mapping: Vanishing) -> None:
    """Be ready for its file to go, until `forget`."""
    global _installed
    with _lock:
        _mappings[mapping.address] = mapping
        if not _installed:
            action = _Action(handler=ctypes.cast(_on_fault, ctypes.c_void_p), flags=_SA_SIGINFO)
            _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))
            _installed = True


def forget(mapping: Vanishing) -> None:
    """Before it is unmapped; its addresses are anybody's then."""
    _mappings.pop(mapping.address, None)


def _fault(number: int, info: int, context: int) -> None:
    """On the thread that touched it. Anything else ends as it would have: what was there before gets it when this returns."""
    code = ctypes.c_int.from_address(info + _CODE_AT).value
    address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
    touched = [mapping for mapping in list(_mappings.values()) if mapping.address <= address < mapping.address + mapping.span]
    if code > 0 and touched:
        touched[0].blank()
        return
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)
    if code <= 0:  # somebody's kill(2): no instruction is tried again
        os.kill(os.getpid(), signal.SIGBUS)


_on_fault = _Handler(_fault)
