"""All devices that this package has to do with: those of VMBus, those of PCI that user space drives, those that are served; and
what is unsafe.

Works unprivileged; what only root may see is missing then.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from . import holders, pci, vmbus
from .machine import Machine
from .names import real
from .pci import PciDevice
from .policy import Isolation, UnsafeUse, unsafe_uses
from .vmbus import SysfsDevice

_USER_DRIVERS: Final = ("uio_pci_generic", "igb_uio")
_COMMAND: Final = slice(4, 6)
"""The command register in configuration space (PCI Local Bus Specification 3.0, 6.2.2); its first 64 bytes are readable by everyone."""
_BUS_MASTER: Final = 4
_SERVER: Final = re.compile(r"vfio[-_]vmbus.*\bserve\b")
NO_IOMMU_OF_VMBUS: Final = "VMBus has no IOMMU: the driver can name any page of this machine to the host"


@dataclass(frozen=True)
class Item:
    """One line of `list`. device: "vmbus:NAME", "pci:ADDRESS", "socket:PATH" or "process:PID"; kind: what it is; shows: what the system
    knows it as; why: of its isolation, which is None for a device that nobody drives; nodes: files through which user space drives it;
    details: the rest, for machines."""

    device: str
    kind: str
    instance: str | None
    driver: str | None
    shows: tuple[str, ...]
    isolation: Isolation | None
    why: str
    nodes: tuple[str, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def items(machine: Machine = Machine()) -> list[Item]:  # noqa: B008  (frozen)
    """Everything, the devices of VMBus first."""
    found = [of_vmbus(device, machine) for device in vmbus.devices(machine)]
    found += [of_pci(device, machine) for device in pci.devices(machine) if in_user_space(device)]
    return found + _served(machine) + [_of_use(use) for use in unsafe_uses(machine)]


def in_user_space(device: PciDevice) -> bool:
    """Has a driver it that only hands it to user space?"""
    return device.driver is not None and (device.driver in _USER_DRIVERS or "vfio" in device.driver)


def pci_isolation(device: PciDevice, machine: Machine) -> tuple[Isolation | None, str]:
    """How far a PCI device reaches, and why."""
    if device.driver is None:
        return None, "nobody drives it"
    if "vfio" in device.driver:
        if device.group is None:
            return None, "it is in no IOMMU group, so nobody can open it"
        if machine.without_iommu(device.group):
            return Isolation.UNSAFE, "VFIO's no-IOMMU mode: it can reach all memory"
        return Isolation.ISOLATED, f"IOMMU group {device.group}"
    if device.driver == "uio_pci_generic":
        if masters_the_bus(device.address, machine):
            return Isolation.UNSAFE, "no IOMMU, and bus mastering is on: it can reach all memory"
        return Isolation.NO_DMA, "no IOMMU, but bus mastering is off (root can turn it on)"
    if device.driver == "igb_uio":
        return Isolation.UNSAFE, "igb_uio turns bus mastering on without an IOMMU: it can reach all memory"
    return Isolation.KERNEL, f"{device.driver} of the kernel drives it"


def masters_the_bus(address: str, machine: Machine) -> bool:
    """May the device read and write memory by itself? If its configuration space cannot be read, it is taken to."""
    command = machine.data(machine.sysfs / "bus/pci/devices" / address / "config", 64)[_COMMAND]
    return len(command) < 2 or bool(int.from_bytes(command, "little") & _BUS_MASTER)


def of_pci(device: PciDevice, machine: Machine) -> Item:
    """A PCI device, whoever drives it."""
    isolation, why = pci_isolation(device, machine)
    here = real(machine.sysfs / "bus/pci/devices" / device.address)
    nodes = tuple(holders.nodes_of(here, machine))
    return Item(
        device=f"pci:{device.address}",
        kind=f"{device.vendor:04x}:{device.device:04x}",
        instance=None,
        driver=device.driver,
        shows=tuple(machine.names(here / "uio")),
        isolation=isolation,
        why=why,
        nodes=nodes,
        details=asdict(device),
    )


def of_vmbus(device: SysfsDevice, machine: Machine) -> Item:
    """A VMBus device, whoever drives it."""
    why = {
        None: "nobody drives it",
        Isolation.UNSAFE: NO_IOMMU_OF_VMBUS,
        Isolation.KERNEL: f"{device.driver} of the kernel drives it",
    }[device.isolation]
    here = real(vmbus.folder(machine) / device.name)
    return Item(
        device=f"vmbus:{device.name}",
        kind=device.kind,
        instance=device.instance,
        driver=device.driver,
        shows=device.shows,
        isolation=device.isolation,
        why=why,
        nodes=tuple(holders.nodes_of(here, machine)),
        problems=device.problems,
        details=asdict(device),
    )


def _served(machine: Machine) -> list[Item]:
    """Sockets at which a process of this package serves devices."""
    found = holders.of_sockets(holders.listening(machine), machine).holders
    control = tuple(f"{folder}/" for folder in machine.state_folders())  # where its socket for `status` is
    return [
        Item(
            device=f"socket:{holder.path}",
            kind="vfio-user server",
            instance=None,
            driver=None,
            shows=(f"process {holder.pid}",),
            isolation=Isolation.ISOLATED,
            why="software IOMMU: a client's device reaches only what it mapped",
            nodes=(holder.path,),
            details=asdict(holder),
        )
        for holder in found
        if _SERVER.search(holder.command) and not holder.path.startswith(control)
    ]


def _of_use(use: UnsafeUse) -> Item:
    return Item(
        device=f"process:{use.pid}",
        kind="unsafe use",
        instance=None,
        driver=None,
        shows=(use.what,),
        isolation=Isolation.UNSAFE,
        why=f"it was allowed {use.what}, and may still be using it",
        details=asdict(use),
    )
