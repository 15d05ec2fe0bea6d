"""Who drives a PCI device: bind it to a driver such as vfio-pci, and put back what was there.

By driver_override, which concerns this one device only; new_id would claim every device of its kind, now and later.
What was there is kept in a file until `unbind`, so that another process can put it back. Source: Documentation/ABI/testing/sysfs-bus-pci of
Linux 6.12 (driver_override, unbind, drivers_probe).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import UnavailableError, UsageError
from ..vfio.kernel.nodes import Roots, full_address
from . import pci

Guard = Callable[[pci.PciDevice], None]
"""Raises UnavailableError for a device that must not be taken from its driver."""

_NO_OVERRIDE = "\n"


@dataclass(frozen=True)
class Binding:
    """A device that was bound here: to what, and what it had before (None: nothing)."""

    address: str
    driver: str
    driver_before: str | None
    override_before: str | None


def state_folder() -> Path:
    """Where it is remembered what was bound: /run/vfio-vmbus for root, XDG_RUNTIME_DIR/vfio-vmbus for others."""
    own = os.environ.get("XDG_RUNTIME_DIR")
    return Path("/run/vfio-vmbus") if os.geteuid() == 0 or not own else Path(own) / "vfio-vmbus"


def bind(
    address: str,
    driver: str = "vfio-pci",
    *,
    roots: Roots = Roots(),  # noqa: B008  (frozen)
    state: Path | None = None,
    guards: tuple[Guard, ...] = (),
) -> Binding:
    """Give the device to `driver`, whoever has it. Bound a second time it still remembers what was there first.

    guards: are asked before anything is touched. Raises UsageError for what is no address; UnavailableError: no such device, no such driver
    loaded, no IOMMU group (for a driver of VFIO), in use through VFIO, not root, or the driver does not take it, when all is put back.
    """
    device = pci.look(address, roots)
    _check_driver(device, driver, roots)
    for guard in guards:
        guard(device)
    if device.driver != driver:
        _check_unused(device, roots)
    path = _path(device.address, state)
    earlier = _remembered(path)
    if device.driver == driver and earlier is None:
        return Binding(device.address, driver, driver, device.override)
    made = Binding(
        device.address,
        driver,
        earlier.driver_before if earlier else device.driver,
        earlier.override_before if earlier else device.override,
    )
    _remember(path, made)
    try:
        _give(device.address, driver, driver, roots)
        now = roots.driver(device.address)
        if now != driver:
            raise UnavailableError(
                f"{driver} does not take {device.name}: it has {now or 'no driver'} now (see the kernel's log)"
            )
    except UnavailableError:
        _restore(made, path, roots)
        raise
    return made


def unbind(address: str, *, roots: Roots = Roots(), state: Path | None = None) -> Binding:  # noqa: B008  (frozen)
    """Put back what the device had before `bind`: its driver, or none, and its driver_override.

    Raises UsageError for a device that was not bound here, UnavailableError as `bind`, and where the driver of before does not take it.
    """
    address = full_address(address)
    roots.device(address)
    path = _path(address, state)
    binding = _remembered(path)
    if binding is None:
        raise UsageError(f"{address} was not bound here: {path} is not there; it has {roots.driver(address) or 'no driver'}")
    if roots.driver(address) != binding.driver_before:
        _check_unused(pci.look(address, roots), roots)
    _restore(binding, path, roots)
    now = roots.driver(address)
    if now != binding.driver_before:
        before = binding.driver_before or "none"
        raise UnavailableError(
            f"{address} had driver {before} before, and has {now or 'none'} now: is it loaded (modprobe {before})?"
        )
    return binding


def _check_driver(device: pci.PciDevice, driver: str, roots: Roots) -> None:
    if not driver or "/" in driver or driver in (".", ".."):
        raise UsageError(f"{driver!r} is no name of a driver: take one as vfio-pci")
    if not (roots.sysfs / "bus/pci/drivers" / driver).is_dir():
        raise UnavailableError(f"the kernel has no PCI driver {driver} loaded: modprobe {driver}")
    if "vfio" in driver:
        roots.protected_group(device.address)


def _check_unused(device: pci.PciDevice, roots: Roots) -> None:
    """Taken from a driver of VFIO's while a process has it open, the kernel would wait for that process, without an end."""
    if "vfio" in (device.driver or "") and roots.in_use(device.address):
        raise UnavailableError(f"{device.address} is in use: a process has its IOMMU group open; end that first")


def _give(address: str, driver: str | None, override: str | None, roots: Roots) -> None:
    """Take the device from the driver that it has and give it to `driver`, or to nobody; its driver_override is `override` then.

    A device that is to have no driver is not probed.
    """
    folder = roots.device(address)
    roots.write(folder / "driver_override", override or _NO_OVERRIDE)
    if roots.driver(address) not in (None, driver):
        roots.write(folder / "driver/unbind", address)
    if driver is not None and roots.driver(address) is None:
        roots.write(roots.sysfs / "bus/pci/drivers_probe", address)


def _restore(binding: Binding, path: Path, roots: Roots) -> None:
    """Put back what was there. The earlier driver is named for the probe, as others might claim the device as well."""
    _give(binding.address, binding.driver_before, binding.driver_before or binding.override_before, roots)
    roots.write(roots.device(binding.address) / "driver_override", binding.override_before or _NO_OVERRIDE)
    path.unlink(missing_ok=True)


def _path(address: str, state: Path | None) -> Path:
    return (state or state_folder()) / f"bound-{address}.json"


def _remember(path: Path, binding: Binding) -> None:
    """Written beside and renamed, so that it is there as a whole or not at all."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_bytes(msgspec.json.encode(binding))
        beside.replace(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written ({error.strerror}): run as root, or set XDG_RUNTIME_DIR") from error


def _remembered(path: Path) -> Binding | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Binding)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise UnavailableError(f"{path} cannot be understood ({error}): remove it, and bind by hand") from error
