"""The one interrupt that a UIO node has, as an eventfd; and doorbells. Both by a thread, as UIO knows neither.

Source: drivers/uio/uio.c, uio_pci_generic.c of Linux 6.12, igb_uio.c of dpdk-kmods. A node's file is readable when interrupts came since it
was read. uio_pci_generic disables the line at each (PCI's command register), and lets the driver enable it; igb_uio takes 1 and 0
by write(2), and disables itself a line only, no message.
"""

from __future__ import annotations

import errno
import os
import selectors
from collections.abc import Callable
from contextlib import suppress
from threading import RLock, Thread
from typing import Final

from ..errors import RescindedError, UsageError, VfioVmbusError
from ..vfio import eventfd
from ..vfio.device import IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE, IRQ_NORESIZE, Irq
from ..wire import pci
from ..wire.vfio import IRQ_INTX, IRQ_MSI, IRQ_MSIX
from .uio_pci_regions import Check, ConfigRegion, SysfsRegion

_FLAGS: Final = {
    IRQ_INTX: IRQ_MASKABLE | IRQ_AUTOMASKED,
    IRQ_MSI: IRQ_NORESIZE,  # igb_uio takes the order to mask, but a device need not be able to
    IRQ_MSIX: IRQ_MASKABLE | IRQ_NORESIZE,
}
_FAULTS: Final = (errno.EIO, errno.ENODEV, errno.ENXIO)


class Attendant:
    """Waits for the node and for doorbells, as soon as there is one of them."""

    def __init__(self) -> None:
        self.lock = RLock()
        self._stop = eventfd.make()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._thread: Thread | None = None
        self._bells: dict[tuple[int, int], int] = {}
        self._closed = False

    def watch(self, file: int, ready: Callable[[], bool]) -> None:
        """Call `ready`, under the lock, whenever there is something to read, from now on; it is False when that is over."""
        with self.lock:
            self._selector.register(file, selectors.EVENT_READ, ready)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="uio-attendant", daemon=True)
                self._thread.start()

    def bell(self, region: SysfsRegion, offset: int) -> int:
        """The eventfd that stands for a write of 1 to a register."""
        with self.lock:
            key = (region.index, offset)
            if key not in self._bells:
                bell = eventfd.make()
                self._bells[key] = bell

                def rung() -> bool:
                    if eventfd.take(bell):
                        with suppress(VfioVmbusError):  # a device that is gone, as its user will see
                            region.write32(offset, 1)
                    return True

                self.watch(bell, rung)
            return self._bells[key]

    def close(self) -> None:
        """Neither doorbells nor interrupts are passed on from now on."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        self._selector.close()
        os.close(self._stop)
        for bell in self._bells.values():
            os.close(bell)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                with self.lock:
                    if not key.data():
                        self._selector.unregister(key.fileobj)


class UioIrq(Irq):
    """INTx, or with igb_uio the one vector of MSI or MSI-X that it took. Its line is enabled as long as somebody is to be told.

    INTx is masked when it falls (IRQ_AUTOMASKED): acknowledge it at the device, then `unmask`.
    control: igb_uio's way to mask; otherwise by the command register. gone: is called when the driver has lost the device.
    passed: how often somebody was told.
    """

    count = 1

    def __init__(
        self,
        index: int,
        file: int,
        config: ConfigRegion,
        attendant: Attendant,
        check: Check,
        gone: Callable[[], None],
        *,
        control: bool,
    ) -> None:
        self.index = index
        self.flags = IRQ_EVENTFD | _FLAGS[index]
        self.passed = 0
        self._file = file
        self._config = config
        self._attendant = attendant
        self._check_open = check
        self._gone = gone
        self._control = control
        self._eventfd = -1
        attendant.watch(file, self._ready)

    @property
    def enabled(self) -> bool:
        """Is somebody to be told?"""
        return self._eventfd >= 0

    def enable(self, vector: int, eventfd_: int) -> None:
        self._check(vector)
        if not eventfd.is_eventfd(eventfd_):
            raise UsageError(f"descriptor {eventfd_} is not an eventfd")
        with self._attendant.lock:
            first = self._eventfd < 0
            kept = os.dup(eventfd_)
            self._forget()
            self._eventfd = kept
            if first:
                self._taken()  # what came when nobody was to be told
                self._let(True)

    def disable(self, vector: int) -> None:
        self._check(vector)
        with self._attendant.lock:
            if self._eventfd >= 0:
                self._let(False)
                self._forget()

    def mask(self, vector: int) -> None:
        self._mask(vector, True)

    def unmask(self, vector: int) -> None:
        self._mask(vector, False)

    def release(self) -> None:
        """Hold interrupts back, signal nobody."""
        with self._attendant.lock:
            self._let(False)
            self._forget()

    def _mask(self, vector: int, masked: bool) -> None:
        self._check(vector)
        if not self.flags & IRQ_MASKABLE:
            raise UsageError(f"vector {vector} of interrupt index {self.index} cannot be masked")
        with self._attendant.lock:
            if self._eventfd < 0:
                raise UsageError(f"vector {vector} of interrupt index {self.index} is not enabled")
            self._let(not masked)

    def _let(self, through: bool) -> None:
        if not self._control:
            bit = pci.COMMAND_INTX_DISABLE
            self._config.change_command(bit if through else 0, 0 if through else bit)
            return
        try:
            os.write(self._file, int(through).to_bytes(4, "little"))
        except OSError as error:
            if error.errno in _FAULTS:
                raise RescindedError(f"the device is gone ({error.strerror})") from error
            raise UsageError(f"igb_uio does not take {int(through)}: {error.strerror}") from error

    def _ready(self) -> bool:
        taken = self._taken()
        if taken is None:
            self._gone()
            return False
        if taken and self._eventfd >= 0:  # else `enable` was faster, and took what came before
            eventfd.ring(self._eventfd)
            self.passed += 1
        return True

    def _taken(self) -> bool | None:
        """Take the interrupts that came: were there any? None once the device is gone."""
        try:
            return len(os.read(self._file, 4)) == 4 or None
        except BlockingIOError:
            return False
        except OSError:
            return None

    def _forget(self) -> None:
        if self._eventfd >= 0:
            with suppress(OSError):
                os.close(self._eventfd)
            self._eventfd = -1

    def _check(self, vector: int) -> None:
        self._check_open()
        if vector != 0:
            raise UsageError(f"vector {vector} of interrupt index {self.index}: there is 1")
