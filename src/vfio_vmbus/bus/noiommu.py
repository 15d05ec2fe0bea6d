"""A PCI device through the kernel's VFIO without any IOMMU, for those who ask for that."""

from __future__ import annotations

from functools import partial

from ..vfio.kernel import KernelDevice
from .machine import Machine
from .policy import allow_unsafe


def open_without_iommu(address: str, *, unsafe: bool, machine: Machine = Machine()) -> KernelDevice:  # noqa: B008  (frozen)
    """The device at `address`, which vfio-pci has in a group without an IOMMU; `info.isolation` is "".

    unsafe: was policy.SWITCH given? Raises UnsafeError as `allow_unsafe`, before anything is opened; otherwise as KernelDevice, also for
    a device that an IOMMU would keep in bounds. Its `dma` is that of `vfio.physical`.
    """
    return KernelDevice(address, without_iommu=partial(_allow, unsafe, machine), roots=machine)


def _allow(unsafe: bool, machine: Machine, what: str) -> None:
    allow_unsafe(what, enabled=unsafe, machine=machine)
