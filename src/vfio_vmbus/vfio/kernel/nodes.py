"""Where a PCI device is in /sys and /dev: its driver, its IOMMU group, the nodes that VFIO has for it.

Source: Documentation/ABI/testing/sysfs-bus-pci, Documentation/driver-api/vfio.rst of Linux 6.12.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from ...errors import UnavailableError, UsageError

_ADDRESS: Final = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])")
NOIOMMU_SWITCH: Final = "enable_unsafe_noiommu_mode"
"""The parameter of the kernel's vfio module that makes groups of devices without an IOMMU."""


def full_address(text: str) -> str:
    """ "0000:00:04.0" for that or "00:04.0". Raises UsageError for what is no address."""
    found = _ADDRESS.fullmatch(text.strip())
    if found is None or int(found[3], 16) > 0x1F:
        raise UsageError(f"{text!r} is no address of a PCI device: take DOMAIN:BUS:DEVICE.FUNCTION, as 0000:00:04.0")
    return f"{(found[1] or '0000').lower()}:{found[2].lower()}:{found[3].lower()}.{found[4]}"


@dataclass(frozen=True)
class Roots:
    """Where sysfs and the device nodes are."""

    sysfs: Path = Path("/sys")
    dev: Path = Path("/dev")

    def device(self, address: str) -> Path:
        """The folder of a device. Raises UnavailableError, naming near ones, where there is none."""
        folder = self.sysfs / "bus/pci/devices" / address
        if not folder.is_dir():
            there = self.addresses()
            near = get_close_matches(address, there, 5, 0.0)
            says = f"there are {len(there)}, near it {', '.join(near)}" if near else "there is none at all"
            raise UnavailableError(f"no PCI device {address}: {says}")
        return folder

    def addresses(self) -> list[str]:
        """All PCI devices."""
        folder = self.sysfs / "bus/pci/devices"
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    def driver(self, address: str) -> str | None:
        """The driver that has it."""
        return _target(self.device(address) / "driver")

    def group(self, address: str) -> int | None:
        """Its IOMMU group; None: no IOMMU keeps it in bounds, or none that the kernel uses."""
        name = _target(self.device(address) / "iommu_group")
        return int(name) if name is not None and name.isdecimal() else None

    def protected_group(self, address: str) -> int:
        """Its IOMMU group. Raises UnavailableError where there is none, or one that protects nothing (NOIOMMU_SWITCH)."""
        group = self.group(address)
        if group is None:
            raise UnavailableError(
                f"{address} is in no IOMMU group: turn the IOMMU on (intel_iommu=on; in a guest a virtual one)"
            )
        if self.without_iommu(group):
            raise UnavailableError(
                f"{address} has no IOMMU, only the kernel's unsafe switch {NOIOMMU_SWITCH} (/dev/vfio/noiommu-{group}): "
                "it could reach all memory, and is not opened"
            )
        return group

    def unprotected_group(self, address: str) -> int:
        """Its group, which protects nothing. Raises UnavailableError where there is none, and where an IOMMU would protect."""
        group = self.group(address)
        if group is None:
            raise UnavailableError(
                f"{address} has no IOMMU and no group without one: modprobe vfio {NOIOMMU_SWITCH}=1 (on a kernel with "
                f"CONFIG_VFIO_NOIOMMU), then bind it (vfio-vmbus bind {address} --enable-unsafe-noiommu-mode)"
            )
        if not self.without_iommu(group):
            raise UnavailableError(
                f"{address} has an IOMMU (group {group}): there is no need to go without, leave the switch away"
            )
        return group

    def without_iommu(self, group: int) -> bool:
        """Is it a group that exists by NOIOMMU_SWITCH only, without any IOMMU?"""
        name = self.sysfs / f"kernel/iommu_groups/{group}/name"
        return (name.is_file() and name.read_text().strip() == "vfio-noiommu") or (self.dev / f"vfio/noiommu-{group}").exists()

    def members(self, group: int) -> list[str]:
        """The devices of a group."""
        folder = self.sysfs / f"kernel/iommu_groups/{group}/devices"
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    def in_use(self, address: str) -> bool:
        """Has a process opened the device, or another of its group, through VFIO? As far as this process may ask."""
        group = self.group(address)
        prefix = "noiommu-" if group is not None and self.without_iommu(group) else ""
        try:
            os.close(os.open(self.dev / f"vfio/{prefix}{group}", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EBUSY
        return False

    def cdev(self, address: str) -> Path | None:
        """The device's own node for iommufd, where the kernel makes one."""
        folder = self.device(address) / "vfio-dev"
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        node = self.dev / "vfio/devices" / names[0] if names else None
        return node if node is not None and node.exists() else None

    def write(self, path: Path, text: str) -> None:
        """Tell sysfs something. Raises UnavailableError."""
        try:
            with open(path, "w") as file:
                file.write(text)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UnavailableError(
                    f"{path} cannot be written by uid {os.geteuid()} ({error.strerror}): run as root"
                ) from error
            raise UnavailableError(f"{path} does not take {text.strip()!r}: {error.strerror}") from error

    def not_viable(self, group: int) -> str:
        """Which of a group's devices have which driver: why it may not be used."""
        rows = [f"{member} ({self.driver(member) or 'no driver'})" for member in self.members(group)]
        return f"IOMMU group {group} has {', '.join(rows)}: all must have vfio-pci, or no driver"


def _target(link: Path) -> str | None:
    try:
        return Path(os.readlink(link)).name
    except OSError:
        return None


def open_node(path: Path, what: str, advice: str) -> int:
    """Open a node for reading and writing. Raises UnavailableError, with `advice` where there is no such node."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
            says = advice
        elif error.errno == errno.EPERM and path.name.startswith("noiommu-"):
            says = f"a group without an IOMMU is for CAP_SYS_RAWIO only, which this process (uid {os.geteuid()}) lacks"
        elif error.errno in (errno.EACCES, errno.EPERM):
            says = f"this process (uid {os.geteuid()}) may not: run as root, or give the node to its user (chown, or a udev rule)"
        elif error.errno == errno.EBUSY:
            says = "another process, or another KernelDevice of this one, has it; devices of one group share an AddressSpace"
        else:
            says = "it cannot be opened"
        raise UnavailableError(f"{what}, {path}: {error.strerror}; {says}") from error
