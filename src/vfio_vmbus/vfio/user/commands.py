"""A vfio-user server's commands: a request and its descriptors in, a reply's payload and descriptors out.

Each raises ProtocolError, UsageError, DmaError (EINVAL), or RefusedError with another errno, and has then changed nothing, except that
the first writes of a REGION_WRITE_MULTI stay done. Which errno is the kernel's choice where it has the same command (drivers/vfio of
Linux 6.12).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...errors import ProtocolError, RefusedError
from ...wire import vfio
from ...wire import vfio_user as wire
from ...wire.table import Side
from ...wire.vfio_user_version import Capabilities
from .device import ServedDevice

Reply: TypeAlias = tuple[bytes, tuple[int, ...]]
DONE: Reply = (b"", ())

_LAST_ADDRESS = (1 << 64) - 1
_MAP_HINTS = 1 << 2 | 1 << 3
"""Flags of DMA_MAP in libvfio-user since 2026: how the server may reach the file. They forbid nothing."""
_TAKES_FDS = (wire.DMA_MAP, wire.DMA_UNMAP, wire.DEVICE_SET_IRQS)
"""SPDK sends one with DMA_UNMAP, too."""


@dataclass(frozen=True)
class Request:
    """One command: its structure, the data behind it, the descriptors that came with it."""

    number: int
    value: Any
    data: bytes
    fds: Sequence[int]


class Commands:
    """The commands of one client of `device`, from behind VERSION on. own: what this server announced; peer: what the client can do."""

    def __init__(self, device: ServedDevice, own: Capabilities, peer: Capabilities) -> None:
        self.device = device
        self.own = own
        self.peer = peer
        self._sizes = [device.region_size(index) for index in range(device.regions)]
        self._max_data = own.max_data_xfer_size
        self._handlers: Mapping[int, Callable[[Request], Reply]] = {
            wire.DMA_MAP: self._dma_map,
            wire.DMA_UNMAP: self._dma_unmap,
            wire.DEVICE_GET_INFO: self._get_info,
            wire.DEVICE_GET_REGION_INFO: self._get_region_info,
            wire.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            wire.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            wire.DEVICE_SET_IRQS: self._set_irqs,
            wire.REGION_READ: self._region_read,
            wire.REGION_WRITE: self._region_write,
            wire.REGION_WRITE_MULTI: self._region_write_multi,
            wire.DEVICE_RESET: self._reset,
            wire.DEVICE_FEATURE: self._feature,
            wire.MIG_DATA_READ: self._migration,
            wire.MIG_DATA_WRITE: self._migration,
        }

    def run(self, number: int, payload: bytes, fds: Sequence[int]) -> Reply:
        """Carry a command out."""
        command = wire.COMMANDS.get(number)
        if command is None:
            raise RefusedError(f"unknown command {number}, limit {max(wire.COMMANDS)}", errno.ENOSYS)
        if command.sender is not Side.GUEST:
            raise ProtocolError(f"{command.name} from the client, only the server sends it")
        handler = self._handlers.get(number)
        if handler is None:
            raise ProtocolError(f"{command.name} comes first, and once")
        value, data = wire.parse_request(number, payload)
        if fds and number not in _TAKES_FDS:
            raise ProtocolError(f"{command.name}: {len(fds)} descriptors, limit 0")
        return handler(Request(number, value, data, fds))

    def _dma_map(self, request: Request) -> Reply:
        value: wire.DmaMap = request.value
        if len(request.fds) > 1:
            raise ProtocolError(f"DMA_MAP: {len(request.fds)} descriptors, limit 1")
        access = value.flags & (vfio.DMA_READ | vfio.DMA_WRITE)
        if not access or value.flags & ~(access | _MAP_HINTS):
            raise ProtocolError(f"DMA_MAP: flags {value.flags:#x}, need 0x1 to 0x3, perhaps with 0x4 or 0x8")
        _check_range("DMA_MAP", value.iova, value.size)
        _check_range("DMA_MAP: file", value.offset, value.size)
        fd = request.fds[0] if request.fds else None
        self.device.map(value.iova, value.size, access, fd, value.offset)
        return DONE

    def _dma_unmap(self, request: Request) -> Reply:
        value: wire.DmaUnmap = request.value
        if value.flags & ~wire.UNMAP_ALL or request.data:
            raise ProtocolError(
                f"DMA_UNMAP: flags {value.flags:#x} and {len(request.data)} bytes behind: no dirty pages are kept"
            )
        if value.flags & wire.UNMAP_ALL:
            if value.iova or value.size:
                raise ProtocolError(f"DMA_UNMAP: all, but iova is {value.iova:#x} and size {value.size:#x}, need 0")
            self.device.unmap_all()
        else:
            _check_range("DMA_UNMAP", value.iova, value.size)
            self.device.unmap(value.iova, value.size)
        return value.pack(), ()

    def _get_info(self, request: Request) -> Reply:
        flags = vfio.DEVICE_RESET | (vfio.DEVICE_PCI if self.device.pci else 0)
        return wire.DeviceInfo(flags=flags, region_count=self.device.regions, irq_count=self.device.irqs).pack(), ()

    def _get_region_info(self, request: Request) -> Reply:
        """A region that can be mapped says where (one descriptor, sparse areas). With an argsz that is too small for that, only what
        argsz is needed."""
        value: vfio.RegionInfo = request.value
        size = self._region_size(value.index)
        flags = vfio.REGION_READ | vfio.REGION_WRITE if size else 0
        shown = self.device.region_map(value.index)
        if shown is None:
            return vfio.RegionInfo(flags=flags, index=value.index, size=size).pack(), ()
        flags |= vfio.REGION_MMAP
        areas = tuple(vfio.SparseArea(offset=offset, size=length) for offset, length in shown.areas)
        sparse = vfio.SparseMmap(area_count=len(areas), areas=areas).pack()
        need = value.SIZE + len(sparse)
        if value.argsz < need:
            return vfio.RegionInfo(argsz=need, flags=flags, index=value.index, size=size, offset=shown.base).pack(), ()
        head = vfio.RegionInfo(
            argsz=need, flags=flags | vfio.REGION_CAPS, index=value.index, cap_offset=value.SIZE, size=size, offset=shown.base
        )
        return head.pack() + sparse, (shown.fd,)

    def _get_region_io_fds(self, request: Request) -> Reply:
        """With an argsz that is too small, only what argsz is needed, as DEVICE_GET_REGION_INFO does."""
        value: wire.RegionIoFds = request.value
        self._region_size(value.index)
        if value.flags or value.count:
            raise ProtocolError(f"DEVICE_GET_REGION_IO_FDS: flags {value.flags:#x} and count {value.count}, need 0")
        places = self.device.io_fds(value.index, self.peer.max_msg_fds)
        need = value.SIZE + len(places) * wire.SubRegion.SIZE
        head = wire.RegionIoFds(argsz=need, index=value.index, count=len(places)).pack()
        if value.argsz < need:
            return head, ()
        rows = (wire.SubRegion(offset=place.offset, size=place.size, fd_index=index) for index, place in enumerate(places))
        return head + b"".join(row.pack() for row in rows), tuple(place.fd for place in places)

    def _get_irq_info(self, request: Request) -> Reply:
        count = self._irq_count(request.value.index)
        flags = self.device.irq_flags(request.value.index) if count else 0
        return vfio.IrqInfo(flags=flags, index=request.value.index, count=count).pack(), ()

    def _set_irqs(self, request: Request) -> Reply:
        value: vfio.IrqSet = request.value
        kind, action = value.flags & vfio.SET_DATA_KINDS, value.flags & vfio.SET_ACTIONS
        if kind.bit_count() != 1 or action.bit_count() != 1 or kind | action != value.flags:
            raise ProtocolError(f"DEVICE_SET_IRQS: flags {value.flags:#x}, need one of 0x1, 0x2, 0x4 and one of 0x8, 0x10, 0x20")
        vectors = self._irq_count(value.index)
        if value.start >= vectors or value.start + value.count > vectors:
            raise ProtocolError(
                f"DEVICE_SET_IRQS: {value.count} vectors from {value.start} on, limit {vectors} of index {value.index}"
            )
        if request.fds and (kind != vfio.SET_DATA_EVENTFD or len(request.fds) != value.count):
            raise ProtocolError(
                f"DEVICE_SET_IRQS: {len(request.fds)} descriptors for {value.count} vectors, flags {value.flags:#x}"
            )
        if value.count == 0 and (kind != vfio.SET_DATA_NONE or value.start):
            raise ProtocolError(f"DEVICE_SET_IRQS: no vectors from {value.start} on, flags {value.flags:#x}")
        if action == vfio.SET_ACTION_TRIGGER:
            self._trigger(value, kind, vectors, request)
        else:
            self._mask(value, kind, action == vfio.SET_ACTION_MASK, request.data)
        return DONE

    def _mask(self, value: vfio.IrqSet, kind: int, masked: bool, chosen: bytes) -> None:
        if kind == vfio.SET_DATA_EVENTFD or not self.device.irq_flags(value.index) & vfio.IRQ_MASKABLE:
            raise RefusedError(f"DEVICE_SET_IRQS: vectors of index {value.index} cannot be masked like this", errno.ENOTTY)
        if value.count == 0:
            raise ProtocolError("DEVICE_SET_IRQS: no vectors to be masked")
        for place in range(value.count):
            if kind == vfio.SET_DATA_NONE or chosen[place]:
                self.device.mask(value.index, value.start + place, masked)

    def _trigger(self, value: vfio.IrqSet, kind: int, vectors: int, request: Request) -> None:
        if kind == vfio.SET_DATA_EVENTFD:  # no descriptors: nobody is signalled any more
            self.device.lead_to(value.index, value.start, list(request.fds) or [None] * value.count)
        elif value.count == 0:
            self.device.lead_to(value.index, 0, [None] * vectors)
        else:
            for place in range(value.count):
                if kind == vfio.SET_DATA_NONE or request.data[place]:
                    self.device.fire(value.index, value.start + place)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ: the data."""
        self._check_access("REGION_READ", region, offset, count)
        return self.device.read(region, offset, count)

    def write(self, region: int, offset: int, data: bytes) -> None:
        """REGION_WRITE."""
        self._check_access("REGION_WRITE", region, offset, len(data))
        self.device.write(region, offset, data)

    def _region_read(self, request: Request) -> Reply:
        value: wire.RegionAccess = request.value
        return value.pack() + self.read(value.region, value.offset, value.count), ()

    def _region_write(self, request: Request) -> Reply:
        value: wire.RegionAccess = request.value
        self.write(value.region, value.offset, request.data)
        return value.pack(), ()

    def _region_write_multi(self, request: Request) -> Reply:
        writes: tuple[wire.WriteEntry, ...] = request.value.writes
        for entry in writes:
            if entry.count > wire.MAX_WRITE_MULTI_BYTES:
                raise ProtocolError(f"REGION_WRITE_MULTI: a write of {entry.count} bytes, limit {wire.MAX_WRITE_MULTI_BYTES}")
            self._check_access("REGION_WRITE_MULTI", entry.region, entry.offset, entry.count)
        for entry in writes:
            self.device.write(entry.region, entry.offset, entry.data[: entry.count])
        return wire.WriteMultiReply(count=len(writes)).pack(), ()

    def _reset(self, request: Request) -> Reply:
        self.device.reset()
        return DONE

    def _feature(self, request: Request) -> Reply:
        flags = request.value.flags
        both = vfio.FEATURE_GET | vfio.FEATURE_SET
        if flags & ~(vfio.FEATURE_INDEX | both | vfio.FEATURE_PROBE) or not flags & (both | vfio.FEATURE_PROBE):
            raise ProtocolError(f"DEVICE_FEATURE: flags {flags:#x}, need 0x10000, 0x20000 or 0x40000 with an index")
        if flags & both == both and not flags & vfio.FEATURE_PROBE:
            raise ProtocolError(f"DEVICE_FEATURE: flags {flags:#x} get and set at once")
        raise RefusedError(f"DEVICE_FEATURE: there is no feature {flags & vfio.FEATURE_INDEX}", errno.ENOTTY)

    def _migration(self, request: Request) -> Reply:
        raise RefusedError("this device does not migrate", errno.EOPNOTSUPP)

    def _region_size(self, index: int) -> int:
        if index >= len(self._sizes):
            raise ProtocolError(f"region {index}, limit {len(self._sizes) - 1}")
        return self._sizes[index]

    def _irq_count(self, index: int) -> int:
        if index >= self.device.irqs:
            raise ProtocolError(f"interrupt index {index}, limit {self.device.irqs - 1}")
        return self.device.irq_count(index)

    def _check_access(self, name: str, region: int, offset: int, count: int) -> None:
        size = self._region_size(region)
        if not 0 < count <= self._max_data:
            raise ProtocolError(f"{name}: {count} bytes, need 1 to {self._max_data}")
        if offset + count > size:
            raise ProtocolError(f"{name}: {count} bytes at {offset:#x} of region {region}, which has {size:#x}")


def _check_range(name: str, start: int, size: int) -> None:
    if size == 0 or start + size - 1 > _LAST_ADDRESS:
        raise ProtocolError(f"{name}: {size:#x} bytes at {start:#x}, need at least one, and none beyond {_LAST_ADDRESS:#x}")
