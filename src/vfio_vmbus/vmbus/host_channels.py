"""The channels and GPADLs of one guest, host end: what the messages about them do, and the order in which things end.

One rule gives the order: while a channel stops, its GPADLs wait; when it has stopped they are torn down; when they are gone, what
was waiting for that goes on (a reopened channel, a released number).
"""

from collections.abc import Callable, Iterable, Mapping

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.vmbus.actions import (
    ChannelClose,
    ChannelModify,
    ChannelOpen,
    GpadlCreate,
    GpadlTeardown,
    HostAction,
    Refused,
    RelidReleased,
    Send,
)
from vfio_vmbus.vmbus.gpadl import Assembly, ring_pages
from vfio_vmbus.vmbus.host_checks import ring_problem, room_problem, vp_problem
from vfio_vmbus.vmbus.host_records import GpadlStage, HostChannel, HostGpadl, Presence, Stage
from vfio_vmbus.vmbus.limits import HostLimits
from vfio_vmbus.vmbus.states import (
    CHANNEL_OUTCOMES,
    GPADL_OUTCOMES,
    ChannelView,
    GpadlView,
    Outcome,
)
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.monitor import number_of

Actions = list[HostAction]


def send(message: wire.Message) -> Send:
    return Send(message.pack())


class HostChannels:
    """`receive` takes the guest's messages about channels; the other methods are the host's own commands and its shell's answers."""

    def __init__(self, limits: HostLimits, *, monitored: bool) -> None:
        self.limits = limits
        self._monitored = monitored
        self.answers_modify = False
        self._channels: dict[int, HostChannel] = {}
        self._gpadls: dict[int, HostGpadl] = {}
        self._assemblies: dict[int, Assembly] = {}
        self._handlers: Mapping[type[wire.Message], Callable[..., Actions]] = {
            wire.OpenChannel: self._on_open,
            wire.CloseChannel: self._on_close,
            wire.ModifyChannel: self._on_modify,
            wire.GpadlHeader: self._on_gpadl_header,
            wire.GpadlBody: self._on_gpadl_body,
            wire.GpadlTeardown: self._on_gpadl_teardown,
            wire.RelidReleased: self._on_released,
        }

    # What there is.

    @property
    def relids(self) -> tuple[int, ...]:
        return tuple(self._channels)

    @property
    def open_relids(self) -> tuple[int, ...]:
        """Channels that the shell opens, has open, or closes."""
        return tuple(relid for relid, channel in self._channels.items() if channel.stage is not Stage.IDLE)

    @property
    def gpadl_handles(self) -> tuple[int, ...]:
        """GPADLs that the host remembers, unfinished ones included."""
        return (*self._gpadls, *self._assemblies)

    @property
    def idle(self) -> bool:
        """Whether nothing of a guest is in use."""
        return not self._gpadls and not self._assemblies and not self.open_relids

    def offer_of(self, relid: int) -> wire.ChannelOffer:
        """UsageError when there is no such channel."""
        return self._known(relid).offer

    def view(self, relid: int) -> ChannelView:
        """The channel as its guest knows it."""
        channel = self._channels.get(relid)
        return channel.view if channel else ChannelView.UNKNOWN

    def gpadl_view(self, handle: int) -> GpadlView:
        """The GPADL as its guest knows it."""
        if handle in self._assemblies:
            return GpadlView.UNFINISHED
        gpadl = self._gpadls.get(handle)
        return self._channels[gpadl.relid].gpadl_view(gpadl) if gpadl else GpadlView.UNKNOWN

    # Offers.

    def add(self, offer: wire.ChannelOffer) -> HostChannel:
        """A new channel, hidden, under the lowest free number. UsageError: too many, a second one, or no primary channel."""
        limit = min(self.limits.max_offers, wire.MAX_RELID)
        if len(self._channels) >= limit:
            raise UsageError(f"{len(self._channels)} channels are offered, limit {limit}")
        relid = next(number for number in range(1, limit + 1) if number not in self._channels)
        channel = HostChannel(relid, offer)
        alive = {other.key for other in self._channels.values() if other.presence in (Presence.HIDDEN, Presence.OFFERED)}
        if channel.key in alive:
            raise UsageError(f"channel {offer.sub_channel_index} of {offer.instance_guid} is offered already")
        if offer.sub_channel_index and (*channel.key[:2], 0) not in alive:
            raise UsageError(
                f"subchannel {offer.sub_channel_index} of {offer.instance_guid}, but its primary channel is not offered"
            )
        self._channels[relid] = channel
        return channel

    def show(self, channel: HostChannel) -> Send:
        """Offer it to the guest. The doorbell's number, `connection_id`, is the relid."""
        channel.presence = Presence.OFFERED
        monitor_id = number_of(channel.relid) if self._monitored else None
        return send(
            wire.OfferChannel(
                offer=channel.offer,
                child_relid=channel.relid,
                monitor_id=monitor_id or 0,
                monitor=wire.MonitorFlags.of(allocated=int(monitor_id is not None)),
                interrupt=wire.InterruptFlags.of(dedicated=1),
                connection_id=channel.relid,
            )
        )

    def show_all(self) -> Actions:
        """Offer everything, each primary channel ahead of its subchannels."""
        hidden = [channel for channel in self._channels.values() if channel.presence is Presence.HIDDEN]
        return [self.show(channel) for channel in sorted(hidden, key=lambda item: (item.offer.sub_channel_index, item.relid))]

    def rescind(self, relid: int) -> Actions:
        """Take an offer back; a primary channel's subchannels go ahead of it. UsageError: unknown, or taken back already."""
        channel = self._known(relid)
        if channel.presence in (Presence.RESCINDED, Presence.RELEASED):
            raise UsageError(f"channel {relid} is {channel.presence.value} already")
        return self._rescind_subchannels(channel) + self._rescind_one(channel)

    def _rescind_subchannels(self, channel: HostChannel) -> Actions:
        actions: Actions = []
        if channel.offer.sub_channel_index == 0:
            for other in [item for item in self._channels.values() if item.key[:2] == channel.key[:2] and item is not channel]:
                if other.presence in (Presence.HIDDEN, Presence.OFFERED):
                    actions += self._rescind_one(other)
        return actions

    def _rescind_one(self, channel: HostChannel) -> Actions:
        if channel.presence is Presence.HIDDEN:
            return self._let_go(channel, Presence.RELEASED)
        channel.reopen = None
        channel.presence = Presence.RESCINDED
        actions = self._stop(channel)
        actions.append(send(wire.RescindChannelOffer(child_relid=channel.relid)))
        for assembly in self._unfinished(channel):
            assembly.refuse(wire.STATUS_UNSUCCESSFUL, f"channel {channel.relid} is rescinded")
        for gpadl in channel.gpadls.values():
            gpadl.retired = True
            if gpadl.stage is GpadlStage.READY:
                gpadl.stage = GpadlStage.WAITING
        return actions + self._settle(channel)

    # The guest goes.

    def let_all_go(self, presence: Presence) -> Actions:
        """Forget the guest's part in every channel: HIDDEN keeps the offers for the next guest, RELEASED drops them."""
        actions: Actions = []
        for channel in list(self._channels.values()):
            gone = channel.presence in (Presence.RESCINDED, Presence.RELEASED)
            actions += self._let_go(channel, Presence.RELEASED if gone else presence)
        self._assemblies.clear()  # what is left are refused ones, for channels that never were
        return actions

    def _let_go(self, channel: HostChannel, presence: Presence) -> Actions:
        channel.presence = presence
        channel.reopen = None
        actions = self._stop(channel)
        for assembly in self._unfinished(channel):
            del self._assemblies[assembly.handle]
        for gpadl in list(channel.gpadls.values()):
            gpadl.orphaned = True
            gpadl.answer = None
            if gpadl.stage is GpadlStage.READY:
                gpadl.stage = GpadlStage.WAITING
            elif gpadl.stage is GpadlStage.DETACHED:
                self._forget(gpadl)
        return actions + self._settle(channel)

    def _stop(self, channel: HostChannel) -> Actions:
        if channel.stage is not Stage.OPEN:
            return []
        channel.stage = Stage.CLOSING
        return [ChannelClose(channel.relid)]

    def _settle(self, channel: HostChannel) -> Actions:
        """Go on with whatever waited for the channel to stop, or for its last GPADL to go."""
        if channel.stopping:
            return []
        actions: Actions = []
        for gpadl in channel.gpadls.values():
            if gpadl.stage is GpadlStage.WAITING:
                gpadl.stage = GpadlStage.TEARING
                actions.append(GpadlTeardown(gpadl.handle, gpadl.relid))
        if channel.reopen is not None:
            request, channel.reopen = channel.reopen, None
            actions.append(_start(channel, request))
        if channel.presence is Presence.RELEASED and channel.stage is Stage.IDLE and not channel.gpadls:
            del self._channels[channel.relid]
            actions.append(RelidReleased(channel.relid))
        return actions

    # The guest's messages.

    def receive(self, message: wire.Message) -> Actions:
        """Carry a message out, or refuse it. Raises ProtocolError where that is fatal."""
        return self._handlers[type(message)](message)

    def _outcome(self, message: wire.Message, relid: int) -> Outcome:
        outcome = CHANNEL_OUTCOMES[type(message)][self.view(relid)]
        if outcome is Outcome.FATAL:
            raise ProtocolError(f"{type(message).__name__}: channel {relid} is {self.view(relid).value}")
        return outcome

    def _gpadl_outcome(self, message: wire.Message, handle: int) -> Outcome:
        outcome = GPADL_OUTCOMES[type(message)][self.gpadl_view(handle)]
        if outcome is Outcome.FATAL:
            raise ProtocolError(f"{type(message).__name__}: GPADL {handle:#x} is {self.gpadl_view(handle).value}")
        return outcome

    def _on_open(self, message: wire.OpenChannel) -> Actions:
        relid = message.child_relid
        outcome = self._outcome(message, relid)
        if outcome is Outcome.IGNORE:
            return []
        if outcome is Outcome.REFUSE:
            return _refuse_open(message, wire.STATUS_UNSUCCESSFUL, f"channel is {self.view(relid).value}")
        channel = self._channels[relid]
        problem = ring_problem(channel, message) or vp_problem(message.target_vp, self.limits, may_disable=True)
        if problem:
            return _refuse_open(message, wire.STATUS_INVALID_PARAMETER, problem)
        channel.reopen = message
        return self._settle(channel)

    def _on_close(self, message: wire.CloseChannel) -> Actions:
        """A primary channel's subchannels were offered for as long as it is open."""
        if self._outcome(message, message.child_relid) is Outcome.IGNORE:
            return []
        channel = self._channels[message.child_relid]
        return self._rescind_subchannels(channel) + self._stop(channel)

    def _on_modify(self, message: wire.ModifyChannel) -> Actions:
        relid = message.child_relid
        outcome = self._outcome(message, relid)
        if outcome is Outcome.IGNORE:
            return []
        if outcome is Outcome.REFUSE:
            return self._refuse_modify(relid, wire.STATUS_UNSUCCESSFUL, f"channel is {self.view(relid).value}")
        request = self._channels[relid].request
        if request is not None and request.target_vp == wire.VP_INDEX_DISABLE_INTERRUPT:
            return self._refuse_modify(relid, wire.STATUS_INVALID_PARAMETER, "channel was opened without interrupts")
        if problem := vp_problem(message.target_vp, self.limits, may_disable=False):
            return self._refuse_modify(relid, wire.STATUS_INVALID_PARAMETER, problem)
        answer = wire.ModifyChannelResponse(child_relid=relid, status=wire.STATUS_SUCCESS)
        return [ChannelModify(relid, message.target_vp), *([send(answer)] if self.answers_modify else [])]

    def _refuse_modify(self, relid: int, status: int, problem: str) -> Actions:
        reason = f"ModifyChannel {relid}: {problem}"
        if not self.answers_modify:
            raise ProtocolError(reason)
        return [Refused(reason), send(wire.ModifyChannelResponse(child_relid=relid, status=status))]

    def _on_released(self, message: wire.RelidReleased) -> Actions:
        self._outcome(message, message.child_relid)
        return self._let_go(self._channels[message.child_relid], Presence.RELEASED)

    def _on_gpadl_header(self, message: wire.GpadlHeader) -> Actions:
        handle, relid = message.gpadl, message.child_relid
        in_use = self._gpadl_outcome(message, handle) is Outcome.REFUSE
        unknown = self._outcome(message, relid) is Outcome.REFUSE
        assembly = Assembly(message, self.limits.max_bodies)
        if unknown:
            assembly.refuse(wire.STATUS_UNSUCCESSFUL, f"channel {relid} is {self.view(relid).value}")
        elif in_use:
            assembly.refuse(wire.STATUS_UNSUCCESSFUL, f"the host still uses the last GPADL {handle:#x}")
        elif problem := room_problem(assembly.pages, self._gpadls.values(), self._assemblies.values(), self.limits):
            assembly.refuse(wire.STATUS_INSUFFICIENT_RESOURCES, problem)
        if assembly.complete:
            return self._finish(assembly)
        if len(self._assemblies) >= self.limits.max_unfinished:
            raise ProtocolError(f"{len(self._assemblies) + 1} unfinished GPADLs, limit {self.limits.max_unfinished}")
        self._assemblies[handle] = assembly
        return []

    def _on_gpadl_body(self, message: wire.GpadlBody) -> Actions:
        self._gpadl_outcome(message, message.gpadl)
        assembly = self._assemblies[message.gpadl]
        assembly.add(message)
        if not assembly.complete:
            return []
        del self._assemblies[message.gpadl]
        return self._finish(assembly)

    def _finish(self, assembly: Assembly) -> Actions:
        handle, relid = assembly.handle, assembly.relid
        if assembly.status != wire.STATUS_SUCCESS:
            return [
                Refused(f"GpadlHeader {handle:#x}: {assembly.reason}"),
                send(wire.GpadlCreated(child_relid=relid, gpadl=handle, status=assembly.status)),
            ]
        ranges = assembly.ranges()
        gpadl = HostGpadl(handle, relid, assembly.pages, ring_pages(ranges))
        self._gpadls[handle] = self._channels[relid].gpadls[handle] = gpadl
        return [GpadlCreate(handle, relid, ranges)]

    def _on_gpadl_teardown(self, message: wire.GpadlTeardown) -> Actions:
        self._outcome(message, message.child_relid)
        self._gpadl_outcome(message, message.gpadl)
        gpadl = self._gpadls[message.gpadl]
        if gpadl.relid != message.child_relid:
            raise ProtocolError(f"GpadlTeardown: GPADL {gpadl.handle:#x} is of channel {gpadl.relid}, not {message.child_relid}")
        answer = wire.GpadlTorndown(gpadl=gpadl.handle)
        if gpadl.stage is GpadlStage.DETACHED:
            self._forget(gpadl)
            return [send(answer)]
        gpadl.answer = answer
        if gpadl.stage is GpadlStage.READY:
            gpadl.stage = GpadlStage.WAITING
        return self._settle(self._channels[gpadl.relid])

    # The shell's answers.

    def channel_opened(self, relid: int, status: int) -> Actions:
        """UsageError unless the shell was asked to open it."""
        channel = self._awaited(relid, Stage.OPENING)
        channel.stage = Stage.IDLE if status else Stage.OPEN
        if channel.presence is not Presence.OFFERED:
            return self._stop(channel) or self._settle(channel)
        assert channel.request is not None
        return [_open_result(channel.request, status)]

    def channel_closed(self, relid: int) -> Actions:
        """UsageError unless the shell was asked to close it."""
        channel = self._awaited(relid, Stage.CLOSING)
        channel.stage = Stage.IDLE
        return self._settle(channel)

    def gpadl_created(self, handle: int, status: int) -> Actions:
        """UsageError unless the shell was asked to create it."""
        gpadl = self._awaited_gpadl(handle, GpadlStage.CREATING)
        channel = self._channels[gpadl.relid]
        created = wire.GpadlCreated(child_relid=gpadl.relid, gpadl=handle, status=status)
        if status:
            self._forget(gpadl)
            return [*([] if gpadl.orphaned else [send(created)]), *self._settle(channel)]
        if not (gpadl.retired or gpadl.orphaned):
            gpadl.stage = GpadlStage.READY
            return [send(created)]
        gpadl.stage = GpadlStage.WAITING
        if not gpadl.orphaned:
            gpadl.answer = wire.GpadlCreated(child_relid=gpadl.relid, gpadl=handle, status=wire.STATUS_UNSUCCESSFUL)
        return self._settle(channel)

    def gpadl_torn_down(self, handle: int) -> Actions:
        """UsageError unless the shell was asked to tear it down."""
        gpadl = self._awaited_gpadl(handle, GpadlStage.TEARING)
        if gpadl.retired and not gpadl.orphaned and gpadl.answer is None:
            gpadl.stage = GpadlStage.DETACHED
            gpadl.pages = 0
            return []
        self._forget(gpadl)
        answer: Iterable[HostAction] = [send(gpadl.answer)] if gpadl.answer else []
        return [*answer, *self._settle(self._channels[gpadl.relid])]

    # Small things.

    def _known(self, relid: int) -> HostChannel:
        channel = self._channels.get(relid)
        if channel is None:
            raise UsageError(f"no channel {relid}")
        return channel

    def _awaited(self, relid: int, stage: Stage) -> HostChannel:
        channel = self._known(relid)
        if channel.stage is not stage:
            raise UsageError(f"channel {relid} is {channel.stage.value}, need {stage.value}")
        return channel

    def _awaited_gpadl(self, handle: int, stage: GpadlStage) -> HostGpadl:
        gpadl = self._gpadls.get(handle)
        if gpadl is None or gpadl.stage is not stage:
            raise UsageError(f"GPADL {handle:#x} is {gpadl.stage.value if gpadl else 'unknown'}, need {stage.value}")
        return gpadl

    def _unfinished(self, channel: HostChannel) -> list[Assembly]:
        return [item for item in self._assemblies.values() if item.relid == channel.relid]

    def _forget(self, gpadl: HostGpadl) -> None:
        del self._gpadls[gpadl.handle]
        del self._channels[gpadl.relid].gpadls[gpadl.handle]


def _start(channel: HostChannel, request: wire.OpenChannel) -> ChannelOpen:
    channel.stage = Stage.OPENING
    channel.request = request
    return ChannelOpen(
        relid=channel.relid,
        open_id=request.open_id,
        ring_gpadl=request.ring_gpadl,
        downstream_page_offset=request.downstream_page_offset,
        target_vp=None if request.target_vp == wire.VP_INDEX_DISABLE_INTERRUPT else request.target_vp,
        user_data=request.user_data,
    )


def _open_result(request: wire.OpenChannel, status: int) -> Send:
    return send(wire.OpenChannelResult(child_relid=request.child_relid, open_id=request.open_id, status=status))


def _refuse_open(request: wire.OpenChannel, status: int, reason: str) -> Actions:
    return [Refused(f"OpenChannel {request.child_relid}: {reason}"), _open_result(request, status)]
