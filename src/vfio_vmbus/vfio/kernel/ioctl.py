"""ioctl(2) on VFIO's descriptors: the one place that calls it, and what the kernel's refusals mean.

The whole error names the ioctl, what it was for and the errno, and, where that is known, what to do. Source of the meanings: drivers/vfio
and drivers/iommu/iommufd of Linux 6.12.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from typing import Final

from ...errors import ClosedError, DmaError, LocalError, RescindedError, UnavailableError, UsageError, VfioVmbusError
from ...wire import iommufd
from ...wire import vfio_ioctl as uapi

_NAMES: Final = {
    **{
        getattr(uapi, name): f"VFIO_{name}"
        for name in (
            *(
                "GET_API_VERSION",
                "CHECK_EXTENSION",
                "SET_IOMMU",
                "GROUP_GET_STATUS",
                "GROUP_SET_CONTAINER",
                "GROUP_UNSET_CONTAINER",
            ),
            *("GROUP_GET_DEVICE_FD", "DEVICE_GET_INFO", "DEVICE_GET_REGION_INFO", "DEVICE_GET_IRQ_INFO", "DEVICE_SET_IRQS"),
            *("DEVICE_RESET", "DEVICE_IOEVENTFD", "DEVICE_BIND_IOMMUFD", "DEVICE_ATTACH_IOMMUFD_PT", "DEVICE_DETACH_IOMMUFD_PT"),
        )
    },
    **{
        getattr(iommufd, name): f"IOMMU_{name}"
        for name in ("DESTROY", "IOAS_ALLOC", "IOAS_IOVA_RANGES", "IOAS_MAP", "IOAS_MAP_FILE", "IOAS_UNMAP", "OPTION")
    },
}
"""Those whose number means one thing. The others have their name from whoever calls."""

_KINDS: Final[dict[int, type[LocalError]]] = {
    errno.EINVAL: UsageError,
    errno.ERANGE: UsageError,
    errno.EBADF: ClosedError,
    errno.EPERM: UnavailableError,
    errno.EACCES: UnavailableError,
    errno.EBUSY: UnavailableError,
    errno.ENOTTY: UnavailableError,
    errno.EOPNOTSUPP: UnavailableError,
    errno.ENODEV: UnavailableError,
    errno.ENOENT: UnavailableError,
    errno.ENOMEM: UnavailableError,
    errno.ENOSPC: UnavailableError,
}


_IN_USE: Final = ("VFIO_GROUP_SET_CONTAINER", "VFIO_DEVICE_BIND_IOMMUFD")
"""EINVAL of these is no mistake of the caller's: somebody has the device."""


def _memlock() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    return (
        f"memory for devices is locked, and RLIMIT_MEMLOCK is {limit}: raise it (ulimit -l, LimitMEMLOCK=) or grant CAP_IPC_LOCK"
    )


_SHARING: Final = "another process, or another KernelDevice of this one, has it; devices of one group share an AddressSpace"

_ADVICE: Final = {
    ("VFIO_SET_IOMMU", errno.EPERM): "no interrupt remapping: the IOMMU cannot keep a device from sending any interrupt; "
    "the kernel's switch for that is vfio_iommu_type1.allow_unsafe_interrupts=1",
    ("VFIO_SET_IOMMU", errno.ENODEV): "load vfio_iommu_type1: modprobe vfio_iommu_type1",
    ("VFIO_GROUP_SET_CONTAINER", errno.EBUSY): _SHARING,
    ("VFIO_GROUP_SET_CONTAINER", errno.EPERM): "a group without an IOMMU is for CAP_SYS_RAWIO only",
    ("VFIO_GROUP_SET_CONTAINER", errno.EINVAL): "the group is in a container already, or its IOMMU does not suit the container's",
    ("VFIO_GROUP_GET_DEVICE_FD", errno.ENODEV): "no driver of VFIO has it: bind it (vfio-vmbus bind ADDRESS)",
    ("VFIO_GROUP_GET_DEVICE_FD", errno.EBUSY): _SHARING,
    ("VFIO_GROUP_GET_DEVICE_FD", errno.EPERM): "the group is not viable",
    ("VFIO_GROUP_GET_DEVICE_FD", errno.EAGAIN): "the device is being reset by someone else: try again",
    ("VFIO_IOMMU_MAP_DMA", errno.ENOSPC): "there are as many maps as the kernel lets a container have "
    "(vfio_iommu_type1.dma_entry_limit): map larger pieces",
    ("VFIO_DEVICE_RESET", errno.EAGAIN): "its slot is being reset by someone else: try again",
    ("VFIO_DEVICE_IOEVENTFD", errno.ENOSPC): "a device may have 1000 doorbells",
    ("VFIO_DEVICE_BIND_IOMMUFD", errno.EINVAL): "the device is open already, or its group is",
    ("VFIO_DEVICE_PCI_HOT_RESET", errno.EINVAL): "devices of other owners share its slot or bus",
    ("VFIO_DEVICE_PCI_HOT_RESET", errno.EPERM): "devices of other owners share its slot or bus",
}


def call(fd: int, request: int, argument: bytearray | int = 0, *, name: str = "", what: str = "") -> int:
    """An ioctl's result; what the kernel writes into `argument` is in it afterwards.

    name: of the ioctl where its number has two meanings. what: it is about, for the error. Raises LocalError by errno, see `refusal`.
    """
    try:
        if isinstance(argument, int):
            return fcntl.ioctl(fd, request, argument)
        return fcntl.ioctl(fd, request, argument, True)
    except OSError as error:
        raise refusal(name or _NAMES[request], error.errno or errno.EIO, what) from error
    except ValueError as error:  # a descriptor that is none any more
        raise refusal(name or _NAMES[request], errno.EBADF, what) from error


def refusal(name: str, code: int, what: str = "") -> VfioVmbusError:
    """The error for `code`. Its attribute `errno` is that.

    UsageError: EINVAL; UnavailableError: the machine, or its owner, forbids it; DmaError: maps; RescindedError: the device has gone.
    """
    advice = _ADVICE.get((name, code), "")
    kind: type[VfioVmbusError] = _KINDS.get(code, LocalError)
    if name in ("VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_UNMAP"):
        kind = DmaError
        if code == errno.ENOMEM:
            advice = _memlock()
    elif code == errno.EINVAL and name in _IN_USE:
        kind = UnavailableError
    elif code == errno.ENODEV and not advice:
        kind, advice = RescindedError, "the device is gone, or is being taken away"
    elif code == errno.ENOTTY and not advice:
        advice = "this kernel, or this device, does not have it"
    text = f"{name}{f' for {what}' if what else ''}: {os.strerror(code)} ({errno.errorcode.get(code, code)})"
    made = kind(f"{text}; {advice}" if advice else text)
    made.errno = code  # type: ignore[attr-defined]
    return made


def errno_of(error: BaseException) -> int:
    """The errno behind an error of `call`; 0 for others."""
    code: int = getattr(error, "errno", 0)
    return code
