"""VMBus devices as the kernel's sysfs shows them, on kernels old and new.

Source: Documentation/ABI/stable/sysfs-bus-vmbus, drivers/hv/vmbus_drv.c and drivers/uio/uio_hv_generic.c of Linux 6.12. Works
unprivileged: all that is read is readable by everyone. An attribute that cannot be understood is listed in `problems`, and the rest is
shown all the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from ..wire.guids import class_name
from .machine import MISSING, Machine, number
from .policy import Isolation

UIO_DRIVER: Final = "uio_hv_generic"
_GUID: Final = re.compile(r"\{?([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\}?")
_STATES: Final = ("offered", "opening", "open", "opened")
"""enum vmbus_channel_state of include/linux/hyperv.h; "opened" is the state in which its rings are in use."""
_MONITOR_IDS: Final = 128
"""4 trigger groups of 32. Kernels before 4.20 show a number for channels without a monitor, too: one beyond."""
_OPTIONAL: Final = ("monitor_id", "numa_node", "driver_override")
"""Attributes that are missing where there is nothing to say."""
_MOST_CHANNELS: Final = 4096
_PAGE: Final = 4096
_DISKS: Final = ("host*/target*/*/block/*", "host*/rport-*/target*/*/block/*")
_FUNCTIONS: Final = "pci[0-9a-f]*:*/*:*:*.*"


@dataclass(frozen=True)
class SysfsChannel:
    """A channel: relid (its number), sub-channel index, cpu that it interrupts.

    out_masked, in_masked: is the interrupt of whoever reads that ring masked? None while the channel is closed. read_bytes, write_bytes:
    what lies in the ring from the host, what is free in the ring to it. interrupts, signals: so many came, so many were sent. monitor:
    its number, None if it signals by hypercall. ring_file: is there a `ring` file to map, as uio_hv_generic makes it?
    """

    relid: int
    index: int | None
    cpu: int | None
    out_masked: bool | None
    in_masked: bool | None
    read_bytes: int | None
    write_bytes: int | None
    interrupts: int | None
    signals: int | None
    monitor: int | None
    ring_file: bool


@dataclass(frozen=True)
class SysfsDevice:
    """A VMBus device: `name` is its folder's (on new kernels the instance GUID), the rest what its files say; None: they do not say it.

    ring_out, ring_in: bytes of the primary channel's rings, each with its control page. isolation: None while nobody drives it. problems:
    attributes that cannot be understood, and why.
    """

    name: str
    instance: str | None
    class_guid: str | None
    kind: str
    relid: int | None
    state: str | None
    driver: str | None
    override: str | None
    can_override: bool
    networks: tuple[str, ...]
    disks: tuple[str, ...]
    functions: tuple[str, ...]
    uio: tuple[str, ...]
    channels: tuple[SysfsChannel, ...]
    monitor: int | None
    ring_out: int | None
    ring_in: int | None
    numa_node: int | None
    isolation: Isolation | None
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def shows(self) -> tuple[str, ...]:
        """What the system knows it as: eth0, sda, 0001:00:00.0, uio0."""
        return (*self.networks, *self.disks, *self.functions, *self.uio)


def folder(machine: Machine) -> Path:
    """Where the devices are."""
    return machine.sysfs / "bus/vmbus/devices"


def present(machine: Machine) -> bool:
    """Does this machine have a VMBus?"""
    return folder(machine).is_dir()


def devices(machine: Machine = Machine()) -> list[SysfsDevice]:  # noqa: B008  (frozen)
    """All of them, by name; none where there is no VMBus. One that vanishes meanwhile may be there, with problems."""
    return [look(name, machine) for name in machine.names(folder(machine))]


def look(name: str, machine: Machine = Machine()) -> SysfsDevice:  # noqa: B008  (frozen)
    """One of the names in `folder`. Never raises: what cannot be read is a problem of the device."""
    here = folder(machine) / name
    files = _Files(machine, here)
    class_guid, instance = files.guid("class_id"), files.guid("device_id")
    state = files.number("state")
    monitor = files.number("monitor_id")
    numa = files.number("numa_node")
    driver = machine.target(here / "driver")
    override = machine.find(here / "driver_override")
    uio = tuple(machine.names(here / "uio"))
    ring_out, ring_in = _mapped_rings(machine, here, uio) or _kernel_rings(machine, here)
    return SysfsDevice(
        name=name,
        instance=instance,
        class_guid=class_guid,
        kind=class_name(UUID(class_guid)) if class_guid else "unknown",
        relid=files.number("id"),
        state=None if state is None else _STATES[state] if 0 <= state < len(_STATES) else str(state),
        driver=driver,
        override=override.text if override.text != "(null)" else None,
        can_override=override.problem != MISSING,
        networks=tuple(machine.names(here / "net")),
        disks=_below(here, *_DISKS),
        functions=_below(here, _FUNCTIONS),
        uio=uio,
        channels=_channels(machine, here / "channels"),
        monitor=monitor if monitor is not None and 0 <= monitor < _MONITOR_IDS else None,
        ring_out=ring_out,
        ring_in=ring_in,
        numa_node=numa if numa is not None and numa >= 0 else None,
        isolation=isolation(driver),
        problems=files.problems,
    )


def isolation(driver: str | None) -> Isolation | None:
    """What a driver of VMBus means for this machine's memory: there is no IOMMU in front of a VMBus device."""
    if driver is None:
        return None
    return Isolation.UNSAFE if driver == UIO_DRIVER else Isolation.KERNEL


def parse_guid(text: str) -> str | None:
    """A GUID with or without braces in small letters, without them; None for anything else."""
    found = _GUID.fullmatch(text)
    return found[1].lower() if found else None


class _Files:
    """A device's attributes, and what is wrong with them."""

    def __init__(self, machine: Machine, here: Path) -> None:
        self._machine = machine
        self._here = here
        self.problems: dict[str, str] = {}

    def guid(self, name: str) -> str | None:
        text = self._text(name)
        guid = parse_guid(text) if text is not None else None
        if text is not None and guid is None:
            self.problems[name] = f"no GUID: {text[:40]!r}"
        return guid

    def number(self, name: str) -> int | None:
        text = self._text(name)
        value = number(text)
        if text is not None and value is None:
            self.problems[name] = f"no number: {text[:40]!r}"
        return value

    def _text(self, name: str) -> str | None:
        found = self._machine.find(self._here / name)
        if found.problem is not None and not (found.problem == MISSING and name in _OPTIONAL):
            self.problems[name] = found.problem
        return found.text


def _channels(machine: Machine, here: Path) -> tuple[SysfsChannel, ...]:
    """Kernels before 4.15 have no such folder. Its entries are named by relid."""
    relids = sorted(relid for name in machine.names(here) if (relid := number(name)) is not None and relid >= 0)
    return tuple(_channel(machine, here / str(relid), relid) for relid in relids[:_MOST_CHANNELS])


def _channel(machine: Machine, here: Path, relid: int) -> SysfsChannel:
    out_mask, in_mask = machine.number(here / "out_mask"), machine.number(here / "in_mask")
    monitor = machine.number(here / "monitor_id")
    return SysfsChannel(
        relid=relid,
        index=machine.number(here / "subchannel_id"),
        cpu=machine.number(here / "cpu"),
        out_masked=None if out_mask is None else out_mask != 0,
        in_masked=None if in_mask is None else in_mask != 0,
        read_bytes=machine.number(here / "read_avail"),
        write_bytes=machine.number(here / "write_avail"),
        interrupts=machine.number(here / "interrupts"),
        signals=machine.number(here / "events"),
        monitor=monitor if monitor is not None and 0 <= monitor < _MONITOR_IDS else None,
        ring_file="ring" in machine.names(here),
    )


def _mapped_rings(machine: Machine, here: Path, uio: tuple[str, ...]) -> tuple[int, int] | None:
    """Of uio_hv_generic: map 0 is both rings, which it makes of one size."""
    for name in uio:
        maps = here / "uio" / name / "maps/map0"
        size = machine.number(maps / "size", 16)
        if machine.find(maps / "name").text == "txrx_rings" and size:
            return size // 2, size // 2
    return None


def _kernel_rings(machine: Machine, here: Path) -> tuple[int | None, int | None]:
    """sysfs tells no ring's size, but how much of it is used and how much is free."""
    return _ring(machine, here, "out"), _ring(machine, here, "in")


def _ring(machine: Machine, here: Path, way: str) -> int | None:
    """Used and free make the data area, whole pages; if not, packets came in between, and it is asked again."""
    for _ in range(4):
        used, free = (machine.number(here / f"{way}_{what}_bytes_avail") for what in ("read", "write"))
        if used is None or free is None or used < 0 or free < 0:
            return None
        if used + free and (used + free) % _PAGE == 0:
            return used + free + _PAGE
    return None


def _below(here: Path, *patterns: str) -> tuple[str, ...]:
    try:
        found = {entry.name for pattern in patterns for entry in here.glob(pattern)}
    except OSError:
        return ()
    return tuple(sorted(name for name in found if name.isprintable()))
