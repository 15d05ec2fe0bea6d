"""One client's VMBus connection at the embedded host: carries out what the control plane's host end decides.

It stands behind a PCI function (`Backend`): messages come and go through the admin ring, GPADLs are mapped out of the client's
domain, channels are opened for the VSPs that were given to this client. Runs on the host's loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from ..errors import DmaError, IsolationFault, PeerError, ProtocolError, UsageError
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE, Mapping, Piece
from ..memory.shared import side_by_side
from ..ring.pair import RingPair
from ..vfio.function import PciFunction
from ..vfio.registers import ERROR_PROTOCOL
from ..vmbus import actions as act
from ..vmbus.host import HostConnection
from ..vmbus.limits import HostLimits
from ..wire.gpa import PageRange
from ..wire.table import Side
from ..wire.vmbus import STATUS_INVALID_PARAMETER, STATUS_SUCCESS
from .vsp import ChannelContext, HostGpadl, Vsp

log = logging.getLogger("vfio_vmbus.host")

_BUDGET = 64
"""Messages taken before other clients get their turn."""
_KEPT_ERRORS = 64


@dataclass
class _Gpadl:
    relid: int
    ranges: tuple[PageRange, ...]
    pieces: list[Piece]
    access: int
    mapping: Mapping | None = None


class Connection:
    """The host's end for the client of `function`. `devices` are offered to it, in order."""

    def __init__(self, function: PciFunction, devices: list[Vsp]) -> None:
        self.function = function
        self.errors: deque[Exception] = deque(maxlen=_KEPT_ERRORS)
        """What the client did wrong, the latest last."""
        self._loop = asyncio.get_running_loop()
        self._machine = HostConnection(limits=HostLimits(target_vps=len(function.vectors.fds)))
        self._vsps: dict[int, Vsp] = {}
        self._pairs: dict[int, RingPair] = {}
        self._gpadls: dict[int, _Gpadl] = {}
        self._admin: RingPair | None = None
        self._outbox: deque[bytes] = deque()
        self._retry: asyncio.TimerHandle | None = None
        for vsp in devices:
            relid, actions = self._machine.offer(vsp.offer)
            self._vsps[relid] = vsp
            self._carry_out(actions)
        function.backend = self
        function.domain.revoke = self._revoke
        self._doorbell = function.doorbell(0)
        self._loop.add_reader(self._doorbell, self.kick)

    @property
    def open_channels(self) -> int:
        return len(self._pairs)

    def start(self, pieces: list[Piece], downstream: int) -> None:
        """The client's admin ring is at `pieces`. Raises RingError for indices that cannot be."""
        self._admin = RingPair(pieces, downstream, Side.HOST, self.function.vectors.fds[0], f"{self.function.name}, admin ring")
        self._loop.call_soon(self.kick)

    def kick(self) -> None:
        """Take what is in the admin ring, a number of messages at a time."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._doorbell)
        try:
            for _ in range(_BUDGET):
                if self._admin is None or not self._flush():
                    return
                packet = self._admin.incoming.receive()
                if packet is None:
                    if not self._admin.incoming.unmask():
                        return
                    continue
                self._carry_out(self._machine.receive(packet.payload))
        except PeerError as error:
            self._fail(error)
            return
        self._loop.call_soon(self.kick)

    def stop(self) -> None:
        """Let go of everything of the client's: channels, GPADLs, the admin ring."""
        self._carry_out(self._machine.reset())
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        self._outbox.clear()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def rescind(self, vsp: Vsp) -> None:
        """Take a device away from the client. Raises UsageError when it has none such."""
        relid = next((relid for relid, mine in self._vsps.items() if mine is vsp), None)
        if relid is None:
            raise UsageError(f"{self.function.name} was not offered this device")
        self._carry_out(self._machine.rescind(relid))

    def close(self) -> None:
        """The client's place at the host goes away."""
        self._loop.remove_reader(self._doorbell)
        self.stop()
        self._carry_out(self._machine.close())
        self.function.backend = None

    def _fail(self, error: Exception) -> None:
        self._note(error)
        self.function.fail(ERROR_PROTOCOL)

    def _note(self, error: Exception) -> None:
        self.errors.append(error)
        log.warning("%s: %s", self.function.name, error)

    def _flush(self) -> bool:
        """Send what waits. False while the client's ring is full: then later."""
        while self._outbox and self._admin is not None:
            if not self._admin.outgoing.send(self._outbox[0]):
                if self._retry is None:
                    self._retry = self._loop.call_later(0.001, self._try_again)
                return False
            self._outbox.popleft()
        return True

    def _try_again(self) -> None:
        self._retry = None
        self.kick()

    def _carry_out(self, actions: list[act.HostAction]) -> None:
        """Do what the state machine asks, in order; its answers to that come next."""
        todo = deque(actions)
        while todo:
            todo.extendleft(reversed(self._do(todo.popleft())))

    def _do(self, action: act.HostAction) -> list[act.HostAction]:
        match action:
            case act.Send(data=data):
                self._outbox.append(data)
                self._flush()
            case act.GpadlCreate(handle=handle, relid=relid, ranges=ranges):
                return self._machine.gpadl_created(handle, self._create_gpadl(handle, relid, ranges))
            case act.GpadlTeardown(handle=handle, relid=relid):
                self._drop_gpadl(handle, relid)
                return self._machine.gpadl_torn_down(handle)
            case act.ChannelOpen(relid=relid):
                return self._machine.channel_opened(relid, self._open(action))
            case act.ChannelClose(relid=relid):
                self._close_channel(relid)
                return self._machine.channel_closed(relid)
            case act.ChannelModify(relid=relid, target_vp=vector):
                self._pairs[relid].lead_to(self.function.vectors.fds[vector])
            case act.RelidReleased(relid=relid):
                self._vsps.pop(relid, None)
            case act.Refused(reason=reason):
                self._note(ProtocolError(reason))
            case act.Disconnected():
                pass
        return []

    def _create_gpadl(self, handle: int, relid: int, ranges: tuple[PageRange, ...]) -> int:
        """Look the pages up and keep them as pieces of the client's files; they are mapped when first used. An NTSTATUS."""
        pieces: list[Piece] = []
        access = READ | WRITE
        try:
            for pages in ranges:
                if pages.byte_offset or pages.byte_count % PAGE:
                    raise ProtocolError(
                        f"GPADL {handle:#x}: {pages.byte_count} bytes at offset {pages.byte_offset}: take whole pages"
                    )
                for iova, size in _runs(pages.pfns):
                    access &= self.function.domain.access(iova, size)
                    pieces += self.function.domain.pieces(iova, size, access or READ)
        except (IsolationFault, ProtocolError) as error:
            self._note(error)
            return STATUS_INVALID_PARAMETER
        self._gpadls[handle] = _Gpadl(relid, ranges, pieces, access)
        return STATUS_SUCCESS

    def _gpadl_of(self, relid: int, handle: int) -> HostGpadl:
        gpadl = self._gpadls.get(handle)
        if gpadl is None or gpadl.relid != relid:
            raise ProtocolError(f"GPADL {handle:#x} is none of channel {relid}")
        if gpadl.mapping is None:
            gpadl.mapping = side_by_side(gpadl.pieces)
        return HostGpadl(handle, gpadl.mapping, gpadl.access)

    def _drop_gpadl(self, handle: int, relid: int) -> None:
        gpadl = self._gpadls.pop(handle, None)
        if gpadl is not None and gpadl.mapping is not None:
            if relid in self._vsps:
                self._vsps[relid].gpadl_gone(handle)
            gpadl.mapping.close()

    def _open(self, action: act.ChannelOpen) -> int:
        gpadl = self._gpadls[action.ring_gpadl]
        if gpadl.access != READ | WRITE:
            self._note(ProtocolError(f"channel {action.relid}: its rings are not mapped for reading and writing"))
            return STATUS_INVALID_PARAMETER
        vectors = self.function.vectors.fds
        interrupt = -1 if action.target_vp is None else vectors[action.target_vp]
        name = f"{self.function.name}, channel {action.relid}"
        try:
            doorbell = self.function.doorbell(action.relid)
            pair = RingPair(gpadl.pieces, action.downstream_page_offset * PAGE, Side.HOST, interrupt, name)
        except (PeerError, DmaError, UsageError) as error:
            self._note(error)
            return STATUS_INVALID_PARAMETER
        self._pairs[action.relid] = pair
        context = ChannelContext(
            relid=action.relid,
            pair=pair,
            domain=self.function.domain,
            doorbell=doorbell,
            gpadl=lambda handle: self._gpadl_of(action.relid, handle),
            failed=self._note,
        )
        self._vsps[action.relid].open(context)
        return STATUS_SUCCESS

    def _close_channel(self, relid: int) -> None:
        if relid in self._vsps:
            self._vsps[relid].close()
        self._pairs.pop(relid).close()

    def _revoke(self, iova: int, size: int) -> None:
        """The client takes memory away. What uses it ends first, as an IOMMU would fault it."""
        end = iova + size
        for handle, gpadl in self._gpadls.items():
            pfns = [pfn for pages in gpadl.ranges for pfn in pages.pfns]
            if any(iova <= pfn * PAGE < end for pfn in pfns):
                self._fail(ProtocolError(f"[{iova:#x}, {end:#x}) was unmapped while GPADL {handle:#x} used it"))
                return


def _runs(pfns: tuple[int, ...]) -> list[tuple[int, int]]:
    """Page numbers as runs of neighbours: (IOVA, bytes)."""
    runs: list[tuple[int, int]] = []
    for pfn in pfns:
        if runs and runs[-1][0] + runs[-1][1] == pfn * PAGE:
            runs[-1] = (runs[-1][0], runs[-1][1] + PAGE)
        else:
            runs.append((pfn * PAGE, PAGE))
    return runs
