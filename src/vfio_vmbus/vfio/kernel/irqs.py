"""Interrupts of a device that the kernel has. INTx, MSI and MSI-X exclude each other; ERR and REQ go beside them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from threading import RLock
from typing import Final

from ...errors import UnavailableError, UsageError
from ...wire import vfio as wire
from ...wire import vfio_ioctl as uapi
from .. import eventfd
from ..device import IRQ_EVENTFD, IRQ_MASKABLE, IRQ_NORESIZE, Irq
from .ioctl import call

_NAMES: Final = {
    wire.IRQ_INTX: "INTx",
    wire.IRQ_MSI: "MSI",
    wire.IRQ_MSIX: "MSI-X",
    wire.IRQ_ERR: "ERR",
    wire.IRQ_REQ: "REQ",
}
_ALONE: Final = (wire.IRQ_INTX, wire.IRQ_MSI, wire.IRQ_MSIX)
NOBODY: Final = -1


class InUse:
    """Which kind of a device's interrupts is enabled, of those that exclude each other; and the lock of all of them."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.kind: KernelIrq | None = None


class KernelIrq(Irq):
    """One kind of interrupt. Any thread may call.

    MSI and, on older kernels, MSI-X cannot be given more vectors while some are enabled (IRQ_NORESIZE): then the first `enable` allocates
    all of them, as many as the machine has room for, and disabling the last one frees them.
    """

    def __init__(self, fd: Callable[[], int], info: wire.IrqInfo, in_use: InUse) -> None:
        self.index = info.index
        self.count = info.count
        self.flags = info.flags
        self.name = _NAMES.get(info.index, f"interrupt index {info.index}")
        self._fd = fd
        self._in_use = in_use
        self._enabled: set[int] = set()
        self._allocated = 0

    @property
    def enabled(self) -> frozenset[int]:
        """The vectors that signal somebody."""
        return frozenset(self._enabled)

    def enable(self, vector: int, eventfd_: int) -> None:
        fd = self._fd()
        self._check(vector)
        if not eventfd.is_eventfd(eventfd_):
            raise UsageError(f"descriptor {eventfd_} is not an eventfd")
        if not self.flags & IRQ_EVENTFD:
            raise UsageError(f"{self.name} signals no eventfd")
        with self._in_use.lock:
            other = self._in_use.kind
            if self.index in _ALONE and other is not None and other is not self:
                raise UsageError(f"vectors of {other.name} are enabled: disable them first, a device has one kind at a time")
            if not self._allocated:
                self._allocate(fd, vector, eventfd_)
            elif self.flags & IRQ_NORESIZE and vector >= self._allocated:
                raise UnavailableError(
                    f"vector {vector} of {self.name}: the machine had room for {self._allocated} of {self.count}"
                )
            else:
                self._lead(fd, vector, [eventfd_])
            self._enabled.add(vector)
            if self.index in _ALONE:
                self._in_use.kind = self

    def disable(self, vector: int) -> None:
        fd = self._fd()
        self._check(vector)
        with self._in_use.lock:
            if self._enabled == {vector}:
                self.disable_all()
            elif vector in self._enabled:
                self._lead(fd, vector, [NOBODY])
                self._enabled.discard(vector)

    def disable_all(self) -> None:
        """Signal nobody, and give the vectors back to the machine."""
        fd = self._fd()
        with self._in_use.lock:
            if self._enabled and self.index in _ALONE:
                self._set(fd, wire.SET_DATA_NONE | wire.SET_ACTION_TRIGGER, 0, 0)
            elif self._enabled:
                self._lead(fd, 0, [NOBODY])
            self.forget()

    def mask(self, vector: int) -> None:
        self._mask(vector, wire.SET_ACTION_MASK)

    def unmask(self, vector: int) -> None:
        self._mask(vector, wire.SET_ACTION_UNMASK)

    def loopback(self, vector: int) -> None:
        """Let the kernel signal an enabled vector, as if the device had: a test of all but the device. Raises UsageError otherwise."""
        fd = self._fd()
        self._check(vector)
        self._act(fd, vector, wire.SET_ACTION_TRIGGER)

    def forget(self) -> None:
        """Nothing is enabled any more: the device is closed."""
        self._enabled.clear()
        self._allocated = 0
        if self._in_use.kind is self:
            self._in_use.kind = None

    def _allocate(self, fd: int, vector: int, eventfd_: int) -> None:
        """The first one. The kernel answers with the number of vectors that there is room for, when that is too little."""
        count = self.count if self.flags & IRQ_NORESIZE else vector + 1
        while True:
            table = [NOBODY] * count
            table[vector] = eventfd_
            room = self._lead(fd, 0, table)
            if room == 0:
                break
            if not vector < room < count:
                raise UnavailableError(f"vector {vector} of {self.name}: the machine has room for {room} vectors")
            count = room
        self._allocated = count

    def _lead(self, fd: int, start: int, fds: list[int]) -> int:
        data = b"".join(each.to_bytes(4, "little", signed=True) for each in fds)
        return self._set(fd, wire.SET_DATA_EVENTFD | wire.SET_ACTION_TRIGGER, start, len(fds), data)

    def _mask(self, vector: int, action: int) -> None:
        fd = self._fd()
        self._check(vector)
        if not self.flags & IRQ_MASKABLE:
            raise UsageError(f"vector {vector} of {self.name} cannot be masked")
        self._act(fd, vector, action)

    def _act(self, fd: int, vector: int, action: int) -> None:
        with self._in_use.lock:
            if vector not in self._enabled:
                raise UsageError(f"vector {vector} of {self.name} is not enabled")
            self._set(fd, wire.SET_DATA_NONE | action, vector, 1)

    def _set(self, fd: int, flags: int, start: int, count: int, data: bytes = b"") -> int:
        size = wire.IrqSet.SIZE + len(data)
        wanted = wire.IrqSet(argsz=size, flags=flags, index=self.index, start=start, count=count)
        return call(
            fd, uapi.DEVICE_SET_IRQS, bytearray(wanted.pack() + data), what=f"{count} vectors of {self.name} from {start}"
        )

    def _check(self, vector: int) -> None:
        if not 0 <= vector < self.count:
            raise UsageError(f"vector {vector} of {self.name}: there are {self.count}")


def open_irq(device: int, index: int, fd: Callable[[], int], in_use: InUse) -> KernelIrq | None:
    """Interrupt index `index` of the device; None where there is none. in_use: shared by all of a device's."""
    answer = bytearray(wire.IrqInfo(index=index).pack())
    try:
        call(device, uapi.DEVICE_GET_IRQ_INFO, answer, what=f"index {index}")
    except UsageError as error:
        if getattr(error, "errno", 0) == errno.EINVAL:
            return None
        raise
    info = wire.IrqInfo.unpack(answer)
    return KernelIrq(fd, info, in_use) if info.count else None
