"""A PCI function around one client's VMBus connection: its registers, interrupts and IO address space.

It knows nothing of what stands behind it: a `Backend` gets the admin ring and the doorbell, and is told to let go. The function is
single-threaded: whoever carries accesses to it (a device in this process, a server's loop) does so from one thread.
"""

from __future__ import annotations

import os
from typing import Protocol

from ..errors import DmaError, IsolationFault, RingError, UsageError
from ..iommu.domain import Domain
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE, Piece
from . import registers as reg

EVENT_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class Backend(Protocol):
    """What stands behind a function."""

    def start(self, pieces: list[Piece], downstream: int) -> None:
        """The admin ring pair is in `pieces`; the host-to-driver ring begins `downstream` bytes into it. Raises RingError."""

    def kick(self) -> None:
        """The admin ring's doorbell was rung."""

    def stop(self) -> None:
        """Close all channels, forget all GPADLs and the admin ring: nothing of the client's memory is in use afterwards."""


class Vectors:
    """MSI-X vectors: each has a descriptor of its own that never changes, so that kernels can signal it at any time.

    What it leads to is exchanged underneath (dup2): the client's eventfd, or one that nobody reads.
    """

    def __init__(self, count: int) -> None:
        self._nobody = os.eventfd(0, EVENT_FLAGS)
        self.fds = [os.dup(self._nobody) for _ in range(count)]

    def lead_to(self, vector: int, eventfd: int | None) -> None:
        """Let a vector signal a client's eventfd, or nobody. Raises UsageError for a number or a descriptor that is none."""
        if not 0 <= vector < len(self.fds):
            raise UsageError(f"interrupt vector {vector}: there are {len(self.fds)}")
        if eventfd is not None:
            if os.readlink(f"/proc/self/fd/{eventfd}") != "anon_inode:[eventfd]":
                raise UsageError(f"descriptor {eventfd} is not an eventfd")
            os.set_blocking(eventfd, False)  # a counter that nobody reads must not stop the data plane
        os.dup2(self._nobody if eventfd is None else eventfd, self.fds[vector], inheritable=False)

    def reset(self) -> None:
        for vector in range(len(self.fds)):
            self.lead_to(vector, None)

    def close(self) -> None:
        for fd in (*self.fds, self._nobody):
            os.close(fd)
        self.fds = []


class PciFunction:
    """Registers of BAR 0 (`registers`), MSI-X vectors and the client's `Domain`."""

    def __init__(self, name: str, *, vectors: int = reg.VECTORS, channels: int = reg.CHANNELS) -> None:
        self.name = name
        self.domain = Domain(name)
        self.vectors = Vectors(vectors)
        self.backend: Backend | None = None
        self._channels = channels
        self._doorbells: dict[int, int] = {}
        self._registers = {reg.REG_ADMIN_IOVA: 0, reg.REG_ADMIN_UPSTREAM: 0, reg.REG_ADMIN_DOWNSTREAM: 0}
        self._status = 0
        self._error = reg.ERROR_NONE

    def doorbell(self, number: int) -> int:
        """The eventfd behind a doorbell register. Raises UsageError for a number that is not there."""
        if not 0 <= number < self._channels:
            raise UsageError(f"doorbell {number}: there are {self._channels}")
        if number not in self._doorbells:
            self._doorbells[number] = os.eventfd(0, EVENT_FLAGS)
        return self._doorbells[number]

    def read(self, offset: int, size: int) -> bytes:
        """Read a register of BAR 0. Raises UsageError outside of it or at an odd width."""
        self._check_access(offset, size)
        values = {
            reg.REG_MAGIC: reg.MAGIC,
            reg.REG_LAYOUT: reg.LAYOUT,
            reg.REG_CHANNELS: self._channels,
            reg.REG_VECTORS: len(self.vectors.fds),
            reg.REG_MAX_ADMIN_PAGES: reg.MAX_ADMIN_PAGES,
            reg.REG_STATUS: self._status,
            reg.REG_ERROR: self._error,
            **self._registers,
        }
        return (values.get(offset, 0) & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Write a register of BAR 0. Raises as `read`."""
        self._check_access(offset, len(data))
        value = int.from_bytes(data, "little")
        if offset >= reg.REG_DOORBELLS:
            self._ring((offset - reg.REG_DOORBELLS) // 4)
        elif offset == reg.REG_CONTROL and value == reg.CONTROL_START:
            self._start()
        elif offset == reg.REG_CONTROL and value == reg.CONTROL_RESET:
            self.reset()
        elif offset in self._registers:
            self._registers[offset] = value

    def fail(self, error: int) -> None:
        """The backend can go on no more: show why, and let go of the client's memory."""
        if self.backend is not None:
            self.backend.stop()
        self._status = reg.STATUS_FAILED
        self._error = error
        os.eventfd_write(self.vectors.fds[0], 1)

    def reset(self) -> None:
        """Back to the state after power-on; maps and interrupts stay."""
        if self.backend is not None:
            self.backend.stop()
        for offset in self._registers:
            self._registers[offset] = 0
        self._status = 0
        self._error = reg.ERROR_NONE

    def release(self) -> None:
        """The client is gone: reset, and nothing of it is kept."""
        self.reset()
        self.domain.close()
        self.vectors.reset()

    def close(self) -> None:
        """The function itself goes away."""
        self.release()
        self.vectors.close()
        for fd in self._doorbells.values():
            os.close(fd)
        self._doorbells.clear()

    def _check_access(self, offset: int, size: int) -> None:
        if size not in (4, 8) or offset < 0 or offset % size or offset + size > reg.BAR0_SIZE:
            raise UsageError(f"access of {size} bytes at {offset:#x}: 4 or 8 bytes, aligned, within {reg.BAR0_SIZE:#x}")

    def _ring(self, number: int) -> None:
        if number < self._channels:
            os.eventfd_write(self.doorbell(number), 1)

    def _start(self) -> None:
        if self._status & reg.STATUS_RUNNING:
            self.fail(reg.ERROR_RUNNING)
            return
        upstream, downstream = self._registers[reg.REG_ADMIN_UPSTREAM], self._registers[reg.REG_ADMIN_DOWNSTREAM]
        if min(upstream, downstream) < 2 or upstream + downstream > reg.MAX_ADMIN_PAGES:
            self.fail(reg.ERROR_ADMIN_SIZE)
            return
        try:
            size = (upstream + downstream) * PAGE
            pieces = self.domain.pieces(self._registers[reg.REG_ADMIN_IOVA], size, READ | WRITE)
            if self.backend is not None:
                self.backend.start(pieces, upstream * PAGE)
        except (IsolationFault, DmaError, RingError):
            self.fail(reg.ERROR_ADMIN_MEMORY)
            return
        self._status = reg.STATUS_RUNNING
        self._error = reg.ERROR_NONE
