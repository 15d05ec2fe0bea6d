"""Opens a device's channel on behalf of a client that gets it ready-made: what stands behind a `VmbusFunction`.

No VMBus messages are exchanged: the VSP gets the channel as if a guest had opened it, over memory that is the host's own. What lies in
that memory is the client's all the same, at any time, so that nothing about the VSP's checks is different. Runs on the host's loop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack

from ..errors import ProtocolError, RefusedError, UsageError
from ..iommu.domain import Domain
from ..iommu.translation import READ, WRITE
from ..memory.mapping import Piece
from ..memory.shared import side_by_side
from ..ring.pair import RingPair
from ..vfio.vmbus_function import OpenedMemory, VmbusFunction
from ..wire.table import Side
from .faults.fate import Desk
from .faults.relay import Relay, relay
from .vsp import ChannelContext, HostGpadl, Vsp, guarded

log = logging.getLogger("vfio_vmbus.host")

KEPT_ERRORS = 64
_RELID = 0
"""The number that the only channel goes by here."""


class Opener:
    """The host's end for the client of `function`, which gets `vsp`."""

    def __init__(self, function: VmbusFunction, vsp: Vsp, faults: Desk | None = None) -> None:
        self.function = function
        self._faults = faults
        self.errors: deque[Exception] = deque(maxlen=KEPT_ERRORS)
        """What the client did wrong, the latest last."""
        self.error_count = 0
        self._vsp = vsp
        self._offered = True
        self._buffers: dict[int, HostGpadl] = {}
        self._resources: ExitStack | None = None
        """What the open channel's memory is mapped by."""
        self._relay: Relay | None = None
        function.backend = self

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def version(self) -> int | None:
        """No version of VMBus is spoken."""
        return None

    @property
    def domain(self) -> Domain:
        """What the client's addresses mean."""
        return self.function.domain

    @property
    def failed(self) -> bool:
        """Is the client cut off, until it resets its device?"""
        return self.function.failed

    @property
    def open_channels(self) -> int:
        return int(self._resources is not None)

    @property
    def gpadl_sizes(self) -> list[int]:
        """Bytes of each buffer that the client shares."""
        return [gpadl.mapping.size for gpadl in self._buffers.values()]

    def has(self, vsp: Vsp) -> bool:
        """Has the client this device, or not yet let go of it?"""
        return vsp is self._vsp

    def start(self, memory: OpenedMemory, interrupt: int) -> None:
        """Open the channel. Raises RefusedError when the device does not, DmaError, OSError."""
        name = f"{self.function.name}, channel {_RELID}"
        with ExitStack() as stack:
            rings = [Piece(memory.rings.fd, 0, memory.rings.size)]
            pair = stack.enter_context(RingPair(rings, memory.sizes.upstream, Side.HOST, interrupt, name))
            stack.callback(self._buffers.clear)
            for handle, buffer, writable in memory.buffers():
                mapping = stack.enter_context(side_by_side([Piece(buffer.fd, 0, buffer.size, writable)]))
                self._buffers[handle] = HostGpadl(handle, mapping, READ | WRITE if writable else READ)
            context = ChannelContext(
                relid=_RELID,
                pair=pair,
                domain=self.function.domain,
                doorbell=memory.doorbell,
                gpadl=self._gpadl,
                failed=self._fail,
                guarded=self._guarded,
            )
            self._relay = relay(self._faults, self._vsp.name, context, interrupt) if self._faults else None
            if self._relay is not None:
                stack.callback(self._relay.close)
                context = self._relay.context
            self._resources = stack.pop_all()
        try:
            self._vsp.open(context)
        except Exception as error:
            log.exception("%s: the device did not open", name)
            self._note(error)
            self.stop()
            raise RefusedError(f"{name}: the device did not open") from error

    def stop(self) -> None:
        """Have the VSP leave the memory, then unmap it. If it cannot, that stays: better lost than pulled away from under a kernel."""
        resources, self._resources = self._resources, None
        if resources is None:
            return
        if self._relay is not None:
            self._relay.stop()
        try:
            self._vsp.close()
        except Exception as error:
            log.exception("%s: defect of the host: memory stays mapped", self.function.name)
            self._note(error)
        else:
            resources.close()

    def rescind(self, vsp: Vsp) -> None:
        """Take the device away from the client. Raises UsageError when it loses it already."""
        if not self._offered:
            raise UsageError(f"{self.function.name}: this device was taken away already")
        self._offered = False
        self.function.gone()

    def close(self) -> None:
        """The client's place at the host goes away."""
        self.stop()
        self.function.backend = None

    def _gpadl(self, handle: int) -> HostGpadl:
        if handle not in self._buffers:
            raise ProtocolError(f"GPADL {handle:#x} is none of channel {_RELID}")
        return self._buffers[handle]

    def _guarded(self, callback: Callable[[], None]) -> Callable[[], None]:
        """For callbacks of the loop: what one raises closes this client's channel. A defect of ours is logged as such."""
        return guarded(callback, self.function.name, self._fail)

    def _fail(self, error: Exception) -> None:
        self._note(error)
        self.stop()
        self.function.fail()

    def _note(self, error: Exception) -> None:
        """Keep an error, and log the first ones: a client that goes on and on must not fill the host's disk."""
        self.errors.append(error.with_traceback(None))  # which would keep everything alive that was in use there
        self.error_count += 1
        if self.error_count <= KEPT_ERRORS:
            log.warning("%s: %s", self.function.name, error)
