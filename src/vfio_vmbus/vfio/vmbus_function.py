"""The `vmbus` personality: a VMBus device whose channel, rings and buffers the server has opened. docs/vmbus-personality.md.

Rings and buffers are memory of the function's own, fresh for each client, and the channel is open from the client's first look at the
device on. What stands behind it is an `OpenedBackend`; nothing here knows of VMBus.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from ..errors import ClosedError, UsageError, VfioVmbusError
from ..iommu.domain import Domain
from ..memory.mapping import PAGE, Mapping
from ..memory.shared import SharedMemory
from ..wire import opened as wire
from . import eventfd
from .config import NOTHING, Identity
from .function import Vectors, Window

log = logging.getLogger("vfio_vmbus.vfio")

RECEIVE_HANDLE = 0x10001
SEND_HANDLE = 0x10002
"""The GPADL handles that packets name the buffers by: any numbers do, as they hold for this device alone."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of what the server opens, multiples of 4096. upstream, downstream: the rings from the driver and to it, each with its
    control page. receive, send: the buffers; 0: none. Raises UsageError for what cannot be."""

    upstream: int = 128 * PAGE
    downstream: int = 128 * PAGE
    receive: int = 16 << 20
    send: int = 4 << 20

    def __post_init__(self) -> None:
        for name, least in (("upstream", 2 * PAGE), ("downstream", 2 * PAGE), ("receive", 0), ("send", 0)):
            size = getattr(self, name)
            if size < least or size % PAGE or size > 1 << 30:
                raise UsageError(f"{name}: {size} bytes; take a multiple of {PAGE} from {least} to {1 << 30}")


class OpenedMemory:
    """What one client shares with the device: rings, buffers (None where there is none) and the eventfd that is its doorbell."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        with ExitStack() as stack:
            self.doorbell = eventfd.make()
            stack.callback(os.close, self.doorbell)
            self._parts: dict[int, tuple[SharedMemory, Mapping]] = {}
            for region, size in _parts(sizes):
                memory = stack.enter_context(SharedMemory(size, f"vmbus-{region}"))
                self._parts[region] = memory, stack.enter_context(memory.map())
            self._resources = stack.pop_all()

    @property
    def rings(self) -> SharedMemory:
        """Both rings, the one from the driver first."""
        return self._parts[wire.REGION_RINGS][0]

    def buffers(self) -> Iterator[tuple[int, SharedMemory, bool]]:
        """(GPADL handle, memory, does the device write it?) of each buffer."""
        for region, (handle, writable) in _BUFFERS.items():
            if region in self._parts:
                yield handle, self._parts[region][0], writable

    def part(self, region: int) -> tuple[SharedMemory, Mapping]:
        """A region's memory, and where this process sees it."""
        return self._parts[region]

    def clear(self) -> None:
        """All zero again."""
        for _, mapping in self._parts.values():
            mapping.write(0, bytes(mapping.size))

    def close(self) -> None:
        self._resources.close()


class OpenedBackend(Protocol):
    """What stands behind a VmbusFunction."""

    def start(self, memory: OpenedMemory, interrupt: int) -> None:
        """Open the channel over `memory`, whose contents are zero. interrupt: the eventfd of its vector. Raises VfioVmbusError, OSError."""

    def stop(self) -> None:
        """Close it: nothing of the memory is in use afterwards. Harmless when it is not open."""


class VmbusFunction:
    """Regions, doorbell, interrupt vector and `Domain` of a device with one channel. identity: what device it is. limits: as of
    Domain (max_maps, max_bytes).

    `backend` is to be set before a client comes.
    """

    regions = wire.REGION_REGISTERS + 1
    irqs = 1
    pci = False
    irq = wire.IRQ_CHANNELS

    def __init__(self, name: str, *, identity: Identity = NOTHING, sizes: Sizes | None = None, **limits: int) -> None:
        self.name = name
        self.sizes = sizes = sizes or Sizes()
        self.domain = Domain(name, **limits)
        self.vectors = Vectors(1)
        self.backend: OpenedBackend | None = None
        self._registers = _registers(identity, sizes)
        self._memory: OpenedMemory | None = None
        self._status = 0
        self._closed = False
        registers = Window(wire.REGISTERS_SIZE, self._read_register, self._write_register)
        self.windows = {wire.REGION_REGISTERS: registers} | {
            region: self._memory_window(region, size) for region, size in _parts(sizes)
        }
        for region, (handle, _) in _BUFFERS.items():
            if region in self.windows:
                self.windows[_HANDLE_REGIONS[region]] = _handle_window(handle)
        self.windows = dict(sorted(self.windows.items()))

    @property
    def failed(self) -> bool:
        """Was the channel closed over what the client did?"""
        return bool(self._status & wire.STATUS_FAILED)

    def doorbells(self, region: int) -> range:
        return range(wire.DOORBELLS_AT, wire.DOORBELLS_AT + 4, 4) if region == wire.REGION_REGISTERS else range(0)

    def doorbell_at(self, region: int, offset: int) -> int:
        if offset not in self.doorbells(region):
            raise UsageError(f"no doorbell register at {offset:#x} of region {region}")
        return self._opened().doorbell

    def fail(self) -> None:
        """The backend has closed the channel over what the client did: say so, and signal it."""
        log.warning("%s: the channel was closed", self.name)
        self._end(wire.STATUS_FAILED)

    def gone(self) -> None:
        """The device behind it is taken away, for good: close the channel, say so, and signal it."""
        self._stop()
        self._end(wire.STATUS_GONE)

    def reset(self) -> None:
        """Close the channel, clear its memory, and open it again; maps and interrupts stay, and so do clients' mappings."""
        self._stop()
        if self._memory is not None:
            self._memory.clear()
            self._start(self._memory)

    def release(self) -> None:
        """The client is gone. The memory goes, too: whoever still has it mapped shares it with nobody any more."""
        with ExitStack() as stack:
            stack.callback(self.vectors.reset)
            stack.callback(self.domain.close)
            stack.callback(self._drop_memory)
            self._stop()

    def close(self) -> None:
        """The function itself goes away."""
        self._closed = True
        with ExitStack() as stack:
            stack.callback(self.vectors.close)
            stack.callback(self.release)

    def _opened(self) -> OpenedMemory:
        """The client's memory. With its first look at the device the channel is opened."""
        if self._memory is None:
            if self._closed:
                raise ClosedError(f"{self.name} is closed")
            self._memory = OpenedMemory(self.sizes)
            self._start(self._memory)
        return self._memory

    def _start(self, memory: OpenedMemory) -> None:
        if self.backend is None or self._status & wire.STATUS_GONE:
            return
        try:
            self.backend.start(memory, self.vectors.fds[0])
        except (VfioVmbusError, OSError) as error:
            log.warning("%s: %s", self.name, error)
            self._end(wire.STATUS_FAILED)
        else:
            self._status = wire.STATUS_OPEN

    def _stop(self) -> None:
        if self.backend is not None:
            self.backend.stop()
        self._status &= wire.STATUS_GONE

    def _end(self, status: int) -> None:
        self._status = status | self._status & wire.STATUS_GONE
        eventfd.ring(self.vectors.fds[0])

    def _drop_memory(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def _read_register(self, offset: int, size: int) -> bytes:
        _check_access(offset, size, wire.REGISTERS_SIZE)
        self._opened()
        self._registers[wire.STATUS_AT : wire.STATUS_AT + 4] = self._status.to_bytes(4, "little")
        return bytes(self._registers[offset : offset + size])

    def _write_register(self, offset: int, data: bytes) -> None:
        _check_access(offset, len(data), wire.REGISTERS_SIZE)
        if len(data) != 4 or offset % 4:
            raise UsageError(f"write of {len(data)} bytes at {offset:#x}: 4 bytes, aligned")
        if offset in self.doorbells(wire.REGION_REGISTERS):
            eventfd.ring(self._opened().doorbell)

    def _memory_window(self, region: int, size: int) -> Window:
        def mapping(offset: int, count: int) -> Mapping:
            _check_access(offset, count, size)
            return self._opened().part(region)[1]

        return Window(
            size,
            lambda offset, count: mapping(offset, count).read(offset, count),
            lambda offset, data: mapping(offset, len(data)).write(offset, data),
            lambda: self._opened().part(region)[0],
        )


_BUFFERS = {wire.REGION_RECEIVE: (RECEIVE_HANDLE, True), wire.REGION_SEND: (SEND_HANDLE, False)}
_HANDLE_REGIONS = {wire.REGION_RECEIVE: wire.REGION_RECEIVE_GPADL, wire.REGION_SEND: wire.REGION_SEND_GPADL}


def _parts(sizes: Sizes) -> list[tuple[int, int]]:
    """The regions that are memory, and their sizes."""
    every = [
        (wire.REGION_RINGS, sizes.upstream + sizes.downstream),
        (wire.REGION_RECEIVE, sizes.receive),
        (wire.REGION_SEND, sizes.send),
    ]
    return [(region, size) for region, size in every if size]


def _registers(identity: Identity, sizes: Sizes) -> bytearray:
    """What the registers say, apart from STATUS."""
    image = bytearray(wire.REGISTERS_SIZE)
    wire.OpenedInfo(
        magic=wire.MAGIC,
        layout=wire.LAYOUT,
        channels=1,
        max_channels=1,
        class_guid=identity.class_guid,
        instance_guid=identity.instance_guid,
    ).pack_into(image)
    wire.OpenedRings(region=wire.REGION_RINGS, upstream=sizes.upstream // PAGE, downstream=sizes.downstream // PAGE).pack_into(
        image, wire.CHANNELS_AT
    )
    return image


def _handle_window(handle: int) -> Window:
    value = handle.to_bytes(wire.GPADL_SIZE, "little")

    def read(offset: int, size: int) -> bytes:
        _check_access(offset, size, wire.GPADL_SIZE)
        return value[offset : offset + size]

    def write(offset: int, data: bytes) -> None:
        raise UsageError("a GPADL handle cannot be written")

    return Window(wire.GPADL_SIZE, read, write)


def _check_access(offset: int, size: int, limit: int) -> None:
    if size <= 0 or offset < 0 or offset + size > limit:
        raise UsageError(f"access of {size} bytes at {offset:#x}: there are {limit:#x}")
