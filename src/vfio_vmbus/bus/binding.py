"""Who drives a PCI device: bind it to a driver such as vfio-pci, and put back what was there. `vmbus_binding` does it for VMBus.

By driver_override, which concerns this one device only; new_id would claim every device of its kind, now and later. What was there is
kept in a file until `unbind`, so that another process can put it back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UnavailableError, UnsafeError
from ..vfio.kernel.nodes import NOIOMMU_SWITCH, Roots, full_address
from . import handover, pci
from .records import Binding, Record, state_folder

__all__ = ["Binding", "Guard", "bind", "state_folder", "unbind"]

Guard = Callable[[pci.PciDevice], None]
"""Raises UnavailableError for a device that must not be taken from its driver."""


def bind(
    address: str,
    driver: str = "vfio-pci",
    *,
    roots: Roots = Roots(),  # noqa: B008  (frozen)
    state: Path | None = None,
    guards: tuple[Guard, ...] = (),
    unsafe: bool = False,
) -> Binding:
    """Give the device to `driver`, whoever has it. Bound a second time it still remembers what was there first.

    guards: are asked before anything is touched. unsafe: a driver of VFIO may have it without an IOMMU, if the kernel allows that.
    Raises UsageError for what is no address; UnavailableError: no such device, no such driver loaded, no IOMMU group (for a driver of
    VFIO), in use through VFIO, not root, or the driver does not take it, when all is put back.
    """
    device = pci.look(address, roots)
    seat = _seat(device, roots)
    handover.check_driver(seat, driver)
    if "vfio" in driver:
        _check_iommu(device, roots, unsafe)
    for guard in guards:
        guard(device)
    if device.driver != driver:
        _check_unused(device, roots)
    handover.check_writable(seat, driver)
    return handover.hand_over(seat, driver, state)


def unbind(
    address: str,
    *,
    roots: Roots = Roots(),  # noqa: B008  (frozen)
    state: Path | None = None,
    guards: tuple[Guard, ...] = (),
) -> Binding:
    """Put back what the device had before `bind`: its driver, or none, and its driver_override.

    Raises UsageError for a device that was not bound here, UnavailableError as `bind`, and where the driver of before does not take it.
    """
    address = full_address(address)
    roots.device(address)
    device = pci.look(address, roots)
    for guard in guards:
        guard(device)
    bound = Record(address, state).read()
    if bound is not None and device.driver != bound.driver_before:
        _check_unused(device, roots)
    return handover.give_back(_seat(device, roots), state)


def _seat(device: pci.PciDevice, roots: Roots) -> handover.Seat:
    return handover.Seat("pci", device.address, roots, device.name)


def _check_unused(device: pci.PciDevice, roots: Roots) -> None:
    """Taken from a driver of VFIO's while a process has it open, the kernel would wait for that process, without an end."""
    if "vfio" in (device.driver or "") and roots.in_use(device.address):
        raise UnavailableError(f"{device.address} is in use: a process has its IOMMU group open; end that first")


def _check_iommu(device: pci.PciDevice, roots: Roots, unsafe: bool) -> None:
    try:
        roots.protected_group(device.address)
    except UnavailableError:
        if not unsafe:
            raise
        switch = roots.sysfs / "module/vfio/parameters" / NOIOMMU_SWITCH
        if not switch.is_file() or switch.read_text().strip() not in ("Y", "1"):
            raise UnsafeError(
                f"{device.address} has no IOMMU, and the kernel does not allow it without: {switch} is not there, or not Y "
                f"(modprobe vfio {NOIOMMU_SWITCH}=1, on a kernel with CONFIG_VFIO_NOIOMMU)"
            ) from None
