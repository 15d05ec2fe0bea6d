"""`Ioas`: an IO address space by /dev/iommu, for devices that the kernel shows as nodes of their own (Linux 6.6 and later)."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack

from ...errors import DmaError, UnavailableError, VfioVmbusError
from ...memory.mapping import Piece
from ...wire import iommufd as wire
from ...wire import vfio_ioctl as uapi
from ...wire.vfio import DMA_READ, DMA_WRITE
from .ioctl import call, errno_of
from .nodes import Roots, open_node
from .space import AddressSpace

_FIRST_RANGES = 16


class Ioas(AddressSpace):
    """Devices are attached as they are opened. Memory is mapped by its descriptor where the kernel can, else by its address here."""

    def __init__(self, roots: Roots = Roots()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        self._roots = roots
        self._by_file = True
        with ExitStack() as stack:
            self._fd = open_node(roots.dev / "iommu", "iommufd", "this kernel has none, or: modprobe iommufd")
            stack.callback(os.close, self._fd)
            made = bytearray(wire.IoasAlloc().pack())
            call(self._fd, wire.IOAS_ALLOC, made)
            self.id = wire.IoasAlloc.unpack(made).out_ioas_id
            stack.callback(self._destroy)
            self._resources.push(stack.pop_all())

    def device(self, address: str) -> int:
        group = self._roots.protected_group(address)
        node = self._roots.cdev(address)
        if node is None:
            raise UnavailableError(f"{address} has no node in /dev/vfio/devices: bind it, or take its group (iommufd=False)")
        with self._lock, ExitStack() as stack:
            self._check_open()
            fd = open_node(node, address, "bind it (vfio-vmbus bind ADDRESS)")
            stack.callback(os.close, fd)
            bind = uapi.BindIommufd(argsz=uapi.BIND_IOMMUFD_SIZE_6_12, iommufd=self._fd).pack()
            try:
                call(fd, uapi.DEVICE_BIND_IOMMUFD, bytearray(bind), what=address)
            except UnavailableError as error:
                if errno_of(error) == errno.EPERM:
                    raise UnavailableError(f"not viable: {self._roots.not_viable(group)}") from error
                raise
            attach = uapi.AttachIommufd(argsz=uapi.ATTACH_IOMMUFD_SIZE_6_12, pt_id=self.id).pack()
            call(fd, uapi.DEVICE_ATTACH_IOMMUFD_PT, bytearray(attach), what=address)
            self.page_size, self.iova_ranges = self._describe()
            stack.pop_all()
            return fd

    def _describe(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Page size and IOVA ranges. The kernel writes the ranges through a pointer, and says how many there would be."""
        room = _FIRST_RANGES
        while True:
            buffer = ctypes.create_string_buffer(room * wire.IommuIovaRange.SIZE)
            question = wire.IoasIovaRanges(ioas_id=self.id, range_count=room, allowed_iovas=ctypes.addressof(buffer))
            answer = bytearray(question.pack())
            try:
                call(self._fd, wire.IOAS_IOVA_RANGES, answer)
            except VfioVmbusError as error:
                found = wire.IoasIovaRanges.unpack(answer)
                if errno_of(error) != errno.EMSGSIZE or found.range_count <= room:
                    raise
                room = found.range_count
                continue
            found = wire.IoasIovaRanges.unpack(answer)
            size = wire.IommuIovaRange.SIZE
            parts = [wire.IommuIovaRange.unpack(buffer.raw, size * index) for index in range(min(found.range_count, room))]
            return max(found.out_alignment, 4096), tuple((part.start, part.last + 1) for part in parts)

    def _map(self, iova: int, piece: Piece, access: int, stack: ExitStack) -> None:
        flags = wire.MAP_FIXED_IOVA
        flags |= wire.MAP_READABLE if access & DMA_READ else 0
        flags |= wire.MAP_WRITEABLE if access & DMA_WRITE else 0
        what = f"{piece.size} bytes at IOVA {iova:#x}"
        if self._by_file:
            by_file = wire.IoasMapFile(
                flags=flags, ioas_id=self.id, fd=piece.fd, start=piece.offset, length=piece.size, iova=iova
            )
            try:
                call(self._fd, wire.IOAS_MAP_FILE, bytearray(by_file.pack()), what=what)
                return
            except DmaError as error:
                if errno_of(error) != errno.ENOTTY:
                    raise
                self._by_file = False
        vaddr = self._in_memory(piece, stack)
        by_address = wire.IoasMap(flags=flags, ioas_id=self.id, user_va=vaddr, length=piece.size, iova=iova)
        call(self._fd, wire.IOAS_MAP, bytearray(by_address.pack()), what=what)

    def _unmap(self, iova: int, size: int) -> None:
        wanted = wire.IoasUnmap(ioas_id=self.id, iova=iova, length=size)
        call(self._fd, wire.IOAS_UNMAP, bytearray(wanted.pack()), what=f"{size} bytes at IOVA {iova:#x}")

    def _destroy(self) -> None:
        call(self._fd, wire.DESTROY, bytearray(wire.Destroy(id=self.id).pack()))
