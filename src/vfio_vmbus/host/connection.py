"""One client's VMBus connection at the embedded host: carries out what the control plane's host end decides.

Whatever carries its messages (`carrier`), GPADLs are mapped out of the client's domain, and channels are opened for the VSPs that were
given to this client. Runs on the host's loop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from ..errors import DmaError, IsolationFault, PeerError, ProtocolError, UsageError
from ..iommu.domain import Domain
from ..iommu.translation import READ, WRITE
from ..memory.bell import NOBODY
from ..memory.mapping import PAGE, Mapping, Piece, merge
from ..memory.shared import side_by_side
from ..ring.pair import RingPair
from ..vmbus import actions as act
from ..vmbus.host import HostConnection
from ..vmbus.limits import HostLimits
from ..wire.gpa import PageRange
from ..wire.monitor import number_of
from ..wire.table import Side
from ..wire.vmbus import (
    STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_PARAMETER,
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    SUPPORTED_VERSIONS,
)
from .carrier import Carrier
from .faults.fate import Desk
from .faults.messages import faulted
from .faults.relay import Relay, relay
from .monitor import Monitor
from .vsp import ChannelContext, HostGpadl, Vsp, guarded

log = logging.getLogger("vfio_vmbus.host")

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

    pair: RingPair | Relay
    pieces: int


class Connection:
    """The host's end for the client that `carrier` leads to. `devices` are offered to it, in order.

    max_version, min_version: of VMBus, major << 16 | minor. monitored: channels may be signalled in the client's monitor page, which is
    then looked at all the time. max_pieces: of memory, see MAX_PIECES. faults: what is to go wrong.
    """

    def __init__(
        self,
        carrier: Carrier,
        devices: Iterable[Vsp],
        *,
        max_version: int = SUPPORTED_VERSIONS[0],
        min_version: int = SUPPORTED_VERSIONS[-1],
        monitored: bool = False,
        max_pieces: int = MAX_PIECES,
        faults: Desk | None = None,
    ) -> None:
        self.errors: deque[Exception] = deque(maxlen=KEPT_ERRORS)
        """What the client did wrong, the latest last."""
        self.error_count = 0
        limits = HostLimits(max_offers=carrier.channels - 1, target_vps=carrier.targets)
        self._machine = HostConnection(limits, max_version=max_version, min_version=min_version, monitored=monitored)
        self._monitored = monitored
        self.monitor: Monitor | None = None
        """While a monitored client is connected."""
        self._monitor_page = 0
        self._max_pieces = max_pieces
        self._devices = list(devices)
        """What is offered whenever the client connects."""
        self.carrier = faulted(faults, "+".join(vsp.name for vsp in self._devices) if faults else "", carrier)
        self._faults = faults
        self._vsps: dict[int, Vsp] = {}
        self._returning: list[Vsp] = []
        """Devices that are offered again as soon as the client has let go of them."""
        self._open_channels: dict[int, _OpenChannel] = {}
        self._gpadls: dict[int, _Gpadl] = {}
        self._closed = False
        self._offer()
        self.carrier.begin(self)

    @property
    def name(self) -> str:
        return self.carrier.name

    @property
    def domain(self) -> Domain:
        """What the client's addresses mean."""
        return self.carrier.domain

    @property
    def version(self) -> int | None:
        """The version of VMBus agreed on, while the client is connected."""
        return self._machine.version

    @property
    def failed(self) -> bool:
        """Is the client cut off, until it begins anew?"""
        return self.carrier.failed

    @property
    def open_channels(self) -> int:
        return len(self._open_channels)

    @property
    def gpadl_sizes(self) -> list[int]:
        """Bytes of each piece of its memory that the client shares."""
        return [sum(size for _, size in gpadl.runs) for gpadl in self._gpadls.values()]

    def has(self, vsp: Vsp) -> bool:
        """Is the client offered this device, or has not yet let go of it?"""
        return any(mine is vsp for mine in (*self._devices, *self._vsps.values()))

    # What the carrier brings.

    def receive(self, message: bytes) -> None:
        self.guarded(lambda: self._carry_out(self._machine.receive(message)))()

    def fail(self, error: Exception) -> None:
        self._note(error)
        self.carrier.fail(error)

    def revoke(self, iova: int, size: int) -> None:
        """The client takes memory away. What uses it ends first, as an IOMMU would fault it."""
        end = iova + size
        in_use = {f"GPADL {handle:#x}": gpadl.runs for handle, gpadl in self._gpadls.items()}
        if self.monitor is not None:
            in_use["the monitor page"] = [(self._monitor_page, PAGE)]
        for what, runs in in_use.items():
            if any(start < end and iova < start + length for start, length in runs):
                self.fail(ProtocolError(f"[{iova:#x}, {end:#x}) was unmapped while {what} used it"))
                return

    def reset(self) -> None:
        if not self._closed:
            self._carry_out(self._machine.reset())

    # What the host's owner asks.

    def offer(self, vsp: Vsp) -> None:
        """Give the client one more device, at any time. Raises UsageError when it has it already, for one too many, after `close`.

        One that was taken away from it, and that it has not let go of yet, is offered again when it has.
        """
        if self._closed:
            raise UsageError(f"{self.name} has gone")
        if any(mine is vsp for mine in self._devices):
            raise UsageError(f"{self.name} has this device already")
        if self.has(vsp):
            self._returning.append(vsp)
        else:
            self._carry_out(self._offer_one(vsp))
        self._devices.append(vsp)
        self.carrier.flush()

    def rescind(self, vsp: Vsp) -> None:
        """Take a device away from the client. Raises UsageError when it has none such, or loses it already."""
        if not any(mine is vsp for mine in self._devices):
            raise UsageError(f"{self.name} was not offered this device, or it was taken away already")
        self._devices = [mine for mine in self._devices if mine is not vsp]
        if vsp in self._returning:
            self._returning.remove(vsp)
            return
        for relid in [relid for relid, mine in self._vsps.items() if mine is vsp]:
            self._carry_out(self._machine.rescind(relid))
        self.carrier.flush()

    def close(self) -> None:
        """The client's place at the host goes away."""
        if self._closed:
            return
        self.carrier.end()
        self._closed = True
        self._devices = []
        self._returning = []
        self._carry_out(self._machine.close())

    def _offer(self) -> None:
        """Have everything ready for the client's next connection, also what it said it was done with in this one."""
        self._returning.clear()
        for vsp in self._devices:
            if not any(mine is vsp for mine in self._vsps.values()):
                self._offer_one(vsp)

    def _offer_one(self, vsp: Vsp) -> list[act.HostAction]:
        relid, actions = self._machine.offer(vsp.offer)
        self._vsps[relid] = vsp
        return actions

    def _released(self, relid: int) -> list[act.HostAction]:
        """The client has let go of a device; it gets it back if it was given it again meanwhile."""
        vsp = self._vsps.pop(relid)
        if vsp not in self._returning:
            return []
        self._returning.remove(vsp)
        return self._offer_one(vsp)

    def guarded(self, callback: Callable[[], None]) -> Callable[[], None]:
        """For callbacks of the loop: what one raises ends this client's connection. A defect of ours is logged as such."""
        return guarded(callback, self.name, self.fail)

    def _note(self, error: Exception) -> None:
        """Keep an error, and log the first ones: a client that goes on and on must not fill the host's disk."""
        self.errors.append(error.with_traceback(None))  # which would keep everything alive that was in use there
        self.error_count += 1
        if self.error_count <= KEPT_ERRORS:
            log.warning("%s: %s", self.name, error)

    def _carry_out(self, actions: list[act.HostAction]) -> None:
        """Do what the state machine asks, in order; its answers to that come next. Messages wait: nothing in here raises, so that the
        machine always learns what became of what it asked for. Except for a contact, behind which it asks for nothing: ProtocolError."""
        todo = deque(actions)
        while todo:
            todo.extendleft(reversed(self._do(todo.popleft())))

    def _do(self, action: act.HostAction) -> list[act.HostAction]:
        match action:
            case act.Send(data=data):
                self.carrier.send(data)
            case act.Contact():
                self._contact(action)
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
                self._open_channels[relid].pair.lead_to(self.carrier.interrupt(relid, vector))
            case act.RelidReleased(relid=relid):
                return self._released(relid)
            case act.Refused(reason=reason):
                self._note(ProtocolError(reason))
            case act.Disconnected():
                self._end_monitor()
                self._offer()
        return []

    def _contact(self, action: act.Contact) -> None:
        """The client's messages go somewhere from now on, and it may have a page to signal in. Raises ProtocolError where neither is."""
        self.carrier.contact(action.target_vp)
        _, page = action.monitor_pages
        if not self._monitored or action.version is None or not page:
            return
        try:
            if page % PAGE:
                raise ProtocolError(f"a monitor page at {page:#x}: take a multiple of {PAGE}")
            mapping = side_by_side(self.domain.pieces(page, PAGE, READ | WRITE))
        except (IsolationFault, DmaError) as error:
            raise ProtocolError(f"a monitor page at {page:#x}: {error}") from error
        self._monitor_page = page
        self.monitor = Monitor(mapping, f"{self.name}-monitor")

    def _end_monitor(self) -> None:
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            self._let_go(monitor.stop, monitor.page)

    def _watch(self, relid: int, doorbell: int | None) -> None:
        """The channel is signalled in the monitor page as well; with None not any more."""
        number = number_of(relid)
        if self.monitor is None or number is None:
            return
        if doorbell is None:
            self.monitor.unwatch(number)
        else:
            self.monitor.watch(number, doorbell)

    def _create_gpadl(self, handle: int, relid: int, ranges: tuple[PageRange, ...]) -> int:
        """Look the pages up and keep them as pieces of the client's files; they are mapped when first used. An NTSTATUS."""
        domain = self.domain
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
        if used + pieces > self._max_pieces:
            raise ProtocolError(f"{used} pieces of memory are mapped, {pieces} more exceed the limit of {self._max_pieces}")

    def _drop_gpadl(self, handle: int, relid: int) -> None:
        gpadl = self._gpadls.pop(handle, None)
        if gpadl is not None and gpadl.mapping is not None:
            vsp = self._vsps.get(relid)
            self._let_go(lambda: vsp.gpadl_gone(handle) if vsp else None, gpadl.mapping)

    def _let_go(self, leave: Callable[[], None], memory: _Memory) -> None:
        """Have a VSP leave memory, then unmap it. If it cannot, the memory stays: better lost than pulled away from under a kernel."""
        try:
            leave()
        except Exception as error:
            log.exception("%s: defect of the host: memory stays mapped", self.name)
            self._note(error)
        else:
            memory.close()

    def _open(self, action: act.ChannelOpen) -> int:
        """Open a channel. An NTSTATUS."""
        gpadl = self._gpadls[action.ring_gpadl]
        if gpadl.access != READ | WRITE:
            self._note(ProtocolError(f"channel {action.relid}: its rings are not mapped for reading and writing"))
            return STATUS_INVALID_PARAMETER
        interrupt = NOBODY if action.target_vp is None else self.carrier.interrupt(action.relid, action.target_vp)
        name = f"{self.name}, channel {action.relid}"
        try:
            self._check_room(2 * len(gpadl.pieces))
            doorbell = self.carrier.doorbell(action.relid)
            pair = RingPair(gpadl.pieces, action.downstream_page_offset * PAGE, Side.HOST, interrupt, name)
        except (PeerError, DmaError, UsageError, OSError) as error:
            self._note(error)
            return STATUS_INSUFFICIENT_RESOURCES if isinstance(error, OSError) else STATUS_INVALID_PARAMETER
        self._watch(action.relid, doorbell)
        context = ChannelContext(
            relid=action.relid,
            pair=pair,
            domain=self.domain,
            doorbell=doorbell,
            gpadl=lambda handle: self._gpadl_of(action.relid, handle),
            failed=self._note,
            guarded=self.guarded,
        )
        vsp, pieces = self._vsps[action.relid], 2 * len(gpadl.pieces)
        self._open_channels[action.relid] = _OpenChannel(pair, pieces)
        try:
            between = relay(self._faults, vsp.name, context, interrupt) if self._faults else None
            if between is not None:
                self._open_channels[action.relid] = _OpenChannel(between, pieces)
            vsp.open(between.context if between else context)
        except Exception as error:
            log.exception("%s: the device did not open", name)
            self._note(error)
            self._close_channel(action.relid)
            return STATUS_UNSUCCESSFUL
        return STATUS_SUCCESS

    def _close_channel(self, relid: int) -> None:
        vsp, pair = self._vsps.get(relid), self._open_channels.pop(relid).pair

        def leave() -> None:
            with ExitStack() as stack:
                if vsp is not None:
                    stack.callback(vsp.close)
                if isinstance(pair, Relay):
                    stack.callback(pair.stop)
                self._watch(relid, None)

        self._let_go(leave, pair)


def _runs(pfns: Iterable[int]) -> list[tuple[int, int]]:
    """Page numbers as runs of neighbours: (IOVA, bytes)."""
    runs: list[tuple[int, int]] = []
    for pfn in pfns:
        if runs and runs[-1][0] + runs[-1][1] == pfn * PAGE:
            runs[-1] = (runs[-1][0], runs[-1][1] + PAGE)
        else:
            runs.append((pfn * PAGE, PAGE))
    return runs
