"""PCI devices as sysfs shows them.

Source: Documentation/ABI/testing/sysfs-bus-pci of Linux 6.12.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..vfio.kernel.nodes import Roots, full_address


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
        vendor=int(_text(folder / "vendor") or "0", 16),
        device=int(_text(folder / "device") or "0", 16),
        class_code=int(_text(folder / "class") or "0", 16),
        driver=roots.driver(address),
        override=override if override not in ("", "(null)") else None,
        group=group,
        members=tuple(roots.members(group)) if group is not None else (),
    )


def devices(roots: Roots = Roots()) -> list[PciDevice]:  # noqa: B008  (frozen)
    """All of them, by address."""
    return [look(address, roots) for address in roots.addresses()]


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
