"""`UioPciDevice`: a PCI device that uio_pci_generic or igb_uio has. No IOMMU keeps it in bounds.

With uio_pci_generic and without the switch it is driven by registers and INTx alone: this never lets it master the bus. Everything else is
unsafe, igb_uio always, as that turns bus mastering on when its node is opened.
Source: drivers/uio/uio_pci_generic.c of Linux 6.12, igb_uio.c of dpdk-kmods, Documentation/driver-api/uio-howto.rst.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock
from typing import Final

from ..errors import ClosedError, RescindedError, UnavailableError, UsageError, VfioVmbusError
from ..memory.mapping import Piece
from ..vfio.device import CONFIG_REGION, Device, DeviceInfo, Dma, Irq, Region
from ..vfio.kernel.nodes import full_address, open_node
from ..vfio.kernel.space import Maps
from ..vfio.physical import hold_at
from ..wire import pci
from ..wire.vfio import IRQ_INTX, IRQ_MSI, IRQ_MSIX
from .machine import Machine
from .policy import SWITCH, Isolation, allow_unsafe
from .uio_pci_irq import Attendant, UioIrq
from .uio_pci_regions import ConfigRegion, FileRegion, MemoryRegion, SysfsRegion

GENERIC: Final = "uio_pci_generic"
IGB: Final = "igb_uio"
_REGIONS, _IRQS, _BARS = 9, 5, 6
_IORESOURCE_IO, _IORESOURCE_MEMORY = 0x100, 0x200
"""Bits of a resource's flags (include/linux/ioport.h), the third column of the file `resource`."""
_DECODE: Final = pci.COMMAND_IO | pci.COMMAND_MEMORY


class UioPciDevice(Device):
    """The PCI device at `address`, which uio_pci_generic or igb_uio must have (`bus.binding`).

    unsafe: was policy.SWITCH given? Without, uio_pci_generic's device makes no DMA (`info.isolation` is "no-DMA"): `dma.map` raises
    UnavailableError, and so does a write to the configuration space that would turn bus mastering on. With it the device masters the bus,
    IOVAs are physical addresses, memory is to be a PhysicalBuffer's, and `info.isolation` is "". An `unmap` stops nobody: stop the
    device before. One interrupt; see UioIrq. Any thread may use it; close it when none does. Unplugged, or taken away by force, it raises
    RescindedError, and what was mapped of it is zeros; of a device without an interrupt nobody is told.

    Raises UsageError for what is no address; UnavailableError, saying what to do, for a device that is not there, that another driver has,
    that is in use or may not be opened; UnsafeError as `allow_unsafe`.
    """

    def __init__(self, address: str, *, unsafe: bool = False, machine: Machine = Machine()) -> None:  # noqa: B008  (frozen)
        self.address = full_address(address)
        self.unsafe = unsafe
        self._folder = machine.device(self.address)
        self._open = True
        self._gone = False
        self._closing = Lock()
        self._regions: dict[int, SysfsRegion] = {}
        driver = _driver(self.address, machine)
        if unsafe or driver == IGB:
            allow_unsafe(f"{driver} of {self.address}", enabled=unsafe, machine=machine)
        with ExitStack() as stack:
            stack.callback(os.close, _locked(self.address, self._folder))
            file = _open_node(self.address, self._folder, machine)
            stack.callback(os.close, file)
            self._maps = stack.enter_context(_PinnedMaps() if unsafe else _NoMaps(self.address))
            attendant = Attendant()
            stack.callback(attendant.close)
            self._config = ConfigRegion(self._folder / "config", self._check, attendant.bell, None if unsafe else self._no_master)
            stack.callback(self._config.release)
            self._find_bars(machine, attendant, stack)
            self._irq = self._find_irq(driver, file, attendant, machine)
            stack.callback(self._stop, attendant)
            self._regions[CONFIG_REGION] = self._config
            master = pci.COMMAND_MASTER
            self._config.change_command(
                0 if unsafe else master, _DECODE | pci.COMMAND_INTX_DISABLE * (driver == GENERIC) | (master if unsafe else 0)
            )
            self.dma = _DeviceDma(self._maps, self)
            resettable = (self._folder / "reset").exists()
            isolation = "" if unsafe else Isolation.NO_DMA.value
            self.info = DeviceInfo(self.address, _REGIONS, _IRQS, resettable, isolation)
            self._resources = stack.pop_all()

    def region(self, index: int) -> Region:
        if index not in self._regions:
            raise UsageError(f"region {index}: this device has {', '.join(map(str, sorted(self._regions)))}")
        return self._regions[index]

    def irq(self, index: int) -> Irq:
        return self.uio_irq(index)

    def uio_irq(self, index: int) -> UioIrq:
        """As `irq`, with what UIO's has besides."""
        if self._irq is None or index != self._irq.index:
            raise UsageError(f"interrupt index {index}: this device has {'none' if self._irq is None else self._irq.index}")
        return self._irq

    def reset(self) -> None:
        """Reset the function; the kernel puts its configuration back. Raises UnavailableError where it cannot be reset alone."""
        self._check()
        if not self.info.resettable:
            raise UnavailableError(f"{self.address} has no reset of its own")
        try:
            (self._folder / "reset").write_text("1")
        except OSError as error:
            raise UnavailableError(f"{self.address} cannot be reset: {error.strerror}") from error

    def close(self) -> None:
        with self._closing:
            if self._open:
                self._resources.close()

    def __repr__(self) -> str:
        return f"UioPciDevice({self.address!r}, unsafe={self.unsafe})"

    def check_open(self) -> None:
        """Raises ClosedError."""
        self._check()

    def _check(self) -> None:
        if not self._open:
            raise ClosedError(f"{self.address} is closed")
        if self._gone:
            raise RescindedError(f"{self.address} is gone: it was unplugged, or another driver has it; close it here")

    def _vanish(self) -> None:
        """The driver has lost the device: another may have its BARs now, or the kernel takes them away next."""
        self._gone = True
        for region in self._regions.values():
            region.vanish()

    def _stop(self, attendant: Attendant) -> None:
        """No interrupts, no DMA, and, if that works, a reset: what is pinned may then be let go."""
        attendant.close()
        with suppress(VfioVmbusError):  # a device that is gone
            if self._irq is not None:
                self._irq.release()
        with suppress(VfioVmbusError):
            self._config.change_command(pci.COMMAND_MASTER, 0)
        with suppress(OSError):
            if (self._folder / "reset").exists():
                (self._folder / "reset").write_text("1")
        self._open = False

    def _no_master(self) -> VfioVmbusError:
        return UnavailableError(
            f"{self.address} must not master the bus: no IOMMU keeps it in bounds, it would reach all memory: only with {SWITCH}"
        )

    def _find_bars(self, machine: Machine, attendant: Attendant, stack: ExitStack) -> None:
        for index, (start, size, flags) in enumerate(_bars(machine, self._folder)):
            path = self._folder / f"resource{index}"
            region: SysfsRegion
            if size and flags & _IORESOURCE_MEMORY:
                region = MemoryRegion(index, start, size, path, self._check, attendant.bell)
            elif size and flags & _IORESOURCE_IO:
                region = FileRegion(index, size, path, self._check, attendant.bell)
            else:
                continue
            stack.callback(region.release)
            self._regions[index] = region

    def _find_irq(self, driver: str, file: int, attendant: Attendant, machine: Machine) -> UioIrq | None:
        """igb_uio has taken MSI-X, MSI or INTx, as its parameter says, once its node is open."""
        index = _message_kind(machine, self._folder) if driver == IGB else IRQ_INTX
        if index == IRQ_INTX and not machine.number(self._folder / "irq"):
            return None
        return UioIrq(index, file, self._config, attendant, self._check, self._vanish, control=driver == IGB)


class _DeviceDma(Dma):
    """As long as the device is open."""

    def __init__(self, maps: Maps, device: UioPciDevice) -> None:
        self._maps = maps
        self._device = device
        self.physical = maps.physical

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        self._device.check_open()
        self._maps.map(iova, fd, offset, size, access)

    def unmap(self, iova: int, size: int) -> None:
        self._device.check_open()
        self._maps.unmap(iova, size)


class _PinnedMaps(Maps):
    """A map keeps memory where it is, and is refused unless the IOVA is its physical address. Reserved huge pages need none."""

    physical = True

    def _map(self, iova: int, piece: Piece, access: int, stack: ExitStack) -> None:
        hold_at(iova, piece, stack)

    def _unmap(self, iova: int, size: int) -> None:
        """Nothing to tell anybody: the device reaches it all the same."""


class _NoMaps(Maps):
    """Refuses every map that is one."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def _map(self, iova: int, piece: Piece, access: int, stack: ExitStack) -> None:
        raise UnavailableError(
            f"{self._address} has no IOMMU in use and may not reach memory: DMA only with {SWITCH}, or bind it to vfio-pci"
        )

    def _unmap(self, iova: int, size: int) -> None:
        """There is nothing."""


def _driver(address: str, machine: Machine) -> str:
    driver = machine.driver(address)
    if driver not in (GENERIC, IGB):
        has = f"{driver} drives it" if driver else "nobody drives it"
        raise UnavailableError(f"{address}: {has}: vfio-vmbus bind {address} --driver {GENERIC} first")
    return driver


def _locked(address: str, folder: Path) -> int:
    """A descriptor whose lock keeps those out who ask for it, too. Not of the node, which UIO lets everybody open, as uio_pci_generic stops
    the device's DMA whenever somebody closes it."""
    try:
        file = os.open(folder / "config", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise UnavailableError(f"{folder / 'config'}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise UnavailableError(f"{address} is in use: another process, or another part of this one, has it") from error
    return file


def _open_node(address: str, folder: Path, machine: Machine) -> int:
    names = [name for name in machine.names(folder / "uio") if name.startswith("uio") and name[3:].isdecimal()]
    if not names:
        raise UnavailableError(f"{address} has no node in {machine.dev}: the uio module is missing")
    file = open_node(machine.dev / names[0], address, "udev hides it")
    os.set_blocking(file, False)
    return file


def _bars(machine: Machine, folder: Path) -> list[tuple[int, int, int]]:
    """(first address, size, flags) of the BARs: lines of first and last address and flags. What is no such line is no BAR."""
    found = []
    for line in (machine.find(folder / "resource").text or "").splitlines()[:_BARS]:
        parts = line.split()
        try:
            first, last, flags = (int(part, 16) for part in parts)
        except ValueError:
            first = last = flags = 0
        found.append((first, last - first + 1 if last > first else 0, flags))
    return found


def _message_kind(machine: Machine, folder: Path) -> int:
    """Which interrupts the kernel has set up: /sys/.../msi_irqs has a file for each message, with its kind."""
    for name in machine.names(folder / "msi_irqs"):
        kind = machine.find(folder / "msi_irqs" / name).text
        if kind in ("msi", "msix"):
            return IRQ_MSIX if kind == "msix" else IRQ_MSI
    return IRQ_INTX
