"""`Container`: an IO address space by /dev/vfio/vfio and its type 1 (version 2) IOMMU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

from ...errors import ProtocolError, UnavailableError, UsageError
from ...memory.mapping import Piece
from ...wire import vfio_ioctl as uapi
from ...wire.layout import Struct
from ...wire.vfio import CapabilityHeader
from .group import Group
from .ioctl import call
from .nodes import Roots, open_node
from .space import AddressSpace


class Container(AddressSpace):
    """Groups join as their devices are opened, and stay until it is closed. What they may reach is mapped for all of them."""

    def __init__(self, roots: Roots = Roots()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        self._roots = roots
        self._groups: dict[int, Group] = {}
        with ExitStack() as stack:
            self._fd = open_node(roots.dev / "vfio/vfio", "VFIO", "load it: modprobe vfio-pci")
            stack.callback(os.close, self._fd)
            version = call(self._fd, uapi.GET_API_VERSION)
            if version != uapi.API_VERSION:
                raise UnavailableError(f"VFIO's API version is {version}, need {uapi.API_VERSION}")
            if not call(self._fd, uapi.CHECK_EXTENSION, uapi.TYPE1V2_IOMMU):
                raise UnavailableError("VFIO has no type 1 IOMMU of version 2: modprobe vfio_iommu_type1")
            self._resources.push(stack.pop_all())

    def device(self, address: str) -> int:
        with self._lock:
            self._check_open()
            number = self._roots.protected_group(address)
            if number not in self._groups:
                self._join(number)
            return self._groups[number].device(address)

    @property
    def group_fds(self) -> tuple[int, ...]:
        """The groups' descriptors, which prove who owns them."""
        return tuple(group.fd for group in self._groups.values())

    @property
    def groups(self) -> frozenset[int]:
        """The numbers of the groups that have joined."""
        return frozenset(self._groups)

    @property
    def available(self) -> int | None:
        """How many more maps there may be; None where the kernel does not say."""
        return self._describe()[2]

    def _join(self, number: int) -> None:
        with ExitStack() as stack:
            group = Group(number, self._roots)
            stack.callback(group.close)
            call(group.fd, uapi.GROUP_SET_CONTAINER, bytearray(self._fd.to_bytes(4, "little")), what=group.name)
            if not self._groups:
                call(self._fd, uapi.SET_IOMMU, uapi.TYPE1V2_IOMMU, what=group.name)
            self.page_size, self.iova_ranges, _ = self._describe()
            self._groups[number] = group
            self._resources.push(stack.pop_all())

    def _describe(self) -> tuple[int, tuple[tuple[int, int], ...], int | None]:
        """Page size, IOVA ranges and maps left, of what the kernel says."""
        answer = ask(self._fd, uapi.IOMMU_GET_INFO, uapi.Type1Info(), "VFIO_IOMMU_GET_INFO")
        info = uapi.Type1Info.unpack(answer)
        sizes = info.page_sizes if info.flags & uapi.TYPE1_PAGE_SIZES else 0
        ranges: tuple[tuple[int, int], ...] = ()
        available = None
        for header, at in capabilities(answer, info.cap_offset if info.flags & uapi.TYPE1_CAPS else 0):
            if header.id == uapi.CAPABILITY_IOVA_RANGES:
                ranges = tuple((part.start, part.last + 1) for part in uapi.IovaRanges.unpack(answer, at).ranges)
            elif header.id == uapi.CAPABILITY_DMA_AVAILABLE:
                available = uapi.DmaAvailable.unpack(answer, at).available
        return max(sizes & -sizes, 4096), ranges, available

    def _map(self, iova: int, piece: Piece, access: int, stack: ExitStack) -> None:
        if not self._groups:
            raise UsageError("no device is in this container yet: open one first")
        vaddr = self._in_memory(piece, stack)
        wanted = uapi.Type1Map(flags=access, vaddr=vaddr, iova=iova, size=piece.size)
        what = f"{piece.size} bytes at IOVA {iova:#x}"
        call(self._fd, uapi.IOMMU_MAP_DMA, bytearray(wanted.pack()), name="VFIO_IOMMU_MAP_DMA", what=what)

    def _unmap(self, iova: int, size: int) -> None:
        wanted = bytearray(uapi.Type1Unmap(iova=iova, size=size).pack())
        what = f"{size} bytes at IOVA {iova:#x}"
        call(self._fd, uapi.IOMMU_UNMAP_DMA, wanted, name="VFIO_IOMMU_UNMAP_DMA", what=what)


def ask(fd: int, request: int, question: Struct, name: str, what: str = "") -> bytes:
    """The answer to an ioctl whose structure begins with argsz, and what is behind it; asked again with more room where that is needed."""
    first = question.pack()
    answer = bytearray(first)
    call(fd, request, answer, name=name, what=what)
    need = int.from_bytes(answer[:4], "little")
    if need > len(answer):
        answer = bytearray(need.to_bytes(4, "little") + first[4:]).ljust(need, b"\0")
        call(fd, request, answer, name=name, what=what)
    return bytes(answer)


def capabilities(answer: bytes, at: int) -> Iterator[tuple[CapabilityHeader, int]]:
    """The chain of capabilities behind a structure: each header and where it is. Raises ProtocolError for one without an end."""
    seen = set()
    while at:
        if at in seen:
            raise ProtocolError(f"the capability at {at:#x} comes after itself")
        seen.add(at)
        header = CapabilityHeader.unpack(answer, at)
        yield header, at
        at = header.next
