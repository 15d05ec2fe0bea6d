"""Who drives a VMBus device: give it to uio_hv_generic, and back to the kernel's own driver.

There is no IOMMU in front of a VMBus device: with uio_hv_generic it is unsafe to open (policy.py), and bound it stays visible in
`list` and `audit`.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from ..errors import UnavailableError, UsageError
from . import handover, vmbus
from .machine import Machine
from .records import Binding
from .vmbus import UIO_DRIVER, SysfsDevice

Guard = Callable[[SysfsDevice], None]
"""Raises UnavailableError for a device that must not be taken from its driver."""


def bind(
    name: str,
    driver: str = UIO_DRIVER,
    *,
    machine: Machine = Machine(),  # noqa: B008  (frozen)
    state: Path | None = None,
    guards: tuple[Guard, ...] = (),
) -> Binding:
    """Give the device (its name in `vmbus.folder`) to `driver`. Bound a second time it still remembers what was there first.

    guards are asked, and all else is checked, before anything is touched. Raises UsageError, UnavailableError as `binding.bind`.
    """
    device = _device(name, machine)
    if driver in ("vfio-pci", "uio_pci_generic", "igb_uio"):
        raise UsageError(f"{driver} drives PCI devices; {name} is a VMBus device: take --driver {UIO_DRIVER}")
    seat = _seat(device, machine)
    handover.check_driver(seat, driver)
    if not device.can_override and device.class_guid is None:
        raise UnavailableError(
            f"{name}: class_id: {device.problems.get('class_id')}; without it {driver} cannot be told to take it"
        )
    for guard in guards:
        guard(device)
    handover.check_writable(seat, driver)
    return handover.hand_over(seat, driver, state)


def unbind(
    name: str,
    *,
    machine: Machine = Machine(),  # noqa: B008  (frozen)
    state: Path | None = None,
    guards: tuple[Guard, ...] = (),
) -> Binding:
    """Put back what the device had before `bind`. Raises UsageError for one that was not bound here, else as `bind`."""
    device = _device(name, machine)
    for guard in guards:
        guard(device)
    return handover.give_back(_seat(device, machine), state)


def _device(name: str, machine: Machine) -> SysfsDevice:
    names = machine.names(vmbus.folder(machine))
    if name not in names:
        if not vmbus.present(machine):
            raise UnavailableError("this machine has no VMBus: it is no Hyper-V guest, or its kernel has no hv_vmbus")
        near = get_close_matches(name, names, 3, 0.0)
        says = f"there are {len(names)}, near it {', '.join(near)}" if near else "there is none at all"
        raise UnavailableError(f"no VMBus device {name}: {says}")
    return vmbus.look(name, machine)


def _seat(device: SysfsDevice, machine: Machine) -> handover.Seat:
    shown = ", ".join(device.shows)
    label = f"{device.name} ({device.kind}{', ' + shown if shown else ''})"
    return handover.Seat("vmbus", device.name, machine, label, device.class_guid)
