"""What is missing to drive a device from user space, why it matters, and the command that mends it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from . import holders, inuse, inventory, kernel_facts, pci, vmbus
from .machine import Machine, number
from .names import Target, resolve
from .policy import CAP_SYS_RAWIO, SWITCH, Isolation, capability, holds_rawio

_CAP_IPC_LOCK: Final = 14
_ENOUGH_LOCKED: Final = 256 << 20
"""Bytes: rings, receive and send buffer of a card, and frames, with room to spare."""
_MULTIPLE_QUEUES: Final = (4, 17)
"""Linux from which uio_hv_generic has sub-channels (DPDK, doc/guides/nics/netvsc.rst)."""
_EXTRA: Final = "apt install linux-modules-extra-$(uname -r) (Ubuntu), or take a kernel with"
_MODULES: Final = {
    "uio_hv_generic": f"{_EXTRA} CONFIG_UIO_HV_GENERIC; then modprobe uio_hv_generic",
    "hv_vmbus": "take a kernel with CONFIG_HYPERV; on Hyper-V every distribution's has it",
    "vfio_pci": "take a kernel with CONFIG_VFIO_PCI; then modprobe vfio-pci",
    "uio_pci_generic": f"{_EXTRA} CONFIG_UIO_PCI_GENERIC; then modprobe uio_pci_generic",
    "igb_uio": "build it from dpdk-kmods (Debian: apt install dpdk-kmods-dkms); vfio-pci is safer",
}


class State(StrEnum):
    """Of a check: there, missing for what was asked, or worth knowing."""

    OK = "ok"
    MISSING = "missing"
    NOTE = "note"


@dataclass(frozen=True)
class Check:
    """A line: what was looked at, how it is, what was found, why it matters, the command that mends it ("" if nothing is to be mended)."""

    what: str
    state: State
    found: str
    why: str
    mend: str = ""


def examine(
    device: str | None = None,
    machine: Machine = Machine(),  # noqa: B008  (frozen)
    environment: Mapping[str, str] = os.environ,
) -> list[Check]:
    """Everything that driving `device` takes; without one, what the embedded host takes, and what real devices here would take, as notes.

    Raises UsageError, UnavailableError for a device that is not there. Changes nothing.
    """
    common = [_kernel(machine), _hypervisor(machine), _lockdown(machine)]
    if device is None:
        notes = [*_vmbus(machine, None), *_pci(machine, None), *_memory(machine)]
        return [*common, *_embedded(machine), *(_as_note(check) for check in notes)]
    target = resolve(device, machine)
    for_bus = _vmbus if target.bus == "vmbus" else _pci
    return [*common, *for_bus(machine, target), *_memory(machine), *_use(machine, target, environment)]


def _as_note(check: Check) -> Check:
    return Check(check.what, State.NOTE, check.found, check.why, check.mend) if check.state is State.MISSING else check


def _check(what: str, good: bool, found: str, why: str, mend: str) -> Check:
    return Check(what, State.OK if good else State.MISSING, found, why, "" if good else mend)


def _kernel(machine: Machine) -> Check:
    text, version = kernel_facts.release(machine)
    why = "uio_hv_generic has sub-channels (queues) since 4.17, VMBus has driver_override since 4.18"
    return _check("kernel", version >= _MULTIPLE_QUEUES, text, why, "take a kernel of 4.18 or later")


def _hypervisor(machine: Machine) -> Check:
    vendor = machine.find(machine.sysfs / "class/dmi/id/sys_vendor").text or ""
    product = machine.find(machine.sysfs / "class/dmi/id/product_name").text or ""
    kind = machine.find(machine.sysfs / "hypervisor/type").text
    guest = any(
        "hypervisor" in line.split()
        for line in machine.text(machine.proc / "cpuinfo").splitlines()
        if line.startswith(("flags", "Features"))
    )
    hyperv = (vendor, product) == ("Microsoft Corporation", "Virtual Machine")
    what = (
        "Hyper-V or Azure"
        if hyperv
        else f"{kind or vendor or 'unknown'} virtual machine"
        if guest or kind
        else "no virtual machine seen"
    )
    return Check(
        "hypervisor",
        State.OK if hyperv else State.NOTE,
        what,
        "only Hyper-V and Azure have a VMBus; elsewhere the embedded host stands in",
    )


def _lockdown(machine: Machine) -> Check:
    text = machine.find(machine.sysfs / "kernel/security/lockdown").text or "[none]"
    mode = text.partition("[")[2].partition("]")[0] or "none"
    why = "a locked-down kernel loads no unsigned module (igb_uio) and shows no physical addresses (no-IOMMU)"
    return Check(
        "lockdown",
        State.OK if mode == "none" else State.NOTE,
        mode,
        why,
        "" if mode == "none" else "turn Secure Boot off, if you need these",
    )


def _module(machine: Machine, name: str, why: str) -> Check:
    state = kernel_facts.module_state(machine, name)
    mend = f"modprobe {name}" if state == "on disk" else _MODULES[name]
    return _check(f"module {name}", state in ("loaded", "built in"), state, why, mend)


def _embedded(machine: Machine) -> Iterator[Check]:
    why = "TAP interfaces join the embedded host's cards to the kernel's network stack"
    yield _node(machine.dev / "net/tun", why, "modprobe tun")
    limit = machine.number(machine.proc / "sys/user/max_user_namespaces")
    clone = machine.number(machine.proc / "sys/kernel/unprivileged_userns_clone")
    confined = machine.number(machine.proc / "sys/kernel/apparmor_restrict_unprivileged_userns")
    denied = limit == 0 or clone == 0 or confined == 1
    good = not denied or os.geteuid() == 0
    found = "allowed" if not denied else "forbidden to users"
    mend = (
        "sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"
    )
    yield _check("user namespaces", good, found, "the demonstration makes networks of its own in them", mend)


def _vmbus(machine: Machine, target: Target | None) -> Iterator[Check]:
    there = vmbus.present(machine)
    found = f"{len(vmbus.devices(machine))} devices" if there else "none"
    yield _check("VMBus", there, found, "the devices are on it", _MODULES["hv_vmbus"])
    yield _module(machine, "uio_hv_generic", "gives a VMBus device to user space")
    override = _override(machine, target)
    if override is not None:
        yield Check(
            "driver_override",
            State.OK if override else State.NOTE,
            "there" if override else "not there",
            "binds one device; without it all idle devices of the class are probed, and --persist cannot be",
            "" if override else "take a kernel of 4.18 or later",
        )
    device = None if target is None else vmbus.look(target.name, machine)
    if device is not None:
        bound = device.driver == vmbus.UIO_DRIVER
        yield _bound(bound, device.driver, f"vfio-vmbus bind {device.name}")
        if device.problems:
            said = "; ".join(f"{name}: {problem}" for name, problem in device.problems.items())
            yield Check("attributes", State.NOTE, said, "the device cannot be described whole", "see the kernel's log (dmesg)")
        for name in device.uio:
            yield _node(machine.dev / name, "the driver opens it", f"chown $USER /dev/{name}, or a udev rule")
        if bound:
            files = [channel.ring_file for channel in device.channels]
            good = bool(files) and all(files)
            why = "sub-channels are mapped by it; the kernel makes it late, and when the device is opened"
            yield Check("ring files", State.OK if good else State.NOTE, f"{sum(files)} of {len(files)} channels", why)
    yield _rawio(machine)


def _override(machine: Machine, target: Target | None) -> bool | None:
    names = [target.name] if target is not None else machine.names(vmbus.folder(machine))
    found = [(vmbus.folder(machine) / name / "driver_override").exists() for name in names]
    return all(found) if found else None


def _rawio(machine: Machine) -> Check:
    held = holds_rawio(machine)
    inside = not held and capability(machine, CAP_SYS_RAWIO)
    found = "held" if held else "held in a user namespace only" if inside else "not held"
    why = f"a real VMBus device is unsafe (docs/unsafe.md): it takes {SWITCH} and this"
    return _check("CAP_SYS_RAWIO", held, found, why, "run as root, or setpriv --inh-caps +sys_rawio --ambient-caps +sys_rawio")


def _bound(bound: bool, driver: str | None, mend: str) -> Check:
    return _check("driver", bound, driver or "none", "the device must be in the hands of user space", mend)


def _pci(machine: Machine, target: Target | None) -> Iterator[Check]:
    groups = machine.names(machine.sysfs / "kernel/iommu_groups")
    device = None if target is None else pci.look(target.name, machine)
    chosen = device.driver if device is not None and inventory.in_user_space(device) else "vfio-pci"
    for_vfio = chosen is not None and "vfio" in chosen
    iommu = "intel_iommu=on (Intel) on the kernel's command line; in a guest, a virtual IOMMU"
    why = "an IOMMU keeps the device within memory that its driver mapped"
    if device is None:
        yield _check("IOMMU groups", bool(groups), str(len(groups)), why, iommu)
    else:
        good = device.group is not None and not machine.without_iommu(device.group)
        found = "none" if device.group is None else f"{device.group} ({len(device.members)} devices)"
        check = _check("IOMMU group", good, found, why, iommu)
        yield check if for_vfio else _as_note(check)
    name = (chosen or "vfio-pci").replace("-", "_")
    if name in _MODULES:
        yield _module(machine, name, "gives a PCI device to user space")
    if for_vfio:
        yield _node(machine.dev / "vfio/vfio", "IO address spaces come from it", "modprobe vfio-pci (and vfio_iommu_type1)")
        there = (machine.dev / "iommu").exists()
        yield Check(
            "/dev/iommu",
            State.OK if there else State.NOTE,
            "there" if there else "not there",
            "iommufd, the newer way to the same; not needed",
        )
    if device is not None and target is not None:
        yield _bound(inventory.in_user_space(device), device.driver, f"vfio-vmbus bind {device.address}")
        for node in holders.nodes_of(target.folder(machine), machine):
            yield _node(Path(node), "the driver opens it", f"chown $USER {node}, or a udev rule")
        isolation, reason = inventory.pci_isolation(device, machine)
        if isolation is Isolation.UNSAFE:
            yield Check("isolation", State.NOTE, f"unsafe: {reason}", f"it takes {SWITCH} (docs/unsafe.md)")
            yield _rawio(machine)


def _node(path: Path, why: str, mend: str) -> Check:
    if not path.exists():
        return _check(str(path), False, "not there", why, mend)
    good = os.access(path, os.R_OK | os.W_OK)
    return _check(
        str(path),
        good,
        "may be opened" if good else f"closed to uid {os.geteuid()}",
        why,
        mend if "chown" in mend else f"chmod or chown {path}, or run as root",
    )


def _memory(machine: Machine) -> Iterator[Check]:
    soft = _locked_limit(machine)
    exempt = capability(machine, _CAP_IPC_LOCK)
    good = exempt or soft is None or soft >= _ENOUGH_LOCKED
    found = "no limit" if soft is None else f"{soft >> 20} MiB"
    mend = "ulimit -l unlimited, by root; or LimitMEMLOCK=infinity in the service, memlock in /etc/security/limits.conf"
    yield _check(
        "locked memory",
        good,
        f"{found}{' (CAP_IPC_LOCK: does not matter)' if exempt else ''}",
        "memory that a device reaches is locked",
        mend,
    )
    free = _meminfo(machine, "HugePages_Free") or 0
    size = (_meminfo(machine, "Hugepagesize") or 0) >> 10
    why = "large transfers of a real VMBus device want physically contiguous memory"
    found = f"{free} free of {size} MiB"
    yield Check("huge pages", State.OK if free else State.NOTE, found, why, "" if free else "sysctl vm.nr_hugepages=64")


def _locked_limit(machine: Machine) -> int | None:
    """Bytes; None: none, or not known."""
    for line in machine.text(machine.proc / "self/limits").splitlines():
        if line.startswith("Max locked memory"):
            fields = line.removeprefix("Max locked memory").split()
            return number(fields[0]) if fields else None
    return None


def _meminfo(machine: Machine, name: str) -> int | None:
    for line in machine.text(machine.proc / "meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == name and value.split():
            return number(value.split()[0])
    return None


def _use(machine: Machine, target: Target, environment: Mapping[str, str]) -> Iterator[Check]:
    for reason in inuse.reasons(target, machine, environment):
        yield Check(
            "in use", State.NOTE, reason, "bind refuses to take it away", "use another device, or vfio-vmbus bind --force"
        )
