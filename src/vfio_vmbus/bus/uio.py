"""A VMBus device that uio_hv_generic has: its node in /dev, and what of it can be mapped.

Source: drivers/uio/uio_hv_generic.c and drivers/uio/uio.c of Linux 6.12, Documentation/driver-api/uio-howto.rst. Map 0 is both rings of the
primary channel; the receive and send buffer's GPADL handles stand in the names of maps 3 and 4 ("recv:7"), and newer kernels
make these two for network cards alone.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import UnavailableError, UsageError
from ..memory.mapping import Piece
from . import vmbus
from .appear import wait_for
from .machine import Machine
from .vmbus import UIO_DRIVER, SysfsDevice

RINGS: Final = "txrx_rings"
MONITOR_PAGE: Final = "monitor_page"
RECEIVE: Final = "recv"
SEND: Final = "send"
MAX_MAPS: Final = 5
MAX_MAP_BYTES: Final = 1 << 30
_FORMS: Final = "take an instance GUID, the name of a VMBus device or a network interface of it, or uioN"


@dataclass(frozen=True)
class UioMap:
    """Map `index` of a node: `size` bytes. handle: of its GPADL, None where the name has none."""

    index: int
    name: str
    size: int
    handle: int | None

    @property
    def start(self) -> int:
        """Where the node has it. It can be mapped from there only."""
        return self.index * mmap.PAGESIZE

    def part(self, file: int) -> Piece:
        """All of it, to cut pieces out of."""
        return Piece(file, 0, self.size, whole=(self.start, self.size))


@dataclass(frozen=True)
class UioNode:
    """A VMBus device and its node. `device` is as sysfs showed it when it was found."""

    name: str
    device: SysfsDevice
    machine: Machine

    @property
    def path(self) -> Path:
        return self.machine.dev / self.name

    @property
    def folder(self) -> Path:
        """Of the VMBus device, in sysfs."""
        return vmbus.folder(self.machine) / self.device.name

    @property
    def present(self) -> bool:
        """Is it still there? It goes when the host takes the device away, and when another driver gets it."""
        return (self.folder / "uio" / self.name).is_dir()

    @property
    def maps(self) -> dict[str, UioMap]:
        """By name, a handle left out. Maps that sysfs does not describe as it should are not there."""
        here = self.folder / "uio" / self.name / "maps"
        found = (self._map(here / f"map{index}", index) for index in range(MAX_MAPS))
        return {each.name: each for each in found if each is not None}

    def ring_file(self, relid: int) -> Path:
        """Where a channel's rings can be mapped, once the kernel has made it."""
        return self.folder / "channels" / str(relid) / "ring"

    def _map(self, here: Path, index: int) -> UioMap | None:
        name, size = self.machine.find(here / "name").text, self.machine.number(here / "size", 16)
        if name is None or size is None or not 0 < size <= MAX_MAP_BYTES or size % mmap.PAGESIZE:
            return None
        if self.machine.number(here / "offset", 16):
            return None  # of memory that begins within a page: no map of this driver's does
        plain, _, handle = name.partition(":")
        return UioMap(index, plain, size, int(handle) if handle.isascii() and handle.isdecimal() else None)


def find(text: str, machine: Machine = Machine(), *, wait: float = 0.0) -> UioNode:  # noqa: B008  (frozen)
    """The node of the device that is meant; "vmbus:" may stand before it. wait: seconds that it may take to appear (after a bind, or
    when a device was taken away and is offered again).

    Raises UsageError for what cannot be a name, UnavailableError where there is no such device, or another driver has it.
    """
    wanted = text.removeprefix("vmbus:")
    if not wanted or "/" in wanted or wanted in (".", "..") or not wanted.isprintable():
        raise UsageError(f"{text!r} is no device: {_FORMS}")
    if wait > 0:
        near = vmbus.folder(machine)
        wait_for(lambda: _node(_look(wanted, machine), machine), near, f"{wanted} to be there, with {UIO_DRIVER}", wait)
    device = _look(wanted, machine)
    node = _node(device, machine)
    if device is not None and node is not None:
        return node
    if not vmbus.present(machine):
        raise UnavailableError("this machine has no VMBus: it is no Hyper-V guest, or its kernel has no hv_vmbus")
    if device is None:
        raise UnavailableError(f"no VMBus device {wanted}: {_FORMS}; vfio-vmbus list shows what is there")
    if device.driver != UIO_DRIVER:
        has = f"{device.driver} drives it" if device.driver else "nobody drives it"
        raise UnavailableError(f"{wanted} ({device.kind}): {has}: vfio-vmbus bind {device.name} --driver {UIO_DRIVER} first")
    raise UnavailableError(f"{wanted} ({device.kind}) has no node in {machine.dev}: the uio module is missing, or udev hides it")


def _look(wanted: str, machine: Machine) -> SysfsDevice | None:
    guid = vmbus.parse_guid(wanted)
    for device in vmbus.devices(machine):
        if wanted in (device.name, *device.uio, *device.networks) or (guid is not None and device.instance == guid):
            return device
    return None


def _node(device: SysfsDevice | None, machine: Machine) -> UioNode | None:
    if device is None or device.driver != UIO_DRIVER or not device.uio:
        return None
    node = UioNode(device.uio[0], device, machine)
    return node if node.path.exists() else None
