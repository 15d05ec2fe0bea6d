"""A PCI bus made of folders and links, which does what the kernel does when its files are written to.

Source: drivers/base/bus.c and drivers/pci/pci-driver.c of Linux 6.12.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.errors import UnavailableError


@dataclass(frozen=True)
class SysfsTree(Machine):
    """claims: which devices (vendor, device) a driver takes by itself; vfio-pci takes what is told to it only. refuses: whom it does not
    take even so. written: what was, in order. deaf: paths whose writes the kernel refuses, and how often before it does."""

    claims: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    refuses: set[tuple[str, str]] = field(default_factory=set)
    written: list[tuple[str, str]] = field(default_factory=list)
    deaf: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(cls, where: Path) -> SysfsTree:
        tree = cls(*(where / name for name in ("sys", "dev", "proc", "run", "etc", "modules")))
        for folder in ("bus/pci/devices", "bus/pci/drivers", "kernel/iommu_groups"):
            (tree.sysfs / folder).mkdir(parents=True)
        (tree.dev / "vfio").mkdir(parents=True)
        (tree.sysfs / "bus/pci/drivers_probe").touch()
        return tree

    def add_driver(self, name: str, *claims: tuple[int, int]) -> None:
        folder = self.sysfs / "bus/pci/drivers" / name
        folder.mkdir()
        (folder / "unbind").touch()
        self.claims[name] = set(claims)

    def add_device(
        self, address: str, ids: tuple[int, int] = (0x1234, 0x11E8), *, group: int | None = 1, driver: str | None = None
    ) -> Path:
        folder = self.sysfs / "bus/pci/devices" / address
        folder.mkdir()
        (folder / "vendor").write_text(f"{ids[0]:#06x}\n")
        (folder / "device").write_text(f"{ids[1]:#06x}\n")
        (folder / "class").write_text("0x00ff00\n")
        (folder / "driver_override").write_text("(null)\n")
        if group is not None:
            members = self.sysfs / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(folder)
            (folder / "iommu_group").symlink_to(members.parent)
        if driver is not None:
            self._attach(folder, driver)
        return folder

    def write(self, path: Path, text: str) -> None:
        name = str(path.relative_to(self.sysfs))
        left = self.deaf.get(name, -1)
        self.deaf[name] = left - 1
        if left == 0:
            raise UnavailableError(f"{path} does not take {text.strip()!r}: Invalid argument")
        self.written.append((name, text.strip()))
        if path.name == "driver_override":
            path.write_text(text if text.strip() else "(null)\n")
        elif path.name == "unbind":
            (path.parent.parent / "driver").unlink()  # the device is this one, as it is its link that was followed
        elif path.name == "drivers_probe":
            self._probe(self.sysfs / "bus/pci/devices" / text)
        else:
            raise AssertionError(f"nobody writes to {path}")

    def _probe(self, folder: Path) -> None:
        if (folder / "driver").is_symlink():
            return
        override = (folder / "driver_override").read_text().strip()
        ids = tuple(int((folder / name).read_text(), 16) for name in ("vendor", "device"))
        for driver, claims in self.claims.items():
            wanted = driver == override if override != "(null)" else ids in claims
            if wanted and (driver, folder.name) not in self.refuses:
                self._attach(folder, driver)
                return

    def _attach(self, folder: Path, driver: str) -> None:
        (folder / "driver").symlink_to(self.sysfs / "bus/pci/drivers" / driver)
