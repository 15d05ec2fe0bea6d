"""An IOMMU group: the devices that no IOMMU can tell apart, behind one node that one process may open once."""

from __future__ import annotations

import os
from contextlib import ExitStack

from ...errors import UnavailableError
from ...wire import vfio_ioctl as uapi
from .ioctl import call
from .nodes import Roots, open_node


class Group:
    """/dev/vfio/NUMBER, viable; of a group without an IOMMU, which `prefix` stands for, /dev/vfio/noiommu-NUMBER.

    Raises UnavailableError: not there, in use, or not viable (and why).
    """

    def __init__(self, number: int, roots: Roots, prefix: str = "") -> None:
        self.number = number
        self.name = f"IOMMU group {number}"
        with ExitStack() as stack:
            advice = "no device of it has vfio-pci: bind one (vfio-vmbus bind ADDRESS)"
            self.fd = open_node(roots.dev / f"vfio/{prefix}{number}", self.name, advice)
            stack.callback(os.close, self.fd)
            status = bytearray(uapi.GroupStatus().pack())
            call(self.fd, uapi.GROUP_GET_STATUS, status, what=self.name)
            if not uapi.GroupStatus.unpack(status).flags & uapi.GROUP_VIABLE:
                raise UnavailableError(f"not viable: {roots.not_viable(number)}")
            self._resources = stack.pop_all()

    def device(self, address: str) -> int:
        """A new descriptor of one of its devices. The group must be in a container."""
        return call(self.fd, uapi.GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"), what=address)

    def close(self) -> None:
        self._resources.close()
