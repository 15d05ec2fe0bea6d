"""Every device of this machine that user space drives: who holds it, how far it reaches and why, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from ..vfio.kernel.nodes import NOIOMMU_SWITCH
from . import holders, inventory, kernel_facts
from .holders import Holder
from .inventory import Item
from .kernel_facts import Taint, Weakness
from .machine import Machine, number
from .names import real
from .policy import Isolation, UnsafeUse, unsafe_uses

_USED: Final = (Isolation.ISOLATED, Isolation.NO_DMA, Isolation.UNSAFE)


@dataclass(frozen=True)
class Finding:
    """A device in the hands of user space, who has it open, and what to do (None: nothing)."""

    item: Item
    holders: tuple[Holder, ...]
    advice: str | None


@dataclass(frozen=True)
class Audit:
    """What was found; unseen: what this user may not see, so that nothing found there means nothing."""

    findings: tuple[Finding, ...]
    uses: tuple[tuple[UnsafeUse, str], ...]
    """Marks of processes that were allowed something unsafe, with each one's command."""
    weaknesses: tuple[Weakness, ...]
    taint: Taint
    unseen: tuple[str, ...]

    @property
    def unsafe(self) -> list[str]:
        """What makes this machine unsafe, in words; nothing if it is not."""
        found = [f"{one.item.device}: {one.item.why}" for one in self.findings if one.item.isolation is Isolation.UNSAFE]
        found += [f"process {use.pid} ({command or '?'}) was allowed {use.what}" for use, command in self.uses]
        found += [f"{weakness.where}: {weakness.value}: {weakness.why}" for weakness in self.weaknesses if weakness.unsafe]
        if self.taint.user:
            found.append("the kernel is tainted by user space (U): something unsafe was done since it started")
        return found


def audit(machine: Machine = Machine()) -> Audit:  # noqa: B008  (frozen)
    """Look at everything. Never raises for what it finds, or cannot see."""
    items = [item for item in inventory.items(machine) if item.device.partition(":")[0] != "process" and item.isolation in _USED]
    items += _others(items, machine)
    held = holders.of_nodes([node for item in items for node in item.nodes if not item.device.startswith("socket:")], machine)
    findings = []
    for item in items:
        if item.device.startswith("socket:"):
            having: tuple[Holder, ...] = (Holder(**item.details),)
        else:
            having = tuple(one for one in held.holders if one.path in item.nodes)
        findings.append(Finding(item, having, _advice(item)))
    uses = tuple((use, holders.command_of(str(use.pid), machine)) for use in unsafe_uses(machine))
    return Audit(tuple(findings), uses, tuple(kernel_facts.weaknesses(machine)), kernel_facts.taint(machine), _unseen(machine))


def _others(known: list[Item], machine: Machine) -> list[Item]:
    """Nodes of UIO and VFIO that belong to no device of VMBus or PCI: platform devices, mediated ones."""
    nodes = {node for item in known for node in item.nodes}
    found = []
    for name in machine.names(machine.dev):
        if number(name.removeprefix("uio")) is not None and name.startswith("uio") and str(machine.dev / name) not in nodes:
            here = real(machine.sysfs / "class/uio" / name)
            driver = machine.find(here / "name").text
            why = "UIO has no IOMMU: if the device can reach memory, it reaches all of it"
            found.append(_other(f"uio:{name}", driver, Isolation.UNSAFE, why, str(machine.dev / name)))
    for name in machine.names(machine.dev / "vfio"):
        node = str(machine.dev / "vfio" / name)
        if node in nodes or name in ("vfio", "devices"):
            continue
        if name.startswith("noiommu-"):
            found.append(_other(f"vfio:{name}", None, Isolation.UNSAFE, "VFIO's no-IOMMU mode: it can reach all memory", node))
        elif number(name) is not None:
            found.append(_other(f"vfio:{name}", None, Isolation.ISOLATED, f"IOMMU group {name}", node))
    for name in machine.names(machine.dev / "vfio/devices"):
        node = str(machine.dev / "vfio/devices" / name)
        if node not in nodes:
            found.append(_cdev(name, node, machine))
    return found


def _cdev(name: str, node: str, machine: Machine) -> Item:
    """A device's own node. Kernels up to 6.12 make none without an IOMMU; should one do, its name says so, as a group's does."""
    bare = name.startswith("noiommu-")
    why = "VFIO's no-IOMMU mode: it can reach all memory" if bare else "an IOMMU of iommufd's"
    isolation = Isolation.UNSAFE if bare else Isolation.ISOLATED
    device = real(machine.sysfs / "class/vfio-dev" / name / "device").name
    return _other(
        f"vfio:{name}", machine.target(machine.sysfs / "class/vfio-dev" / name / "device/driver") or device, isolation, why, node
    )


def _other(device: str, driver: str | None, isolation: Isolation, why: str, node: str) -> Item:
    return Item(device, "not of VMBus or PCI", None, driver, (), isolation, why, (node,))


def _advice(item: Item) -> str | None:
    if item.isolation is not Isolation.UNSAFE:
        return None
    kind, _, name = item.device.partition(":")
    if kind == "vmbus":
        return f"vfio-vmbus unbind {name} when it is not needed; there is no isolated way for a device of the real VMBus"
    if kind == "pci" and "vfio" in (item.driver or ""):
        return f"turn an IOMMU on (intel_iommu=on; in a guest a virtual one), take {NOIOMMU_SWITCH} away, and bind it again"
    if kind == "pci":
        return f"vfio-vmbus bind {name} --driver vfio-pci, with an IOMMU; or vfio-vmbus unbind {name}"
    return "stop who holds it open, and unbind the device"


def _unseen(machine: Machine) -> tuple[str, ...]:
    found = []
    held = holders.of_nodes([os.devnull], machine)
    if held.unseen:
        found.append(f"what {held.unseen} processes of other users have open (run as root)")
    if kernel_facts.log(machine) is None:
        found.append("the kernel's log, so since when it is tainted (run as root, or with CAP_SYSLOG)")
    return tuple(found)
