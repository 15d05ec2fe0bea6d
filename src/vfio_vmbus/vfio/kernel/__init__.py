"""PCI devices that the kernel's vfio-pci has, as `vfio.device.Device`. A library by itself: nothing of VMBus is in it.

    device          KernelDevice: open a device by its address
    regions, irqs   its parts
    space           an IO address space: what is mapped; container (type1) and iommufd implement it
    noiommu         the same without any IOMMU, for whom that is allowed explicitly
    group           an IOMMU group's node
    ioctl           the one place that calls the kernel, and what its refusals mean
    nodes           where in /sys and /dev a device is found

docs/kernel-vfio.md shows how to use it, by an example.
"""

from .container import Container
from .device import KernelDevice
from .iommufd import Ioas
from .space import AddressSpace

__all__ = ["AddressSpace", "Container", "Ioas", "KernelDevice"]
