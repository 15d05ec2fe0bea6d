"""What a user calls a device: its instance GUID, its name on the bus, its network interface, disk or uioN, its PCI address."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import UnavailableError, UsageError
from ..vfio.kernel.nodes import full_address
from . import vmbus
from .machine import Machine

_BUSES: Final = ("vmbus", "pci")
_FORMS: Final = (
    "take an instance GUID, the name of a VMBus device, a network interface, disk or uioN, or a PCI address as 0000:00:04.0"
)


@dataclass(frozen=True)
class Target:
    """A device: its bus ("vmbus", "pci") and its name there."""

    bus: str
    name: str

    def folder(self, machine: Machine) -> Path:
        """Where it is, links followed."""
        return real(machine.sysfs / "bus" / self.bus / "devices" / self.name)


def real(path: Path) -> Path:
    """The path without links; of what is not there as far as it goes."""
    return Path(os.path.realpath(path))


def resolve(text: str, machine: Machine = Machine()) -> Target:  # noqa: B008  (frozen)
    """Which device is meant; "vmbus:" or "pci:" before it, as `list` prints it, says on which bus to look.

    Raises UsageError for what cannot be a name, UnavailableError where there is no such device.
    """
    bus, _, rest = text.partition(":")
    wanted = rest if bus in _BUSES and rest else text
    buses = (bus,) if wanted is not text else _BUSES
    if not wanted.strip() or "/" in wanted or wanted in (".", "..") or not wanted.isprintable():
        raise UsageError(f"{text!r} is no device: {_FORMS}")
    found = (_on_vmbus(wanted, machine) if "vmbus" in buses else None) or (_on_pci(wanted, machine) if "pci" in buses else None)
    found = found or _by_interface(wanted, buses, machine)
    if found is None:
        raise UnavailableError(f"no device {wanted}{_near(machine)}: {_FORMS}")
    return found


def _on_vmbus(text: str, machine: Machine) -> Target | None:
    names = machine.names(vmbus.folder(machine))
    if text in names:
        return Target("vmbus", text)
    guid = vmbus.parse_guid(text)
    for name in names if guid else []:
        if vmbus.parse_guid(machine.find(vmbus.folder(machine) / name / "device_id").text or "") == guid:
            return Target("vmbus", name)
    return None


def _on_pci(text: str, machine: Machine) -> Target | None:
    try:
        address = full_address(text)
    except UsageError:
        return None
    machine.device(address)
    return Target("pci", address)


def _by_interface(text: str, buses: tuple[str, ...], machine: Machine) -> Target | None:
    """Up from the interface, disk or node to what is on a bus: the interface of a virtio card lies below its PCI device."""
    for kind in ("net", "block", "uio"):
        folder = machine.sysfs / "class" / kind
        if text in machine.names(folder):
            below = real(folder / text)
            for above in below.parents:
                bus = machine.target(above / "subsystem")
                if bus in buses:
                    return Target(bus, above.name)
            raise UnavailableError(f"{text} is on no bus whose devices can be given away (VMBus, PCI): it is {below}")
    return None


def _near(machine: Machine) -> str:
    names = machine.names(vmbus.folder(machine))
    return f" (this machine has {len(names)} VMBus devices, see vfio-vmbus list)" if names else ""
