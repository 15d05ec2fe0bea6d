"""`NoIommu`: the kernel's own way to a device that no IOMMU keeps in bounds. Unsafe, and never taken unless it is asked for.

The kernel wants CAP_SYS_RAWIO for it, warns in its log and is tainted from then on (drivers/vfio/group.c, container.c of Linux 6.12).
Nothing can be mapped: the device's addresses are the machine's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from ...errors import UnavailableError
from ...memory.mapping import Piece
from ...wire import vfio_ioctl as uapi
from ..physical import hold_at
from .group import Group
from .ioctl import call
from .nodes import Roots, open_node
from .space import AddressSpace

Allow = Callable[[str], object]
"""Is told what is about to be done; raises UnsafeError if that is not allowed."""


class NoIommu(AddressSpace):
    """One device's container and group, /dev/vfio/noiommu-NUMBER. allow: is asked first of all.

    A map keeps memory where it is, and is refused unless the IOVA is its physical address (`iommu.physical.PhysicalBuffer`).
    A buffer of huge pages is not taken, and needs no map: it stays where it is by itself.
    """

    def __init__(self, address: str, allow: Allow, roots: Roots = Roots()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        number = roots.unprotected_group(address)
        allow(f"VFIO without an IOMMU of {address}")
        with ExitStack() as stack:
            fd = open_node(roots.dev / "vfio/vfio", "VFIO", "load it: modprobe vfio-pci")
            stack.callback(os.close, fd)
            version = call(fd, uapi.GET_API_VERSION)
            if version != uapi.API_VERSION:
                raise UnavailableError(f"VFIO's API version is {version}, need {uapi.API_VERSION}")
            if not call(fd, uapi.CHECK_EXTENSION, uapi.NOIOMMU_IOMMU):
                raise UnavailableError(
                    "the kernel does not allow VFIO without an IOMMU: modprobe vfio enable_unsafe_noiommu_mode=1"
                )
            self._group = Group(number, roots, "noiommu-")
            stack.callback(self._group.close)
            call(self._group.fd, uapi.GROUP_SET_CONTAINER, bytearray(fd.to_bytes(4, "little")), what=self._group.name)
            call(fd, uapi.SET_IOMMU, uapi.NOIOMMU_IOMMU, what=self._group.name)
            self._resources.push(stack.pop_all())

    def device(self, address: str) -> int:
        with self._lock:
            self._check_open()
            return self._group.device(address)

    def _map(self, iova: int, piece: Piece, access: int, stack: ExitStack) -> None:
        hold_at(iova, piece, stack)

    def _unmap(self, iova: int, size: int) -> None:
        """Nothing to tell anybody: the device reaches it all the same."""
