"""A VMBus of folders and links that does what the kernel does when its files are written to.

Source: drivers/base/bus.c, drivers/base/dd.c and drivers/hv/vmbus_drv.c of Linux 6.12.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from tests.bus.trees import BALLOON, NETWORK, SCSI, machine, put, vmbus_device
from vfio_vmbus.bus.machine import Machine
from vfio_vmbus.errors import UnavailableError

KNOWN = {"hv_netvsc": NETWORK, "hv_storvsc": SCSI, "hv_balloon": BALLOON}


@dataclass(frozen=True)
class VmbusKernel(Machine):
    """claims: classes that a driver has by itself; taught: those that new_id gave it. refuses: (driver, device) whose probe fails.
    written: what was, in order. deaf: a file that takes nothing from its n-th write on."""

    claims: dict[str, set[str]] = field(default_factory=dict)
    taught: dict[str, set[str]] = field(default_factory=dict)
    refuses: set[tuple[str, str]] = field(default_factory=set)
    written: list[tuple[str, str]] = field(default_factory=list)
    deaf: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(
        cls, root: Path, *, drivers: tuple[str, ...] = ("hv_netvsc", "hv_storvsc", "hv_balloon", "uio_hv_generic")
    ) -> VmbusKernel:
        kernel = cls(**vars(machine(root)))
        put(kernel.sysfs / "bus/vmbus/drivers_probe")
        (kernel.sysfs / "bus/vmbus/devices").mkdir()
        for name in drivers:
            for file in ("bind", "unbind", "new_id", "remove_id"):
                put(kernel.sysfs / "bus/vmbus/drivers" / name / file)
            kernel.claims[name] = {KNOWN[name]} if name in KNOWN else set()
            kernel.taught[name] = set()
        return kernel

    def offer(
        self, instance: str, class_guid: str, driver: str | None = None, *, override: bool = True, name: str | None = None
    ) -> Path:
        """A device that `driver` has. override: has this kernel driver_override?"""
        device = vmbus_device(self, instance, class_guid, driver=driver, name=name)
        if not override:
            (device / "driver_override").unlink()
        return device

    def write(self, path: Path, text: str) -> None:
        self.written.append((str(path.relative_to(self.sysfs)), text.strip()))
        left = self.deaf.get(path.name)
        if left is not None:
            self.deaf[path.name] = left - 1
            if left <= 0:
                self._fail(path, errno.EIO)
        value = text.strip()
        match path.name:
            case "driver_override":
                path.write_text(f"{value or '(null)'}\n")
            case "drivers_probe":
                self._probe(self._device(path, value))
            case "bind":
                device = self._device(path, value)
                if self._driver(device) is not None:
                    self._fail(path, errno.EBUSY)
                if not self._matches(path.parent.name, device) or not self._attach(path.parent.name, device):
                    self._fail(path, errno.ENODEV)
            case "unbind":
                device = self._device(path, value)
                if self._driver(device) != path.parent.resolve().name:
                    self._fail(path, errno.ENODEV)
                (device / "driver").unlink()
            case "new_id":
                self._teach(path, value)
            case "remove_id":
                if value not in self.taught[path.parent.name]:
                    self._fail(path, errno.ENODEV)
                self.taught[path.parent.name].remove(value)
            case _:
                raise AssertionError(f"nobody writes to {path}")

    def state(self) -> dict[str, tuple[str | None, str | None]]:
        """Each device's driver and override."""
        folder = self.sysfs / "bus/vmbus/devices"
        return {
            name: (self._driver(folder / name), self.find(folder / name / "driver_override").text) for name in self.names(folder)
        }

    def _teach(self, path: Path, value: str) -> None:
        driver = path.parent.name
        if value in self.taught[driver]:
            self._fail(path, errno.EEXIST)
        self.taught[driver].add(value)
        folder = self.sysfs / "bus/vmbus/devices"
        for name in self.names(folder):
            if self._driver(folder / name) is None and self._matches(driver, folder / name):
                self._attach(driver, folder / name)

    def _probe(self, device: Path) -> None:
        if self._driver(device) is None:
            any(self._matches(driver, device) and self._attach(driver, device) for driver in self.claims)

    def _matches(self, driver: str, device: Path) -> bool:
        override = self.find(device / "driver_override").text
        if override not in (None, "(null)"):
            return driver == override
        return (self.find(device / "class_id").text or "").strip("{}") in self.claims[driver] | self.taught[driver]

    def _attach(self, driver: str, device: Path) -> bool:
        if (driver, device.name) in self.refuses:
            return False
        (device / "driver").symlink_to(self.sysfs / "bus/vmbus/drivers" / driver)
        return True

    def _driver(self, device: Path) -> str | None:
        return self.target(device / "driver")

    def _device(self, path: Path, name: str) -> Path:
        device = self.sysfs / "bus/vmbus/devices" / name
        if not device.is_dir():
            self._fail(path, errno.ENODEV)
        return device

    def _fail(self, path: Path, code: int) -> None:
        error = OSError(code, os.strerror(code))
        raise UnavailableError(f"{path} does not take that: {os.strerror(code)}") from error
