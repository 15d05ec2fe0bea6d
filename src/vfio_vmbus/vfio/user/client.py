"""`UserDevice`: a device that a vfio-user server shows on a Unix socket.

    with UserDevice("/run/nic.sock") as device: ...

Works with this project's server and with foreign ones (libvfio-user's, QEMU's protocol as of 10.2, rust-vmm's). The server is not trusted:
every reply is checked, every wait ends, and what it sends is used only where it can do no harm. In particular a region is mapped only
if its file is a sealed memfd: any other file may shrink, stall or fault under whoever touches the mapping (SIGBUS). Regions of other
files are read and written by messages, as all regions can be.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from errno import EBUSY, EINVAL
from functools import partial
from typing import Any, Final, NoReturn, TypeVar, cast

from ...errors import DmaError, ProtocolError, RefusedError, UnavailableError, UsageError, VfioVmbusError
from ...iommu.translation import READ, WRITE
from ...memory.mapping import PAGE, Mapping, Piece
from ...memory.shared import require_sealed, side_by_side
from ...wire import vfio
from ...wire import vfio_user as wire
from ...wire.vfio_user_version import Capabilities, decode_version, encode_version
from .. import eventfd
from ..device import IRQ_MASKABLE, REGION_MMAP, REGION_READ, REGION_WRITE, Device, DeviceInfo, Dma, Irq, Region
from .client_core import MAX_DATA, ClientCore
from .client_link import MAX_TIMEOUT, Link
from .client_memory import ClientMemory
from .client_regions import ASK_ARGSZ, MAX_IO_FDS, RegionView, needed_argsz, parse_io_fds, parse_region
from .client_socket import connect

MAX_INDEXES: Final = 512
"""Regions, or kinds of interrupts, of one device. (QEMU takes 100 and 50.)"""
LEAST_DATA: Final = 8
"""A server that takes less at a time cannot be asked for a 64-bit register."""
_LAST_ADDRESS: Final = (1 << 64) - 1
_OWN: Final = Capabilities(max_msg_fds=MAX_IO_FDS, max_data_xfer_size=MAX_DATA)

T = TypeVar("T")


class UserDevice(Device):
    """The device behind `where`: a socket's path, or a connected socket, which is the device's own from then on.

    timeout: seconds that each reply may take. A server that is silent for longer, or breaks the protocol, is not talked to any more: this
    call raises WaitTimeout or ProtocolError, later ones ClosedError with that reason. Any thread may call anything.

    Raises UnavailableError when nobody listens there, RefusedError when the server does not want us, and the above.
    """

    def __init__(self, where: str | os.PathLike[str] | socket.socket, *, timeout: float = 5.0) -> None:
        if not 0 < timeout <= MAX_TIMEOUT:
            raise UsageError(f"a timeout of {timeout} s: take more than 0, up to {MAX_TIMEOUT:g}")
        if isinstance(where, socket.socket) and (where.family, where.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise UsageError(f"{where.family.name} {where.type.name}: take a Unix stream socket")
        sock = where if isinstance(where, socket.socket) else connect(where, timeout)
        name = "vfio-user" if isinstance(where, socket.socket) else f"unix:{os.fspath(where)}"
        self._memory = ClientMemory(name)
        self.core = ClientCore(self._memory)
        self._stack = ExitStack()
        self._stack.callback(self._memory.clear)
        self._link = Link(sock, name, self.core, timeout)
        self._stack.callback(self._link.close)
        self._regions: dict[int, _UserRegion] = {}
        self._irqs: dict[int, _UserIrq] = {}
        try:
            self.capabilities = _greet(self._link)
            self.info = self._get_info(name)
        except BaseException:
            self._stack.close()
            raise
        self.dma = _UserDma(self._link, self._memory, self.capabilities)

    @property
    def timeout(self) -> float:
        """Seconds that each reply may take; may be set."""
        return self._link.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._link.timeout = seconds

    def region(self, index: int) -> Region:
        """Raises UsageError for a region that is not there, and what the server's answer may raise when it is asked first."""
        with self._link.lock:
            if index not in self._regions:
                self._regions[index] = self._get_region(index)
            return self._regions[index]

    def irq(self, index: int) -> Irq:
        """Raises UsageError for a kind of interrupt that is not there, and what the server's answer may raise when it is asked first."""
        with self._link.lock:
            if index not in self._irqs:
                self._irqs[index] = self._get_irq(index)
            return self._irqs[index]

    def reset(self) -> None:
        if not self.info.resettable:
            raise UnavailableError(f"{self.info.name} cannot be reset")
        self._link.ask(wire.DEVICE_RESET, parse=partial(_structure, wire.DEVICE_RESET))

    def close(self) -> None:
        """Reset the device, say goodbye, and wait until the server has done so too, for the timeout at most."""
        with suppress(VfioVmbusError):
            if self.info.resettable:
                self.reset()
        self._stack.close()

    def _get_info(self, name: str) -> DeviceInfo:
        def parse(payload: bytes, fds: Sequence[int]) -> DeviceInfo:
            value = _structure(wire.DEVICE_GET_INFO, payload)
            for what, count in (("regions", value.region_count), ("kinds of interrupts", value.irq_count)):
                if count > MAX_INDEXES:
                    raise ProtocolError(f"{name}: {count} {what}, limit {MAX_INDEXES}")
            resettable = bool(value.flags & vfio.DEVICE_RESET)
            pci = bool(value.flags & vfio.DEVICE_PCI)
            return DeviceInfo(name, value.region_count, value.irq_count, resettable, isolation="vfio-user server", pci=pci)

        return self._link.ask(wire.DEVICE_GET_INFO, wire.DeviceInfo().pack(), parse=parse)

    def _get_region(self, index: int) -> _UserRegion:
        if not 0 <= index < self.info.regions:
            raise UsageError(f"region {index}: {self.info.name} has {self.info.regions}")
        parse = partial(parse_region, index)
        view, file = _ask_growing(self._link, wire.DEVICE_GET_REGION_INFO, vfio.RegionInfo(argsz=ASK_ARGSZ, index=index), parse)
        if file is not None:
            self._stack.callback(os.close, file)
        if not view.size:
            raise UsageError(f"region {index} of {self.info.name} is empty")
        return _UserRegion(self._link, view, file, min(self.capabilities.max_data_xfer_size, MAX_DATA), self._stack)

    def _get_irq(self, index: int) -> _UserIrq:
        if not 0 <= index < self.info.irqs:
            raise UsageError(f"interrupt index {index}: {self.info.name} has {self.info.irqs}")

        def parse(payload: bytes, fds: Sequence[int]) -> vfio.IrqInfo:
            value: vfio.IrqInfo = _structure(wire.DEVICE_GET_IRQ_INFO, payload)
            if value.index != index:
                raise ProtocolError(f"{self.info.name}: interrupts of index {value.index}, need {index}")
            return value

        value = self._link.ask(wire.DEVICE_GET_IRQ_INFO, vfio.IrqInfo(index=index).pack(), parse=parse)
        if not value.count:
            raise UsageError(f"{self.info.name} has no interrupts of index {index}")
        return _UserIrq(self._link, value, self.capabilities.max_msg_fds)


class _UserRegion(Region):
    def __init__(self, link: Link, view: RegionView, file: int | None, step: int, stack: ExitStack) -> None:
        self.index = view.index
        self.size = view.size
        self.flags = view.flags | (REGION_MMAP if file is not None else 0)
        self.areas = view.areas if file is not None else ()
        self.view = view
        self._link = link
        self._file = file
        self._step = step
        self._stack = stack
        self._doorbells: dict[int, int] | None = None

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or not 0 < size <= self.size - offset or not self.flags & REGION_READ:
            self._refuse(offset, size, REGION_READ)
        try:
            if size <= self._step:
                return self._link.read(self.index, offset, size)
            steps = range(offset, offset + size, self._step)
            return b"".join(self._link.read(self.index, at, min(self._step, offset + size - at)) for at in steps)
        except RefusedError as error:
            if error.status == EINVAL:
                raise UsageError(str(error)) from error
            raise

    def write(self, offset: int, data: bytes) -> None:
        if offset < 0 or not 0 < len(data) <= self.size - offset or not self.flags & REGION_WRITE:
            self._refuse(offset, len(data), REGION_WRITE)
        try:
            for at in range(0, len(data), self._step):
                self._link.write(self.index, offset + at, data[at : at + self._step])
        except RefusedError as error:
            if error.status == EINVAL:
                raise UsageError(str(error)) from error
            raise

    def map(self, offset: int, size: int, *, wrap_from: int | None = None) -> Mapping:
        fits = any(start <= offset and offset + size <= start + length for start, length in self.areas)
        if self._file is None or not fits or size <= 0 or (offset | size) % PAGE:
            raise UsageError(f"{size:#x} bytes at {offset:#x} of region {self.index} cannot be mapped: {self._areas_text()}")
        with self._link.lock:
            self._link.check()
            piece = Piece(self._file, self.view.base + offset, size, bool(self.flags & REGION_WRITE))
            return side_by_side([piece], wrap_from=wrap_from)

    def doorbell(self, offset: int) -> int:
        """Raises UnavailableError when the server has no eventfds for this region, UsageError when it has some, but none for `offset`."""
        with self._link.lock:
            self._link.check()
            if self._doorbells is None:
                self._doorbells = self._get_doorbells()
            if not self._doorbells:
                raise UnavailableError(f"{self._link.name} has no eventfds for region {self.index}: write the register instead")
            if offset not in self._doorbells:
                raise UsageError(f"no doorbell register at {offset:#x} of region {self.index}")
            return self._doorbells[offset]

    def _refuse(self, offset: int, size: int, right: int) -> NoReturn:
        if not self.flags & right:
            raise UsageError(f"region {self.index} cannot be {'read' if right == REGION_READ else 'written'}")
        raise UsageError(f"{size} bytes at {offset:#x} of region {self.index}, which has {self.size:#x}")

    def _areas_text(self) -> str:
        return ", ".join(f"[{start:#x}, {start + length:#x})" for start, length in self.areas) or "no part of it can"

    def _get_doorbells(self) -> dict[int, int]:
        """Ask for the region's eventfds, and keep those that are some."""
        request = wire.RegionIoFds(argsz=wire.RegionIoFds.SIZE + MAX_IO_FDS * wire.SubRegion.SIZE, index=self.index)
        try:
            places = _ask_growing(self._link, wire.DEVICE_GET_REGION_IO_FDS, request, partial(parse_io_fds, self.view))
        except RefusedError:
            return {}
        for fd in set(places.values()):
            self._stack.callback(os.close, fd)
        return places


class _UserIrq(Irq):
    def __init__(self, link: Link, info: vfio.IrqInfo, max_fds: int) -> None:
        self.index = info.index
        self.count = info.count
        self.flags = info.flags
        self._link = link
        self._max_fds = max_fds

    def enable(self, vector: int, eventfd_: int) -> None:
        self._check(vector)
        if not eventfd.is_eventfd(eventfd_):
            raise UsageError(f"descriptor {eventfd_} is not an eventfd")
        if not self._max_fds:
            raise UnavailableError(f"{self._link.name} takes no descriptors, so it cannot interrupt")
        self._set(vector, vfio.SET_DATA_EVENTFD | vfio.SET_ACTION_TRIGGER, (eventfd_,))

    def disable(self, vector: int) -> None:
        self._check(vector)
        self._set(vector, vfio.SET_DATA_EVENTFD | vfio.SET_ACTION_TRIGGER)

    def mask(self, vector: int) -> None:
        self._check_maskable(vector)
        self._set(vector, vfio.SET_DATA_NONE | vfio.SET_ACTION_MASK)

    def unmask(self, vector: int) -> None:
        self._check_maskable(vector)
        self._set(vector, vfio.SET_DATA_NONE | vfio.SET_ACTION_UNMASK)

    def _check(self, vector: int) -> None:
        if not 0 <= vector < self.count:
            raise UsageError(f"vector {vector} of interrupt index {self.index}: there are {self.count}")

    def _check_maskable(self, vector: int) -> None:
        self._check(vector)
        if not self.flags & IRQ_MASKABLE:
            super().mask(vector)

    def _set(self, vector: int, flags: int, fds: tuple[int, ...] = ()) -> None:
        value = vfio.IrqSet(flags=flags, index=self.index, start=vector, count=1)
        try:
            self._link.ask(wire.DEVICE_SET_IRQS, value.pack(), fds, parse=partial(_structure, wire.DEVICE_SET_IRQS))
        except RefusedError as error:
            if error.status == EINVAL:
                raise UsageError(str(error)) from error
            raise


class _UserDma(Dma):
    def __init__(self, link: Link, memory: ClientMemory, peer: Capabilities) -> None:
        self._link = link
        self._memory = memory
        self._peer = peer
        self._page = max(PAGE, peer.pgsizes & -peer.pgsizes)

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        self._check_range(iova, size)
        if access not in (READ, WRITE, READ | WRITE):
            raise DmaError(f"access {access:#x}: take READ ({READ}), WRITE ({WRITE}) or both")
        if offset < 0 or offset % PAGE:
            raise DmaError(f"file offset {offset:#x} is not a multiple of {PAGE}")
        with self._link.lock:
            self._link.check()
            if (length := require_sealed(fd)) < offset + size:
                raise DmaError(f"{size} bytes at {offset} are outside memory of {length} bytes")
            if len(self._memory) >= self._peer.max_dma_maps:
                raise DmaError(
                    f"there are {len(self._memory)} maps, limit {self._peer.max_dma_maps} of this server: map larger pieces"
                )
            entry = self._memory.add(iova, size, fd, offset, access)
            try:
                self._link.attend()
                value = wire.DmaMap(flags=access, offset=offset, iova=iova, size=size)
                fds = (fd,) if self._peer.max_msg_fds else ()
                self._link.ask(wire.DMA_MAP, value.pack(), fds, parse=partial(_structure, wire.DMA_MAP))
            except RefusedError as error:
                self._memory.remove(entry)
                raise DmaError(f"[{iova:#x}, {iova + size:#x}): {error}") from error

    def unmap(self, iova: int, size: int) -> None:
        """Each map within is taken back by a command of its own: servers differ in what they take of several."""
        self._check_range(iova, size)
        with self._link.lock:
            self._link.check()
            for entry in self._memory.within(iova, size):
                value = wire.DmaUnmap(iova=entry.iova, size=entry.end - entry.iova)
                try:
                    self._link.ask(wire.DMA_UNMAP, value.pack(), parse=partial(_check_unmapped, value))
                except RefusedError as error:
                    raise DmaError(f"[{entry.iova:#x}, {entry.end:#x}): {error}") from error
                self._memory.remove(entry)

    def _check_range(self, iova: int, size: int) -> None:
        if iova < 0 or size <= 0 or (iova | size) % self._page or iova + size - 1 > _LAST_ADDRESS:
            raise DmaError(f"[{iova:#x}, {iova + size:#x}): take multiples of {self._page} bytes below {_LAST_ADDRESS + 1:#x}")


def _structure(number: int, payload: bytes, fds: Sequence[int] = ()) -> Any:
    """The structure of a reply, checked for its length."""
    return wire.parse_reply(number, payload)[0]


def _check_unmapped(asked: wire.DmaUnmap, payload: bytes, fds: Sequence[int]) -> None:
    value = _structure(wire.DMA_UNMAP, payload)
    if (value.iova, value.size) != (asked.iova, asked.size):
        raise ProtocolError(f"{value.size:#x} bytes at {value.iova:#x} were unmapped, need {asked.size:#x} at {asked.iova:#x}")


def _greet(link: Link) -> Capabilities:
    """VERSION: what the server can do. Any minor version will do: what matters is in the capabilities."""

    def parse(payload: bytes, fds: Sequence[int]) -> Capabilities:
        version, capabilities = decode_version(payload)
        if version.major != wire.MAJOR_VERSION:
            raise ProtocolError(f"{link.name}: vfio-user version {version.major}.{version.minor}, need {wire.MAJOR_VERSION}")
        if capabilities.max_data_xfer_size < LEAST_DATA:
            raise ProtocolError(f"{link.name}: max_data_xfer_size is {capabilities.max_data_xfer_size} bytes, need {LEAST_DATA}")
        return capabilities

    try:
        return link.ask(wire.VERSION, encode_version(wire.Version(), _OWN), parse=parse)
    except RefusedError as error:
        if error.status == EBUSY:
            raise RefusedError(f"{link.name}: somebody else has this device: wait for its end (EBUSY)", EBUSY) from error
        raise


def _ask_growing(
    link: Link, number: int, request: vfio.RegionInfo | wire.RegionIoFds, parse: Callable[[bytes, Sequence[int]], T]
) -> T:
    """Ask with the argsz that the server needs, and take the descriptors that come."""

    def parse_or_grow(payload: bytes, fds: Sequence[int]) -> tuple[int, T | None]:
        head: vfio.RegionInfo | wire.RegionIoFds = _structure(number, payload)
        more = needed_argsz(wire.COMMANDS[number].name, head.argsz, request.argsz)
        return more, None if more else parse(payload, fds)

    more, answer = link.ask(number, request.pack(), parse=parse_or_grow, takes_fds=True)
    if more:
        request = replace(request, argsz=more)
        more, answer = link.ask(number, request.pack(), parse=parse_or_grow, takes_fds=True)
    if more:
        raise UnavailableError(f"{link.name}: the reply to {wire.COMMANDS[number].name} has no end")
    return cast(T, answer)
