"""A `VmbusDevice` over the kernel's uio_hv_generic: rings, buffers and connection are the kernel's, and the host is a real one.

Unsafe by nature: a driver names page frames to the host, which reaches all memory of the guest, and nothing checks them. The way in
is `policy.allow_unsafe`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, TypeVar
from uuid import UUID

from ..channel.connection import quietly
from ..channel.device import WRITE, Channel, DmaBuffer, SharedBuffer, VmbusDevice
from ..errors import RefusedError, RescindedError, UnavailableError, UsageError
from ..iommu.physical import PhysicalBuffer
from ..memory.mapping import Mapping, Piece
from . import vmbus
from .appear import wait_for
from .policy import UnsafeUse, allow_unsafe
from .uio import RECEIVE, SEND, UioMap, UioNode
from .uio_channel import UioChannel, open_node

MAX_RING_WAIT: Final = 5.0
"""Seconds that the ring file of a subchannel may take."""

PartT = TypeVar("PartT", UioChannel, "UioBuffer", PhysicalBuffer)


class UioBuffer(SharedBuffer):
    """A buffer that the kernel has shared with the host. It has an opening of its own: a mapping of a node keeps that open."""

    def __init__(self, node: UioNode, area: UioMap) -> None:
        if area.handle is None:
            raise RefusedError(f"{node.name}: map {area.index} ({area.name}) says no GPADL handle")
        with ExitStack() as stack:
            file = open_node(node, alone=False)
            stack.callback(os.close, file)
            try:
                self._mapping = stack.enter_context(Mapping([Piece(file, area.start, area.size)], vanishes=True))
            except OSError as error:
                raise UnavailableError(f"{node.name}: map {area.index} ({area.name}) cannot be mapped: {error}") from error
            self._resources = stack.pop_all()
        self.handle = area.handle
        self.address = self._mapping.address
        self.size = area.size
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self._resources.close()


class UioDevice(VmbusDevice):
    """The device at `node` (`uio.find`). unsafe: was `policy.SWITCH` given?

    Its channel is opened by the kernel when `open` opens the node, with rings as long as the kernel made them and empty. Each time
    begins anew. One process at a time has it. Raises UnsafeError before anything is touched, UnavailableError for a device without
    GUIDs.
    """

    def __init__(self, node: UioNode, *, unsafe: bool = False, closed: Callable[[], None] = lambda: None) -> None:
        device = node.device
        if device.class_guid is None or device.instance is None or device.relid is None:
            raise UnavailableError(f"{device.name} is not described as a VMBus device should be: {device.problems or 'no id'}")
        shown = f" {', '.join(device.networks)}" if device.networks else ""
        self.use: UnsafeUse = allow_unsafe(
            f"{vmbus.UIO_DRIVER} of {device.kind}{shown} {device.instance} ({node.name})", enabled=unsafe, machine=node.machine
        )
        self.node = node
        self.class_guid = UUID(device.class_guid)
        self.instance_guid = UUID(device.instance)
        self.name = f"vmbus:{device.instance} ({device.kind}, {node.name})"
        self.isolation = ""
        self._relid = device.relid
        self._monitor = device.monitor
        self._closed = closed
        self._parts: list[UioChannel | UioBuffer | PhysicalBuffer] = []
        self._channel: UioChannel | None = None

    def open(self, ring_pages: int, user_data: bytes = b"") -> Channel:
        """As of VmbusDevice; the kernel has chosen the rings' size, and passes no user data.

        Raises RefusedError, RescindedError, UnavailableError when another process has it, UsageError while it is open here, or something
        of before is.
        """
        if user_data:
            raise UsageError(f"{self.name}: {len(user_data)} bytes for the channel's opening: uio_hv_generic passes none")
        self._parts = [part for part in self._parts if not part.closed]
        held = [type(part).__name__ for part in self._parts if not isinstance(part, PhysicalBuffer)]
        if held:
            raise UsageError(f"{self.name} is open already: {', '.join(held)}")
        self._channel = self._keep(UioChannel(self.node, self._relid, self._monitor, primary=True))
        return self._channel

    def subchannels(self) -> tuple[int, ...]:
        """Numbers of the further channels that the host has offered by now. The kernel opens them."""
        return tuple(each.relid for each in vmbus.look(self.node.device.name, self.node.machine).channels if each.index)

    def open_subchannel(self, relid: int, seconds: float = MAX_RING_WAIT) -> Channel:
        """A further channel, whose ring file may take a while to appear. Raises WaitTimeout when it does not, UsageError for none such."""
        if self._channel is None or self._channel.closed:
            raise UsageError(f"{self.name}: open the primary channel first")
        file = self.node.ring_file(relid)
        wait_for(lambda: True if file.exists() else None, file.parent, f"{file} to appear", seconds)
        found = vmbus.look(self.node.device.name, self.node.machine)
        monitor = next((each.monitor for each in found.channels if each.relid == relid), None)
        return self._keep(UioChannel(self.node, relid, monitor, primary=False))

    def share(self, size: int, access: int, name: str) -> SharedBuffer:
        """The receive buffer where `access` has WRITE, else the send buffer, whole, whatever `size` is asked for.

        Raises RefusedError when the kernel has made none (newer ones than 6.12 do for network cards only), or it is in use,
        UsageError before `open`.
        """
        if size <= 0:
            raise UsageError(f"{name} of {size} bytes: take one at least")
        if self._channel is None or self._channel.closed:
            raise UsageError(f"{self.name}: open its channel before {name} is shared")
        kind = RECEIVE if access & WRITE else SEND
        area = self.node.maps.get(kind)
        if area is None:
            raise RefusedError(f"{self.name} has no buffer for {name}")
        if any(isinstance(part, UioBuffer) and part.handle == area.handle and not part.closed for part in self._parts):
            raise RefusedError(f"{self.name} has one buffer for {name}, and it is in use")
        return self._keep(UioBuffer(self.node, area))

    def dma_buffer(self, size: int, access: int, name: str) -> DmaBuffer:
        """Pinned memory whose page frames the host is told. Raises DmaError without CAP_SYS_ADMIN, or when there is none."""
        return self._keep(PhysicalBuffer(size, access, name))

    @property
    def rescinded(self) -> bool:
        if self._channel is not None and not self._channel.closed:
            return self._channel.gone
        return not self.node.present

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._closed)
            for part in sorted(self._parts, key=_order):  # what is put there last goes first
                stack.callback(quietly, part.close)
            self._parts = []

    def _keep(self, part: PartT) -> PartT:
        if not self.node.present:
            part.close()
            raise RescindedError(f"{self.name} was taken away by its host, or another driver has it")
        self._parts = [other for other in self._parts if not other.closed]
        self._parts.append(part)
        return part


def _order(part: UioChannel | UioBuffer | PhysicalBuffer) -> int:
    """The channel must be closed before the memory that the host was told of is anybody else's."""
    return (PhysicalBuffer, UioBuffer, UioChannel).index(type(part))
