"""`Edu`: the educational PCI device that QEMU has as `edu`, as a device that this package serves; an example of how to serve one's own.

It inverts numbers, computes factorials, raises interrupts (INTx or MSI), and copies between its buffer of 4096 bytes and its client's
memory, wherever that is. Source: QEMU's docs/specs/edu.rst. What that leaves open: addresses have 64 bits; a copy that leaves the
buffer or that the client's memory refuses copies nothing, and is over as any other; factorials are modulo 2^32, and ready at once.

    async def main() -> None:
        server = UserServer()
        server.listen("/run/edu.sock", Edu)

or `python -m vfio_vmbus.testing.edu /run/edu.sock`; then QEMU takes it by
-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/edu.sock"}}'.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import UsageError, VfioVmbusError
from ..iommu.domain import IOVA_LIMIT, Domain
from ..vfio import eventfd
from ..vfio.config import Storage
from ..vfio.user.connection import Client, ServerLimits
from ..vfio.user.device import IoFd, ServedMap, map_for_client
from ..vfio.user.memory import ClientMemory
from ..vfio.user.server import ServerEvent, UserServer
from ..wire import pci, vfio

log = logging.getLogger("vfio_vmbus.testing")

VENDOR: Final = 0x1234
DEVICE: Final = 0x11E8
BAR_SIZE: Final = 1 << 20
MSI_AT: Final = 0x40

REG_ID: Final = 0x00
REG_LIVENESS: Final = 0x04
REG_FACTORIAL: Final = 0x08
REG_STATUS: Final = 0x20
REG_IRQ_STATUS: Final = 0x24
REG_IRQ_RAISE: Final = 0x60
REG_IRQ_ACK: Final = 0x64
REG_DMA_SOURCE: Final = 0x80
REG_DMA_TARGET: Final = 0x88
REG_DMA_COUNT: Final = 0x90
REG_DMA_COMMAND: Final = 0x98
BUFFER_AT: Final = 0x40000
BUFFER_SIZE: Final = 4096

ID: Final = 0x010000ED
STATUS_IRQ_FACTORIAL: Final = 0x80
IRQ_FACTORIAL: Final = 0x001
IRQ_DMA: Final = 0x100
DMA_START: Final = 1
DMA_FROM_DEVICE: Final = 2
DMA_IRQ: Final = 4

_WIDE: Final = (REG_DMA_SOURCE, REG_DMA_TARGET, REG_DMA_COUNT, REG_DMA_COMMAND)
_WORD: Final = 0xFFFFFFFF
_ENDLESS: Final = 34
"""Its factorial, and any larger number's, is 0 modulo 2^32."""


class Edu:
    """The device of one client: a `Claim`, and what it gives. `faults`: copies that were refused."""

    regions = vfio.PCI_REGIONS
    irqs = vfio.PCI_IRQS
    pci = True

    def __init__(self, client: Client, *, max_maps: int = 65535) -> None:
        self.max_maps = max_maps
        self.faults = 0
        self._domain = Domain(client.name, max_maps=max_maps)
        self._memory = ClientMemory(self._domain, client)
        self._config = _config_space()
        self._interrupts = {vfio.IRQ_INTX: _Interrupt(), vfio.IRQ_MSI: _Interrupt()}
        self._buffer = bytearray(BUFFER_SIZE)
        self._copying: asyncio.Task[None] | None = None
        self._words: dict[int, int] = {}
        self._clear()

    def region_size(self, region: int) -> int:
        return {vfio.REGION_BAR0: BAR_SIZE, vfio.REGION_CONFIG: self._config.size}.get(region, 0)

    def region_map(self, region: int) -> ServedMap | None:
        return None

    def read(self, region: int, offset: int, size: int) -> bytes:
        if region == vfio.REGION_CONFIG:
            return self._config.read(offset, size)
        register = _register(offset, size)
        if register in (REG_IRQ_RAISE, REG_IRQ_ACK):  # written only
            return bytes(size)
        value = self._words.get(register, 0) >> 8 * (offset - register)
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        if region == vfio.REGION_CONFIG:
            self._config.write(offset, data)
            return
        register = _register(offset, len(data))
        shift = 8 * (offset - register)
        mask = (1 << 8 * len(data)) - 1 << shift
        value = self._words.get(register, 0) & ~mask | int.from_bytes(data, "little") << shift
        if register == REG_LIVENESS:
            self._words[register] = ~value & _WORD
        elif register == REG_FACTORIAL:
            self._words[register] = math.factorial(min(value, _ENDLESS)) & _WORD
            if self._words[REG_STATUS] & STATUS_IRQ_FACTORIAL:
                self._raise(IRQ_FACTORIAL)
        elif register == REG_STATUS:
            self._words[register] = value & STATUS_IRQ_FACTORIAL
        elif register == REG_IRQ_RAISE:
            self._raise(value)
        elif register == REG_IRQ_ACK:
            self._words[REG_IRQ_STATUS] &= ~value
        elif register == REG_DMA_COMMAND:
            self._command(value)
        elif register in _WIDE and not self._words[REG_DMA_COMMAND] & DMA_START:  # not while a copy is under way
            self._words[register] = value

    def io_fds(self, region: int, most: int) -> list[IoFd]:
        return []

    def irq_count(self, index: int) -> int:
        return 1 if index in self._interrupts else 0

    def irq_flags(self, index: int) -> int:
        level = vfio.IRQ_MASKABLE | vfio.IRQ_AUTOMASKED
        return vfio.IRQ_EVENTFD | (level if index == vfio.IRQ_INTX else vfio.IRQ_NORESIZE)

    def lead_to(self, index: int, start: int, fds: list[int | None]) -> None:
        if any(fd is not None and not eventfd.is_eventfd(fd) for fd in fds):
            raise UsageError("a descriptor for an interrupt is not an eventfd")
        for fd in fds:  # there is one vector
            self._interrupts[index].lead_to(fd)
            if index == vfio.IRQ_INTX:
                self._interrupts[index].masked = False
                self._signal_level()

    def mask(self, index: int, vector: int, masked: bool) -> None:
        self._interrupts[index].masked = masked
        self._signal_level()

    def fire(self, index: int, vector: int) -> None:
        self._interrupts[index].signal()

    def map(self, iova: int, size: int, access: int, fd: int | None, offset: int) -> None:
        map_for_client(self._domain, iova, size, access, fd, offset)

    def unmap(self, iova: int, size: int) -> None:
        self._domain.unmap(iova, size)

    def unmap_all(self) -> None:
        self._domain.unmap(0, IOVA_LIMIT)

    def reset(self) -> None:
        if self._copying is not None:
            self._copying.cancel()
            self._copying = None
        self._config.reset()
        self._clear()

    @property
    def fault_count(self) -> int:
        return self._domain.fault_count

    def release(self) -> None:
        self.reset()
        for interrupt in self._interrupts.values():
            interrupt.lead_to(None)
        self._domain.close()

    def _clear(self) -> None:
        self._words = dict.fromkeys((REG_LIVENESS, REG_FACTORIAL, REG_STATUS, REG_IRQ_STATUS, *_WIDE), 0)
        self._words[REG_ID] = ID
        self._buffer[:] = bytes(BUFFER_SIZE)

    def _raise(self, causes: int) -> None:
        self._words[REG_IRQ_STATUS] |= causes & _WORD
        if not self._words[REG_IRQ_STATUS]:
            return
        if self._interrupts[vfio.IRQ_MSI].leads:
            self._interrupts[vfio.IRQ_MSI].signal()
        else:
            self._signal_level()

    def _signal_level(self) -> None:
        """INTx is a level: as long as there is a cause it is signalled again whenever the client unmasks it, and masked by that."""
        line = self._interrupts[vfio.IRQ_INTX]
        if self._words[REG_IRQ_STATUS] and line.leads and not line.masked and not self._interrupts[vfio.IRQ_MSI].leads:
            line.masked = True
            line.signal()

    def _command(self, value: int) -> None:
        if self._words[REG_DMA_COMMAND] & DMA_START:  # one at a time
            return
        self._words[REG_DMA_COMMAND] = value & (DMA_START | DMA_FROM_DEVICE | DMA_IRQ)
        if value & DMA_START:
            self._copying = asyncio.get_running_loop().create_task(self._copy(value))

    async def _copy(self, command: int) -> None:
        source, target, count = (self._words[register] for register in (REG_DMA_SOURCE, REG_DMA_TARGET, REG_DMA_COUNT))
        inside, outside = (source, target) if command & DMA_FROM_DEVICE else (target, source)
        first = inside - BUFFER_AT
        try:
            if not 0 <= first <= first + count <= BUFFER_SIZE:
                raise UsageError(f"a copy of {count} bytes at {inside:#x} leaves the device's buffer")
            if command & DMA_FROM_DEVICE:
                await self._memory.write(outside, bytes(self._buffer[first : first + count]))
            else:
                self._buffer[first : first + count] = await self._memory.read(outside, count)
        except VfioVmbusError as error:
            self.faults += 1
            log.info("%s: %s", self._domain.device, error)
        self._words[REG_DMA_COMMAND] &= ~DMA_START
        if command & DMA_IRQ:
            self._raise(IRQ_DMA)


class _Interrupt:
    """Where an interrupt leads: a client's eventfd, of which this is a duplicate, or nowhere."""

    def __init__(self) -> None:
        self.masked = False
        self._fd = -1

    @property
    def leads(self) -> bool:
        return self._fd >= 0

    def lead_to(self, fd: int | None) -> None:
        mine = -1 if fd is None else os.dup(fd)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = mine
        if mine >= 0:
            os.set_blocking(mine, False)

    def signal(self) -> None:
        if self._fd >= 0:
            eventfd.ring(self._fd)


def _register(offset: int, size: int) -> int:
    """The register that an access is to. Raises UsageError for a width that it does not have."""
    widths = (4,) if offset < REG_DMA_SOURCE else (4, 8)
    if size not in widths or offset % size:
        raise UsageError(f"access of {size} bytes at {offset:#x}: {' or '.join(map(str, widths))} bytes, aligned")
    return offset - offset % 8 if offset >= REG_DMA_SOURCE else offset


def _config_space() -> Storage:
    initial, writable = bytearray(pci.CONFIG_SIZE), bytearray(pci.CONFIG_SIZE)
    pci.ConfigHeader(
        vendor=VENDOR,
        device=DEVICE,
        status=pci.STATUS_CAPABILITIES,
        class_and_revision=0x00FF0010,  # unclassified, revision 0x10
        capabilities=MSI_AT,
        interrupt_pin=1,
    ).pack_into(initial)
    pci.MsiCapability().pack_into(initial, MSI_AT)
    pci.ConfigHeader(
        command=pci.COMMAND_MEMORY | pci.COMMAND_MASTER | pci.COMMAND_INTX_DISABLE,
        cache_line_size=0xFF,
        bars=(-BAR_SIZE & _WORD, 0, 0, 0, 0, 0),
        interrupt_line=0xFF,
    ).pack_into(writable)
    pci.MsiCapability(id=0, control=pci.MSI_ENABLE, address_low=0xFFFFFFFC, address_high=_WORD, data=0xFFFF).pack_into(
        writable, MSI_AT
    )
    return Storage(bytes(initial), bytes(writable))


@contextmanager
def serving_edu(
    *paths: str | os.PathLike[str],
    limits: ServerLimits | None = None,
    events: Callable[[ServerEvent], None] = lambda event: None,
    make: Callable[[Client], Edu] = Edu,
) -> Iterator[None]:
    """Serve an Edu at each path while the block runs, by a thread of its own. Raises UsageError for a path that cannot be."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="edu", daemon=True)
    thread.start()

    async def begin() -> UserServer:
        server = UserServer(limits=limits, events=events)
        try:
            for path in paths:
                server.listen(path, make)
        except UsageError:
            server.close()
            raise
        return server

    async def end(server: UserServer) -> None:
        server.close()
        await asyncio.sleep(0)  # for copies that were cancelled

    try:
        server = asyncio.run_coroutine_threadsafe(begin(), loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(end(server), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> None:
    """Serve one Edu until interrupted."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m vfio_vmbus.testing.edu PATH")
    with serving_edu(sys.argv[1], events=lambda event: print(event.kind, event.place, event.reason, flush=True)):
        threading.Event().wait()


if __name__ == "__main__":
    main()
