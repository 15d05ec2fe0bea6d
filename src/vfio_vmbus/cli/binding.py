"""`vfio-vmbus bind` and `unbind`: who drives a device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .card import JsonOption
from .output import print_json

if TYPE_CHECKING:
    from ..bus.assign import Assigned

DeviceArgument = Annotated[
    str,
    typer.Argument(
        help="Instance GUID, VMBus device, network interface, disk, uioN, or PCI address (00:04.0).", metavar="DEVICE"
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Even if it carries the default route or the login, is mounted or open.")
]


def bind(
    device: DeviceArgument,
    driver: Annotated[
        str | None,
        typer.Option("--driver", help="Who is to have it: uio_hv_generic, vfio-pci, uio_pci_generic, igb_uio.", metavar="NAME"),
    ] = None,
    force: ForceOption = False,
    persist: Annotated[
        bool, typer.Option("--persist", help="After a reboot, too: by driverctl (PCI) or a rule for udev.")
    ] = False,
    unsafe: Annotated[
        bool, typer.Option("--enable-unsafe-noiommu-mode", help="vfio-pci without an IOMMU: the device reaches all memory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Give a device to a driver of user space.

    A VMBus device to uio_hv_generic (unsafe: see docs/unsafe.md), a PCI device to vfio-pci, if nothing else is said. What it had is
    remembered for unbind. Whatever fails, it has again what it had.

    Example: vfio-vmbus bind eth1 --driver uio_hv_generic
    """
    from ..bus.assign import assign

    done = assign(device, driver, force=force, lasting=persist, unsafe=unsafe)
    _say(done, done.binding.driver, done.binding.driver_before, as_json)
    if done.persistence is not None and not as_json:
        print(f"It stays so after a reboot, by {done.persistence.by} ({done.persistence.file}), until unbind.")
    if done.isolation in ("unsafe", "no-DMA"):
        print(f"vfio-vmbus: WARNING: {device} is {done.isolation} with {done.binding.driver}: {done.why}", file=sys.stderr)


def unbind(device: DeviceArgument, force: ForceOption = False, as_json: JsonOption = False) -> None:
    """Give a device back to the driver that it had before bind.

    What --persist saved is forgotten. Bound by it when the machine started, the device goes to its default driver.

    Example: vfio-vmbus unbind 0000:00:04.0
    """
    from ..bus.assign import give_back

    done = give_back(device, force=force)
    _say(done, done.binding.driver_before, done.binding.driver, as_json)


def _say(done: Assigned, now: str | None, before: str | None, as_json: bool) -> None:
    if not as_json:
        nodes = f", {' '.join(done.nodes)}" if done.nodes else ""
        print(f"{done.target.name}: {now or 'no driver'} (before: {before or 'none'}){nodes}")
        return
    said: dict[str, Any] = {
        "address": done.target.name,
        "bus": done.target.bus,
        "driver": now,
        "before": before,
        "isolation": done.isolation,
        "why": done.why,
        "nodes": done.nodes,
    }
    if done.persistence is not None:
        said["persist"] = {"by": done.persistence.by, "file": str(done.persistence.file)}
    print_json(said)
