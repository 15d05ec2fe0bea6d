"""`KernelDevice`: a PCI device that vfio-pci has.

The order in which a device is opened and closed is that of Documentation/driver-api/vfio.rst of Linux 6.12; what the driver finds in
drivers/vfio/pci.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from threading import Lock

from ...errors import ClosedError, UnavailableError, UsageError, VfioVmbusError
from ...wire import pci
from ...wire import vfio as wire
from ...wire import vfio_ioctl as uapi
from ..device import CONFIG_REGION, Device, DeviceInfo, Dma, Irq, Region
from .container import Container
from .ioctl import call, errno_of
from .iommufd import Ioas
from .irqs import InUse, KernelIrq, open_irq
from .nodes import Roots, full_address
from .noiommu import Allow, NoIommu
from .regions import KernelRegion, open_region
from .space import AddressSpace

_COMMAND = pci.ConfigHeader.OFFSETS["command"]
_DECODE = pci.COMMAND_IO | pci.COMMAND_MEMORY | pci.COMMAND_MASTER


@dataclass(frozen=True)
class Dependent:
    """A function that a hot reset resets as well. owned: by this AddressSpace's devices' group."""

    address: str
    owner: int
    owned: bool


class _Maps(Dma):
    """A device's way to its address space: as long as the device is open."""

    def __init__(self, space: AddressSpace, device: KernelDevice) -> None:
        self._space = space
        self._device = device
        self.iova_ranges = space.iova_ranges

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        self._device.fileno()
        self._space.map(iova, fd, offset, size, access)

    def unmap(self, iova: int, size: int) -> None:
        self._device.fileno()
        self._space.unmap(iova, size)


class KernelDevice(Device):
    """The PCI device at `address` ("0000:00:04.0"), which vfio-pci must have (`bus.binding`).

    iommufd: True for its own node and an iommufd, False for its IOMMU group, None for the former where the kernel makes such nodes.
    space: an AddressSpace that several devices share (devices of one group must); it stays open, and so does what is mapped in it.
    without_iommu: open a device that no IOMMU keeps in bounds (`noiommu`), and no other; it is told what is about to be done, before
    anything is touched, and raises UnsafeError if that is not allowed (`bus.noiommu`, which asks the one policy). Never a fallback.

    Any thread may use it; `close` it when none does, as numbers of descriptors are used again.

    Opened, it decodes memory and I/O and may be a bus master: what it reaches then is what is mapped. `close` takes that away, before
    anything is unmapped, and the kernel resets it if it can (`info.resettable`) and puts its configuration back.

    Raises UsageError for what is no address; UnavailableError, saying what to do, for a device that is not there, that vfio-pci does not
    have, that is in use, that this process may not open, whose group is not viable, or that no IOMMU keeps in bounds.
    """

    def __init__(
        self,
        address: str,
        *,
        iommufd: bool | None = None,
        space: AddressSpace | None = None,
        without_iommu: Allow | None = None,
        roots: Roots = Roots(),  # noqa: B008  (frozen)
    ) -> None:
        self.address = full_address(address)
        self._closing = Lock()
        self._fd = -1
        self._regions: dict[int, KernelRegion] = {}
        self._irqs: dict[int, KernelIrq] = {}
        group = _bound(self.address, roots, without_iommu is not None)
        with ExitStack() as stack:
            if without_iommu is not None:
                if space is not None or iommufd:
                    raise UsageError("without an IOMMU there is no iommufd, and no address space to share")
                space = stack.enter_context(NoIommu(self.address, without_iommu, roots))
            elif space is None:
                by_node = roots.cdev(self.address) is not None if iommufd is None else iommufd
                space = stack.enter_context(Ioas(roots) if by_node else Container(roots))
            elif iommufd is not None and iommufd != isinstance(space, Ioas):
                raise UsageError(f"iommufd={iommufd}, but space is a {type(space).__name__}")
            self.space = space
            self._fd = space.device(self.address)
            stack.callback(self._release)
            self.info = self._describe("" if without_iommu else f"IOMMU group {group}")
            self.dma = _Maps(space, self)
            in_use = InUse()
            found = [open_region(self._fd, index, self.fileno) for index in range(self.info.regions)]
            self._regions = {region.index: region for region in found if region}
            kinds = [open_irq(self._fd, index, self.fileno, in_use) for index in range(self.info.irqs)]
            self._irqs = {irq.index: irq for irq in kinds if irq}
            self._decode(_DECODE)
            self._resources = stack.pop_all()

    def fileno(self) -> int:
        """The device's descriptor. Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError(f"{self.address} is closed")
        return self._fd

    def region(self, index: int) -> Region:
        if index not in self._regions:
            raise UsageError(f"region {index}: this device has {', '.join(map(str, self._regions))}")
        return self._regions[index]

    def irq(self, index: int) -> Irq:
        return self.kernel_irq(index)

    def kernel_irq(self, index: int) -> KernelIrq:
        """As `irq`, with what the kernel's have besides."""
        if index not in self._irqs:
            raise UsageError(f"interrupt index {index}: this device has {', '.join(map(str, self._irqs))}")
        return self._irqs[index]

    def reset(self) -> None:
        """Reset the function. Maps, interrupts and the configuration space stay. Raises UnavailableError where it cannot be reset alone."""
        if not self.info.resettable:
            self.fileno()
            raise UnavailableError(f"{self.address} has no reset of its own: see hot_reset, which resets its slot or bus")
        call(self.fileno(), uapi.DEVICE_RESET, what=self.address)

    def set_bus_master(self, on: bool) -> None:
        """Let the device begin accesses to memory, or not, whatever its driver has mapped."""
        self._decode(_DECODE if on else _DECODE & ~pci.COMMAND_MASTER)

    def hot_reset_info(self) -> list[Dependent]:
        """All that a hot reset resets, this function included. Raises UnavailableError where there is none."""
        room = 1
        while True:
            question = uapi.HotResetInfo(argsz=uapi.HotResetInfo.SIZE + room * uapi.DependentDevice.SIZE).pack()
            answer = bytearray(question).ljust(uapi.HotResetInfo.SIZE + room * uapi.DependentDevice.SIZE, b"\0")
            name = "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"
            try:
                call(self.fileno(), uapi.DEVICE_GET_PCI_HOT_RESET_INFO, answer, name=name, what=self.address)
                break
            except VfioVmbusError as error:
                need = int.from_bytes(answer[8:12], "little")
                if errno_of(error) == errno.ENODEV:
                    raise UnavailableError(
                        f"{self.address} has no hot reset: neither its slot nor its bus can be reset"
                    ) from error
                if errno_of(error) != errno.ENOSPC or not room < need <= uapi.MAX_HOT_RESET_DEVICES:
                    raise
                room = need
        info = uapi.HotResetInfo.unpack(answer)
        return [self._dependent(each, info.flags) for each in info.devices]

    def hot_reset(self) -> None:
        """Reset the slot or bus. Everything on it must be this process's, in this device's `space`. Raises UnavailableError."""
        fds = self.space.group_fds if isinstance(self.space, Container) else ()
        wanted = uapi.HotReset(argsz=uapi.HotReset.SIZE + 4 * len(fds), count=len(fds), group_fds=fds)
        try:
            name = "VFIO_DEVICE_PCI_HOT_RESET"
            call(self.fileno(), uapi.DEVICE_PCI_HOT_RESET, bytearray(wanted.pack()), name=name, what=self.address)
        except VfioVmbusError as error:
            if errno_of(error) not in (errno.EINVAL, errno.EPERM, errno.ENODEV):
                raise
            others = ", ".join(each.address for each in self.hot_reset_info() if not each.owned)
            raise UnavailableError(f"{error}{f': {others}' if others else ''}") from error

    def close(self) -> None:
        with self._closing:
            if self._fd >= 0:
                self._resources.close()

    def _release(self) -> None:
        """Stop the device, and close it: from then on it reaches nothing."""
        fd = self._fd
        try:
            with suppress(VfioVmbusError):  # a device that is gone
                if CONFIG_REGION in self._regions:
                    self._decode(0)
            for region in self._regions.values():
                region.release()
            for irq in self._irqs.values():
                irq.forget()
        finally:
            self._fd = -1
            os.close(fd)

    def _describe(self, isolation: str) -> DeviceInfo:
        answer = bytearray(uapi.DeviceInfo().pack())
        call(self._fd, uapi.DEVICE_GET_INFO, answer, what=self.address)
        info = uapi.DeviceInfo.unpack(answer)
        if not info.flags & wire.DEVICE_PCI:
            raise UnavailableError(f"{self.address} is no PCI device to VFIO (flags {info.flags:#x})")
        resettable = bool(info.flags & wire.DEVICE_RESET)
        return DeviceInfo(self.address, info.region_count, info.irq_count, resettable, isolation)

    def _decode(self, bits: int) -> None:
        space = self.region(CONFIG_REGION)
        before = int.from_bytes(space.read(_COMMAND, 2), "little")
        space.write(_COMMAND, (before & ~_DECODE | bits).to_bytes(2, "little"))

    def _dependent(self, each: uapi.DependentDevice, flags: int) -> Dependent:
        address = f"{each.segment:04x}:{each.bus:02x}:{each.devfn >> 3:02x}.{each.devfn & 7}"
        if flags & uapi.HOT_RESET_DEV_ID:
            return Dependent(address, each.owner, each.owner != uapi.DEV_ID_NOT_OWNED)
        return Dependent(address, each.owner, isinstance(self.space, Container) and each.owner in self.space.groups)


def _bound(address: str, roots: Roots, without_iommu: bool) -> int:
    """The group of a device that a driver of VFIO has. Raises UnavailableError, also for one of the other kind of groups."""
    roots.device(address)
    group = roots.unprotected_group(address) if without_iommu else roots.protected_group(address)
    driver = roots.driver(address)
    if "vfio" not in (driver or ""):
        raise UnavailableError(f"{address} has driver {driver or 'none'}: bind it (vfio-vmbus bind {address})")
    return group
