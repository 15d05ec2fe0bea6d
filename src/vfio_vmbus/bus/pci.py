"""PCI devices as sysfs shows them.

Source: Documentation/ABI/testing/sysfs-bus-pci of Linux 6.12.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import LocalError
from ..vfio.kernel.nodes import Roots, full_address
from .machine import Machine, number


@dataclass(frozen=True)
class PciDevice:
    """A device: numbers as in its configuration space, class_code being base class, subclass and interface.

    driver: None if nobody has it. group: its IOMMU group, None without an IOMMU; members: all devices of the group, itself included.
    """

    address: str
    vendor: int
    device: int
    class_code: int
    driver: str | None
    override: str | None
    group: int | None
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its address and what it is, for people."""
        return f"{self.address} ({self.vendor:04x}:{self.device:04x})"


def look(address: str, roots: Roots = Roots()) -> PciDevice:  # noqa: B008  (frozen)
    """What sysfs says of a device. Raises UsageError for what is no address, UnavailableError where there is no such device."""
    address = full_address(address)
    folder = roots.device(address)
    group = roots.group(address)
    override = _text(folder / "driver_override")
    return PciDevice(
        address=address,
        vendor=number(_text(folder / "vendor"), 16) or 0,
        device=number(_text(folder / "device"), 16) or 0,
        class_code=number(_text(folder / "class"), 16) or 0,
        driver=roots.driver(address),
        override=override if override not in ("", "(null)") else None,
        group=group,
        members=tuple(roots.members(group)) if group is not None else (),
    )


def devices(roots: Roots = Roots()) -> list[PciDevice]:  # noqa: B008  (frozen)
    """All of them, by address. One that vanishes meanwhile is left out, as is a folder that is not named as a device."""
    found = []
    for address in roots.addresses():
        with suppress(LocalError):
            found.append(look(address, roots))
    return found


def _text(path: Path) -> str:
    return Machine().find(path).text or ""
