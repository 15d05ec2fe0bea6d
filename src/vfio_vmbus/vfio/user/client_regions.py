"""What a vfio-user server says of its regions, checked: the capability chain behind a region's info, and the table of its descriptors."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...errors import DmaError, ProtocolError
from ...memory.mapping import PAGE
from ...memory.shared import require_sealed
from ...wire import vfio
from ...wire import vfio_user as wire
from ...wire.vfio import CapabilityHeader, RegionInfo
from .. import eventfd

log = logging.getLogger("vfio_vmbus.vfio")

MAX_ARGSZ: Final = 1 << 16
"""Bytes of an info that are asked for; 64 sparse areas need 1072."""
ASK_ARGSZ: Final = 1 << 12
MAX_IO_FDS: Final = 253
"""As many descriptors as Linux passes in one message."""
_LONG_ENTRY: Final = 48
"""libvfio-user has another descriptor number and offset (for memory that says what was written) before the last field of an entry."""
_IO_WIDTHS: Final = (0, 4)
"""Widths of an ioeventfd that a write of 32 bits rings; 0 is any."""


@dataclass(frozen=True)
class RegionView:
    """A region. areas: (offset, size) of what the server offers for mapping, whole pages, ascending; `base`: where the region begins in
    its file. kind: type and subtype of a region beyond those of PCI. msix_mappable: the part with the MSI-X table may be mapped, too."""

    index: int
    size: int
    flags: int
    base: int
    areas: tuple[tuple[int, int], ...] = ()
    kind: tuple[int, int] | None = None
    msix_mappable: bool = False


def needed_argsz(name: str, said: int, asked: int) -> int:
    """The argsz to ask with again, 0 if there was room. Raises ProtocolError beyond MAX_ARGSZ."""
    if said > MAX_ARGSZ:
        raise ProtocolError(f"{name}: argsz is {said} bytes, limit {MAX_ARGSZ}")
    return said if said > asked else 0


def parse_region(index: int, payload: bytes, fds: Sequence[int]) -> tuple[RegionView, int | None]:
    """The reply to DEVICE_GET_REGION_INFO, and a duplicate of the region's file if it may be mapped. Raises ProtocolError for what
    contradicts itself."""
    view = _parse_view(index, payload)
    return view, os.dup(fds[0]) if fds and view.areas and _safe(fds[0], view) else None


def _safe(fd: int, view: RegionView) -> bool:
    """Can a mapping of this file fault under whoever uses it? Only a sealed memfd cannot."""
    try:
        length = require_sealed(fd)
    except DmaError as error:
        log.info("region %d is not mapped: %s", view.index, error)
        return False
    return all(view.base + offset + size <= length for offset, size in view.areas)


def _parse_view(index: int, payload: bytes) -> RegionView:
    info = RegionInfo.unpack(payload)
    if info.index != index:
        raise ProtocolError(f"region info of region {info.index}, need {index}")
    areas: tuple[tuple[int, int], ...] | None = None
    kind: tuple[int, int] | None = None
    msix_mappable = False
    for at, header in _capabilities(info, payload):
        if header.id == vfio.CAPABILITY_SPARSE_MMAP:
            if areas is not None:
                raise ProtocolError(f"region {index}: two lists of sparse areas")
            areas = _checked_areas(info, tuple((area.offset, area.size) for area in vfio.SparseMmap.unpack(payload, at).areas))
        elif header.id == vfio.CAPABILITY_TYPE:
            said = vfio.RegionType.unpack(payload, at)
            kind = said.type, said.subtype
        elif header.id == vfio.CAPABILITY_MSIX_MAPPABLE:
            msix_mappable = True
    if areas is None:
        areas = ((0, info.size),)
    whole = tuple((offset, size // PAGE * PAGE) for offset, size in areas if (info.offset + offset) % PAGE == 0 and size >= PAGE)
    return RegionView(
        index,
        info.size,
        info.flags & (vfio.REGION_READ | vfio.REGION_WRITE),
        info.offset,
        whole if info.flags & vfio.REGION_MMAP else (),
        kind,
        msix_mappable,
    )


def _capabilities(info: RegionInfo, payload: bytes) -> list[tuple[int, CapabilityHeader]]:
    """Where each capability is, in the order of the chain. Raises ProtocolError for one that leaves the payload, or overlaps another."""
    found: list[tuple[int, CapabilityHeader]] = []
    at = info.cap_offset if info.flags & vfio.REGION_CAPS else 0
    while at:
        if at < RegionInfo.SIZE or at + CapabilityHeader.SIZE > len(payload):
            raise ProtocolError(f"region {info.index}: a capability at {at}, need {RegionInfo.SIZE} to {len(payload) - 8}")
        if any(abs(at - other) < CapabilityHeader.SIZE for other, _ in found):
            raise ProtocolError(f"region {info.index}: two capabilities at {at}: the chain has a loop")
        found.append((at, CapabilityHeader.unpack(payload, at)))
        at = found[-1][1].next
    return found


def _checked_areas(info: RegionInfo, areas: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    end = 0
    for offset, size in sorted(areas):
        if offset + size > info.size:
            raise ProtocolError(f"region {info.index}: an area of {size:#x} bytes at {offset:#x}, the region has {info.size:#x}")
        if offset < end:
            raise ProtocolError(f"region {info.index}: the area at {offset:#x} overlaps the one that ends at {end:#x}")
        end = offset + size
    return tuple(sorted(areas))


def _entry_size(head: wire.RegionIoFds, payload: bytes) -> int:
    """Bytes of an entry behind `head`: 40, or 48 from libvfio-user."""
    behind = len(payload) - head.SIZE
    for size in (wire.SubRegion.SIZE, _LONG_ENTRY):
        if behind == head.count * size:
            return size
    raise ProtocolError(
        f"{behind} bytes with {head.count} descriptors' entries, need {wire.SubRegion.SIZE} or {_LONG_ENTRY} each"
    )


def parse_io_fds(region: RegionView, payload: bytes, fds: Sequence[int]) -> dict[int, int]:
    """The reply to DEVICE_GET_REGION_IO_FDS: offset of a 32-bit register -> eventfd that stands for it, a duplicate. Raises ProtocolError
    for an entry beyond the region, and for one whose descriptor is not there or no eventfd."""
    head = wire.RegionIoFds.unpack(payload)
    if head.index != region.index:
        raise ProtocolError(f"descriptors of region {head.index}, need {region.index}")
    if head.count > MAX_IO_FDS:
        raise ProtocolError(f"region {region.index}: {head.count} places with descriptors, limit {MAX_IO_FDS}")
    found: dict[int, int] = {}
    for at in range(head.SIZE, len(payload), _entry_size(head, payload)):
        entry = wire.SubRegion.unpack(payload, at)
        if entry.offset + entry.size > region.size:
            raise ProtocolError(
                f"region {region.index}: a descriptor for {entry.size} bytes at {entry.offset:#x}, the region has {region.size:#x}"
            )
        if entry.fd_index >= len(fds):
            raise ProtocolError(f"region {region.index}: descriptor {entry.fd_index} of a message with {len(fds)}")
        if entry.type == wire.IO_FD_IOEVENTFD and entry.size in _IO_WIDTHS and entry.flags == 0 and entry.offset % 4 == 0:
            if not eventfd.is_eventfd(fds[entry.fd_index]):
                raise ProtocolError(
                    f"region {region.index}: descriptor {entry.fd_index}, for {entry.offset:#x}, is not an eventfd"
                )
            found.setdefault(entry.offset, entry.fd_index)
    kept = {number: os.dup(fds[number]) for number in set(found.values())}
    for fd in kept.values():
        os.set_blocking(fd, False)
    return {offset: kept[number] for offset, number in found.items()}
