"""`Function`: what a server has of a device for one client, and the one of the PCI personality, around a VMBus connection.

A function knows nothing of what stands behind it: a `Backend` gets the admin ring, and is told to let go. It is
single-threaded: whoever carries accesses to it (a device in this process, a server's loop) does so from one thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from ..errors import UsageError, VfioVmbusError
from ..iommu.domain import Domain
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE, Piece
from ..memory.shared import SharedMemory
from ..wire.vfio import IRQ_MSIX, PCI_IRQS, PCI_REGIONS, REGION_CONFIG
from . import config, eventfd
from . import registers as reg

log = logging.getLogger("vfio_vmbus.vfio")

_IOVA_LOW, _IOVA_HIGH = reg.REG_ADMIN_IOVA, reg.REG_ADMIN_IOVA + 4


class Backend(Protocol):
    """What stands behind a function. The admin ring's doorbell is the function's `doorbell(0)`."""

    def start(self, pieces: list[Piece], downstream: int) -> None:
        """The admin ring pair is in `pieces`; the host-to-driver ring begins `downstream` bytes into it. Raises RingError."""

    def revoke(self, iova: int, size: int) -> None:
        """The client takes this memory away: end what uses it, by the function's `fail`."""

    def stop(self) -> None:
        """Close all channels, forget all GPADLs and the admin ring: nothing of the client's memory is in use afterwards."""


class Vectors:
    """MSI-X vectors: each has a descriptor of its own that never changes, so that kernels can signal it at any time.

    What it leads to is exchanged underneath (dup2): the client's eventfd, or one that nobody reads.
    """

    def __init__(self, count: int) -> None:
        self.fds: list[int] = []
        with ExitStack() as stack:
            self._nobody = eventfd.make()
            stack.callback(os.close, self._nobody)
            for _ in range(count):
                self.fds.append(os.dup(self._nobody))
                stack.callback(os.close, self.fds[-1])
            self._resources = stack.pop_all()

    def lead_to(self, vector: int, client: int | None) -> None:
        """Let a vector signal a client's eventfd, or nobody. Raises UsageError for a number or a descriptor that is none."""
        if not 0 <= vector < len(self.fds):
            raise UsageError(f"interrupt vector {vector}: there are {len(self.fds)}")
        if client is not None and not eventfd.is_eventfd(client):
            raise UsageError(f"descriptor {client} is not an eventfd")
        os.dup2(self._nobody if client is None else client, self.fds[vector], inheritable=False)

    def reset(self) -> None:
        for vector in range(len(self.fds)):
            self.lead_to(vector, None)

    def close(self) -> None:
        self.fds = []
        self._resources.close()


@dataclass(frozen=True)
class Window:
    """A region of a function: `size` bytes. read(offset, size) and write(offset, data) raise UsageError for what it does not have.

    memory: gives the region as memory, if clients may map it: the same for one client, another one for the next.
    """

    size: int
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]
    memory: Callable[[], SharedMemory] | None = None


class Function(Protocol):
    """A device for one client at a time, of either personality. regions, irqs: how many indexes there are.

    pci: is it a PCI function? irq: the index of its only kind of interrupt. windows: the regions that are there.
    """

    name: str
    regions: int
    irqs: int
    pci: bool
    irq: int
    domain: Domain
    vectors: Vectors

    @property
    def windows(self) -> Mapping[int, Window]: ...

    def doorbells(self, region: int) -> range:
        """Offsets of a region's 32-bit registers that an eventfd may stand for."""

    def doorbell_at(self, region: int, offset: int) -> int:
        """The eventfd that stands for the register at `offset`. Raises UsageError where there is none."""

    def reset(self) -> None:
        """Back to the state after power-on; maps and interrupts stay."""

    def gone(self) -> None:
        """What stands behind it ends: let go of the client's memory, show that and signal it."""

    def release(self) -> None:
        """The client is gone: reset, and nothing of it is kept."""

    def close(self) -> None:
        """The function itself goes away."""


class PciFunction:
    """Registers of BAR 0 (`registers`), MSI-X vectors, configuration space and the client's `Domain`. docs/pci-personality.md.

    vectors: up to 128. channels: doorbells, up to 1024. identity: what stands behind it, for the configuration space. limits: as of
    Domain (max_maps, max_bytes).
    """

    regions = PCI_REGIONS
    irqs = PCI_IRQS
    pci = True
    irq = IRQ_MSIX

    def __init__(
        self,
        name: str,
        *,
        vectors: int = reg.VECTORS,
        channels: int = reg.CHANNELS,
        identity: config.Identity = config.NOTHING,
        **limits: int,
    ) -> None:
        self.name = name
        self.channels = channels
        self._msix = config.msix_bar(vectors)
        self._config = config.config_space(identity, vectors)
        self.windows = {
            config.BAR0_INDEX: Window(reg.BAR0_SIZE, self.read, self.write),
            config.MSIX_INDEX: Window(self._msix.size, self._msix.read, self._msix.write),
            REGION_CONFIG: Window(self._config.size, self._config.read, self._config.write),
        }
        self.domain = Domain(name, **limits)
        self.domain.revoke = self._revoke
        self.vectors = Vectors(vectors)
        self.backend: Backend | None = None
        self._doorbells: dict[int, int] = {}
        self._words = dict.fromkeys((_IOVA_LOW, _IOVA_HIGH, reg.REG_ADMIN_UPSTREAM, reg.REG_ADMIN_DOWNSTREAM), 0)
        self._constants = {
            reg.REG_MAGIC: reg.MAGIC,
            reg.REG_LAYOUT: reg.LAYOUT,
            reg.REG_CHANNELS: channels,
            reg.REG_VECTORS: vectors,
            reg.REG_MAX_ADMIN_PAGES: reg.MAX_ADMIN_PAGES,
        }
        self._admin = range(0)
        """IOVAs of the running admin ring."""
        self._status = 0
        self._error = reg.ERROR_NONE

    def doorbell(self, number: int) -> int:
        """The eventfd behind a doorbell register. Raises UsageError for a number that is not there."""
        if not 0 <= number < self.channels:
            raise UsageError(f"doorbell {number}: there are {self.channels}")
        if number not in self._doorbells:
            self._doorbells[number] = eventfd.make()
        return self._doorbells[number]

    def doorbells(self, region: int) -> range:
        return range(reg.REG_DOORBELLS, reg.REG_DOORBELLS + 4 * self.channels, 4) if region == config.BAR0_INDEX else range(0)

    def doorbell_at(self, region: int, offset: int) -> int:
        if offset not in self.doorbells(region):
            raise UsageError(f"no doorbell register at {offset:#x} of region {region}")
        return self.doorbell((offset - reg.REG_DOORBELLS) // 4)

    @property
    def failed(self) -> bool:
        """Has the backend given up?"""
        return self._status == reg.STATUS_FAILED

    def read(self, offset: int, size: int) -> bytes:
        """Read registers of BAR 0. Raises UsageError outside of it, at an odd width or unaligned."""
        _check_access(offset, size)
        if size == 4:
            return self._read_word(offset).to_bytes(4, "little")
        return (self._read_word(offset) | self._read_word(offset + 4) << 32).to_bytes(8, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Write registers of BAR 0. Raises as `read`."""
        _check_access(offset, len(data))
        for at in range(0, len(data), 4):
            self._write_word(offset + at, int.from_bytes(data[at : at + 4], "little"))

    def fail(self, error: int) -> None:
        """The backend can go on no more: let go of the client's memory, show why (ERROR_*) and signal it."""
        try:
            self._stop()
        finally:
            log.warning("%s: stopped: %s", self.name, reg.ERRORS[error])
            self._status = reg.STATUS_FAILED
            self._error = error
            eventfd.ring(self.vectors.fds[0])

    def reset(self) -> None:
        """Back to the state after power-on; maps and interrupts stay."""
        self._config.reset()
        self._msix.reset()
        self._reset_registers()

    def gone(self) -> None:
        """The host ends: `fail`, which wakes a client that waits for an answer."""
        self.fail(reg.ERROR_GONE)

    def release(self) -> None:
        """The client is gone: reset, and nothing of it is kept."""
        with ExitStack() as stack:
            stack.callback(self.vectors.reset)
            stack.callback(self.domain.close)
            stack.callback(self.reset)

    def close(self) -> None:
        """The function itself goes away."""
        with ExitStack() as stack:
            while self._doorbells:
                stack.callback(os.close, self._doorbells.popitem()[1])
            stack.callback(self.vectors.close)
            stack.callback(self.release)

    def _read_word(self, offset: int) -> int:
        if offset == reg.REG_STATUS:
            return self._status
        if offset == reg.REG_ERROR:
            return self._error
        return self._words[offset] if offset in self._words else self._constants.get(offset, 0)

    def _write_word(self, offset: int, value: int) -> None:
        if offset >= reg.REG_DOORBELLS:
            doorbell = self._doorbells.get((offset - reg.REG_DOORBELLS) // 4)
            if doorbell is not None:  # else there is nobody yet who would hear it
                eventfd.ring(doorbell)
        elif offset == reg.REG_CONTROL and value == reg.CONTROL_START:
            self._start()
        elif offset == reg.REG_CONTROL and value == reg.CONTROL_RESET:
            self._reset_registers()
        elif offset in self._words:
            self._words[offset] = value

    def _reset_registers(self) -> None:
        """The driver's own reset, which leaves the configuration space alone: else BAR 0 would vanish under it."""
        self._stop()
        self._words = dict.fromkeys(self._words, 0)
        self._status = 0
        self._error = reg.ERROR_NONE

    def _start(self) -> None:
        if self._status & reg.STATUS_RUNNING:
            self.fail(reg.ERROR_RUNNING)
            return
        upstream, downstream = self._words[reg.REG_ADMIN_UPSTREAM], self._words[reg.REG_ADMIN_DOWNSTREAM]
        if min(upstream, downstream) < 2 or upstream + downstream > reg.MAX_ADMIN_PAGES:
            self.fail(reg.ERROR_ADMIN_SIZE)
            return
        iova, size = self._words[_IOVA_LOW] | self._words[_IOVA_HIGH] << 32, (upstream + downstream) * PAGE
        try:
            if iova % PAGE:
                raise UsageError(f"admin ring at {iova:#x}: take a multiple of {PAGE}")
            pieces = self.domain.pieces(iova, size, READ | WRITE)
            if self.backend is not None:
                self.backend.start(pieces, upstream * PAGE)
        except VfioVmbusError as error:
            log.warning("%s: %s", self.name, error)
            self.fail(reg.ERROR_ADMIN_MEMORY)
            return
        self._admin = range(iova, iova + size)
        self._status = reg.STATUS_RUNNING
        self._error = reg.ERROR_NONE

    def _stop(self) -> None:
        self._admin = range(0)
        if self.backend is not None:
            self.backend.stop()

    def _revoke(self, iova: int, size: int) -> None:
        """The client takes memory away: whatever uses it ends first, as an IOMMU would fault it."""
        if iova < self._admin.stop and self._admin.start < iova + size:
            self.fail(reg.ERROR_ADMIN_MEMORY)
        elif self.backend is not None:
            self.backend.revoke(iova, size)


def _check_access(offset: int, size: int) -> None:
    if size not in (4, 8) or offset < 0 or offset % size or offset + size > reg.BAR0_SIZE:
        raise UsageError(f"access of {size} bytes at {offset:#x}: 4 or 8 bytes, aligned, within {reg.BAR0_SIZE:#x}")
