"""One client's VMBus connection at the embedded host: carries out what the control plane's host end decides.

It stands behind a PCI function (`Backend`): messages come and go through the admin ring, GPADLs are mapped out of the client's
domain, channels are opened for the VSPs that were given to this client. Runs on the host's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ..errors import DmaError, IsolationFault, PeerError, ProtocolError, UsageError
from ..iommu.translation import READ, WRITE
from ..memory.mapping import PAGE, Mapping, Piece, merge
from ..memory.shared import side_by_side
from ..ring.pair import RingPair
from ..vfio import eventfd
from ..vfio.function import PciFunction
from ..vfio.registers import ERROR_PROTOCOL
from ..vmbus import actions as act
from ..vmbus.host import HostConnection
from ..vmbus.limits import HostLimits
from ..wire.gpa import PageRange
from ..wire.ring import PACKET_INBAND
from ..wire.table import Side
from ..wire.vmbus import STATUS_INSUFFICIENT_RESOURCES, STATUS_INVALID_PARAMETER, STATUS_SUCCESS, STATUS_UNSUCCESSFUL
from .vsp import ChannelContext, HostGpadl, Vsp, guarded

log = logging.getLogger("vfio_vmbus.host")

_BUDGET = 64
"""Messages taken before other clients get their turn."""
KEPT_ERRORS = 64
MAX_PIECES = 16384
"""Pieces of memory that one client's rings and buffers may be mapped from, all together: Linux gives a process 65530."""


class _Memory(Protocol):
    def close(self) -> None: ...


@dataclass
class _Gpadl:
    """runs: (IOVA, bytes) of its neighbouring pages. access: what all of them are mapped for. mapping: once a VSP uses it."""

    relid: int
    runs: list[tuple[int, int]]
    pieces: list[Piece]
    access: int
    mapping: Mapping | None = None


@dataclass(frozen=True)
class _OpenChannel:
    """pieces: how many its rings are mapped from; each data area is mapped twice."""

    pair: RingPair
    pieces: int


class Connection:
    """The host's end for the client of `function`. `devices` are offered to it, in order."""

    def __init__(self, function: PciFunction, devices: list[Vsp]) -> None:
        self.function = function
        self.errors: deque[Exception] = deque(maxlen=KEPT_ERRORS)
        """What the client did wrong, the latest last."""
        self.error_count = 0
        self._loop = asyncio.get_running_loop()
        limits = HostLimits(max_offers=function.channels - 1, target_vps=len(function.vectors.fds))
        self._machine = HostConnection(limits)
        self._devices = list(devices)
        """What is offered whenever the client connects."""
        self._vsps: dict[int, Vsp] = {}
        self._open_channels: dict[int, _OpenChannel] = {}
        self._gpadls: dict[int, _Gpadl] = {}
        self._admin: RingPair | None = None
        self._outbox: deque[bytes] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._offer()
        self._doorbell = function.doorbell(0)
        function.backend = self
        self._loop.add_reader(self._doorbell, self._kick)

    @property
    def open_channels(self) -> int:
        return len(self._open_channels)

    def has(self, vsp: Vsp) -> bool:
        """Is the client offered this device, or has not yet let go of it?"""
        return any(mine is vsp for mine in (*self._devices, *self._vsps.values()))

    def start(self, pieces: list[Piece], downstream: int) -> None:
        """The client's admin ring is at `pieces`. Raises RingError for indices that cannot be."""
        self._admin = RingPair(pieces, downstream, Side.HOST, self.function.vectors.fds[0], f"{self.function.name}, admin ring")
        self._loop.call_soon(self._kick)

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

    def revoke(self, iova: int, size: int) -> None:
        """The client takes memory away. What uses it ends first, as an IOMMU would fault it."""
        end = iova + size
        for handle, gpadl in self._gpadls.items():
            if any(start < end and iova < start + length for start, length in gpadl.runs):
                self._fail(ProtocolError(f"[{iova:#x}, {end:#x}) was unmapped while GPADL {handle:#x} used it"))
                return

    def rescind(self, vsp: Vsp) -> None:
        """Take a device away from the client. Raises UsageError when it has none such, or loses it already."""
        if not any(mine is vsp for mine in self._devices):
            raise UsageError(f"{self.function.name} was not offered this device, or it was taken away already")
        self._devices = [mine for mine in self._devices if mine is not vsp]
        for relid in [relid for relid, mine in self._vsps.items() if mine is vsp]:
            self._carry_out(self._machine.rescind(relid))
        self._kick()

    def close(self) -> None:
        """The client's place at the host goes away."""
        if self.function.backend is not self:
            return
        self._loop.remove_reader(self._doorbell)
        self.stop()
        self._devices = []
        self._carry_out(self._machine.close())
        self.function.backend = None

    def _offer(self) -> None:
        """Have everything ready for the client's next connection, also what it said it was done with in this one."""
        for vsp in self._devices:
            if not any(mine is vsp for mine in self._vsps.values()):
                relid, _ = self._machine.offer(vsp.offer)
                self._vsps[relid] = vsp

    def _guarded(self, callback: Callable[[], None]) -> Callable[[], None]:
        """For callbacks of the loop: what one raises ends this client's connection. A defect of ours is logged as such."""
        return guarded(callback, self.function.name, self._fail)

    def _kick(self) -> None:
        """The doorbell was rung, or there is more to do: go on."""
        if self.function.backend is self:  # else it was closed since this was called for, and the descriptor may be another's
            eventfd.take(self._doorbell)
            self._guarded(self._serve)()

    def _serve(self) -> None:
        """Take what is in the admin ring, a number of messages at a time."""
        for _ in range(_BUDGET):
            if self._admin is None or not self._flush():
                return
            packet = self._admin.incoming.receive()
            if packet is None:
                if not self._admin.incoming.unmask():
                    return
                continue
            if packet.packet_type != PACKET_INBAND:
                raise ProtocolError(f"packet type {packet.packet_type} in the admin ring, need {PACKET_INBAND} (in-band)")
            self._carry_out(self._machine.receive(packet.payload))
        self._loop.call_soon(self._kick)

    def _fail(self, error: Exception) -> None:
        self._note(error)
        self.function.fail(ERROR_PROTOCOL)

    def _note(self, error: Exception) -> None:
        """Keep an error, and log the first ones: a client that goes on and on must not fill the host's disk."""
        self.errors.append(error.with_traceback(None))  # which would keep everything alive that was in use there
        self.error_count += 1
        if self.error_count <= KEPT_ERRORS:
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
        self._kick()

    def _carry_out(self, actions: list[act.HostAction]) -> None:
        """Do what the state machine asks, in order; its answers to that come next. Messages wait in the outbox: nothing in here raises,
        so that the machine always learns what became of what it asked for."""
        todo = deque(actions)
        while todo:
            todo.extendleft(reversed(self._do(todo.popleft())))

    def _do(self, action: act.HostAction) -> list[act.HostAction]:
        match action:
            case act.Send(data=data):
                self._outbox.append(data)
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
                self._open_channels[relid].pair.lead_to(self.function.vectors.fds[vector])
            case act.RelidReleased(relid=relid):
                self._vsps.pop(relid, None)
            case act.Refused(reason=reason):
                self._note(ProtocolError(reason))
            case act.Disconnected():
                self._offer()
        return []

    def _create_gpadl(self, handle: int, relid: int, ranges: tuple[PageRange, ...]) -> int:
        """Look the pages up and keep them as pieces of the client's files; they are mapped when first used. An NTSTATUS."""
        domain = self.function.domain
        pieces: list[Piece] = []
        access = READ | WRITE
        try:
            for pages in ranges:
                if pages.byte_offset or pages.byte_count % PAGE:
                    raise ProtocolError(
                        f"GPADL {handle:#x}: {pages.byte_count} bytes at offset {pages.byte_offset}: take whole pages"
                    )
            runs = _runs(pfn for pages in ranges for pfn in pages.pfns)
            for iova, size in runs:
                access &= domain.access(iova, size)
                pieces += domain.pieces(iova, size, access or READ)
        except (IsolationFault, ProtocolError) as error:
            self._note(error)
            return STATUS_INVALID_PARAMETER
        self._gpadls[handle] = _Gpadl(relid, runs, merge(pieces), access)
        return STATUS_SUCCESS

    def _gpadl_of(self, relid: int, handle: int) -> HostGpadl:
        gpadl = self._gpadls.get(handle)
        if gpadl is None or gpadl.relid != relid:
            raise ProtocolError(f"GPADL {handle:#x} is none of channel {relid}")
        if gpadl.mapping is None:
            self._check_room(len(gpadl.pieces))
            try:
                gpadl.mapping = side_by_side(gpadl.pieces)
            except DmaError as error:
                raise ProtocolError(f"GPADL {handle:#x}: {error}") from error
        return HostGpadl(handle, gpadl.mapping, gpadl.access)

    def _check_room(self, pieces: int) -> None:
        """Raise ProtocolError when the client has memory too scattered for `pieces` more to be mapped."""
        used = sum(len(gpadl.pieces) for gpadl in self._gpadls.values() if gpadl.mapping is not None)
        used += sum(open_channel.pieces for open_channel in self._open_channels.values())
        if used + pieces > MAX_PIECES:
            raise ProtocolError(f"{used} pieces of memory are mapped, {pieces} more exceed the limit of {MAX_PIECES}")

    def _drop_gpadl(self, handle: int, relid: int) -> None:
        gpadl = self._gpadls.pop(handle, None)
        if gpadl is not None and gpadl.mapping is not None:
            vsp = self._vsps.get(relid)
            self._let_go((lambda: vsp.gpadl_gone(handle)) if vsp else None, gpadl.mapping)

    def _let_go(self, leave: Callable[[], None] | None, memory: _Memory) -> None:
        """Have a VSP leave memory, then unmap it. If it cannot, the memory stays: better lost than pulled away from under a kernel."""
        try:
            if leave is not None:
                leave()
        except Exception as error:
            log.exception("%s: defect of the host: memory stays mapped", self.function.name)
            self._note(error)
        else:
            memory.close()

    def _open(self, action: act.ChannelOpen) -> int:
        """Open a channel. An NTSTATUS."""
        gpadl = self._gpadls[action.ring_gpadl]
        if gpadl.access != READ | WRITE:
            self._note(ProtocolError(f"channel {action.relid}: its rings are not mapped for reading and writing"))
            return STATUS_INVALID_PARAMETER
        interrupt = -1 if action.target_vp is None else self.function.vectors.fds[action.target_vp]
        name = f"{self.function.name}, channel {action.relid}"
        try:
            self._check_room(2 * len(gpadl.pieces))
            doorbell = self.function.doorbell(action.relid)
            pair = RingPair(gpadl.pieces, action.downstream_page_offset * PAGE, Side.HOST, interrupt, name)
        except (PeerError, DmaError, UsageError, OSError) as error:
            self._note(error)
            return STATUS_INSUFFICIENT_RESOURCES if isinstance(error, OSError) else STATUS_INVALID_PARAMETER
        self._open_channels[action.relid] = _OpenChannel(pair, 2 * len(gpadl.pieces))
        context = ChannelContext(
            relid=action.relid,
            pair=pair,
            domain=self.function.domain,
            doorbell=doorbell,
            gpadl=lambda handle: self._gpadl_of(action.relid, handle),
            failed=self._note,
            guarded=self._guarded,
        )
        try:
            self._vsps[action.relid].open(context)
        except Exception as error:
            log.exception("%s: the device did not open", name)
            self._note(error)
            self._close_channel(action.relid)
            return STATUS_UNSUCCESSFUL
        return STATUS_SUCCESS

    def _close_channel(self, relid: int) -> None:
        vsp = self._vsps.get(relid)
        self._let_go(vsp.close if vsp else None, self._open_channels.pop(relid).pair)


def _runs(pfns: Iterable[int]) -> list[tuple[int, int]]:
    """Page numbers as runs of neighbours: (IOVA, bytes)."""
    runs: list[tuple[int, int]] = []
    for pfn in pfns:
        if runs and runs[-1][0] + runs[-1][1] == pfn * PAGE:
            runs[-1] = (runs[-1][0], runs[-1][1] + PAGE)
        else:
            runs.append((pfn * PAGE, PAGE))
    return runs
