"""The guest end of a VMBus connection, as a driver uses it: commands return bytes to send, `receive` returns events.

What the host says is checked against what was asked; an answer that nobody waits for ends the connection (ProtocolError). Memory
in a GPADL belongs to the host from `create_gpadl` until GpadlGone, Unloaded, or a GpadlReady with a failure.
Orders of messages from drivers/hv of Linux (connection.c, channel.c, channel_mgmt.c).
"""

from collections.abc import Callable, Iterable, Mapping

from vfio_vmbus.errors import ProtocolError, RescindedError, UsageError
from vfio_vmbus.vmbus import actions as act
from vfio_vmbus.vmbus.gpadl import gpadl_messages
from vfio_vmbus.vmbus.guest_records import GuestChannel, GuestGpadl, GuestStage
from vfio_vmbus.vmbus.limits import GuestLimits
from vfio_vmbus.vmbus.states import GUEST_ACCEPTS, GuestState
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.gpa import PageRange

Events = list[act.GuestEvent]
Sends = list[act.Send]

FIRST_GPADL = 0xE1E10  # where Linux begins to count; any number but 0 would do
LAST_GPADL = 0xFFFFFFFF


def _send(message: wire.Message) -> Sends:
    return [act.Send(message.pack())]


class GuestConnection:
    """The driver's end. A command that cannot work now raises UsageError; one on a rescinded channel, RescindedError."""

    def __init__(self, limits: GuestLimits | None = None) -> None:
        self.limits = limits or GuestLimits()
        self._handlers: Mapping[type[wire.Message], Callable[..., Events]] = {
            wire.VersionResponse: self._on_version,
            wire.OfferChannel: self._on_offer,
            wire.AllOffersDelivered: self._on_all_offers,
            wire.RescindChannelOffer: self._on_rescind,
            wire.GpadlCreated: self._on_gpadl_created,
            wire.GpadlTorndown: self._on_gpadl_torndown,
            wire.OpenChannelResult: self._on_opened,
            wire.ModifyChannelResponse: self._on_modified,
            wire.UnloadResponse: self._on_unloaded,
        }
        self._next_gpadl = FIRST_GPADL
        self.reset()

    def reset(self) -> None:
        """Forget everything, from any state. Only after the device was reset: until then the host may use the memory."""
        self._state = GuestState.DISCONNECTED
        self._failure = ""
        self._version: int | None = None
        self._candidates: list[int] = []
        self._channels: dict[int, GuestChannel] = {}
        self._gpadls: dict[int, int] = {}  # handle -> relid

    # What there is.

    @property
    def state(self) -> GuestState:
        return self._state

    @property
    def version(self) -> int | None:
        """The version agreed, major << 16 | minor."""
        return self._version

    @property
    def relids(self) -> tuple[int, ...]:
        """Channels offered, or rescinded and not yet released."""
        return tuple(self._channels)

    @property
    def open_relids(self) -> tuple[int, ...]:
        """Channels that are open or being opened."""
        return tuple(relid for relid, channel in self._channels.items() if channel.stage is not GuestStage.CLOSED)

    @property
    def gpadl_handles(self) -> tuple[int, ...]:
        """GPADLs whose memory is the host's."""
        return tuple(self._gpadls)

    # Connection.

    def connect(
        self, max_version: int = wire.SUPPORTED_VERSIONS[0], min_version: int = wire.SUPPORTED_VERSIONS[-1]
    ) -> list[act.Send]:
        """Ask for `max_version`, then, as the host refuses, for each older one down to `min_version`.

        Comes to Connected or ConnectionRefused. Raises UsageError when there is no version between the two.
        """
        self._need(GuestState.DISCONNECTED)
        candidates = [item for item in wire.SUPPORTED_VERSIONS if min_version <= item <= max_version]
        if not candidates:
            raise UsageError(f"no version from {wire.version_text(min_version)} to {wire.version_text(max_version)} is supported")
        self._candidates = candidates
        self._state = GuestState.CONNECTING
        return self._contact()

    def _contact(self) -> Sends:
        version = self._candidates[0]
        target = wire.TargetInfo.of(sint=wire.MESSAGE_SINT) if version >= wire.VERSION_WIN10_V5 else wire.TargetInfo(0)
        return _send(wire.InitiateContact(version_requested=version, target_info=target))

    def request_offers(self) -> list[act.Send]:
        """Ask for all offers; comes to OfferReceived for each, then AllOffersDelivered."""
        self._need(GuestState.CONNECTED)
        self._state = GuestState.REQUESTING
        return _send(wire.RequestOffers())

    def unload(self) -> list[act.Send]:
        """End the connection, whatever is open; comes to Unloaded. Everything else that the host still sends is ignored."""
        self._need(GuestState.CONNECTED, GuestState.REQUESTING, GuestState.RUNNING)
        self._state = GuestState.UNLOADING
        return _send(wire.Unload())

    # GPADLs.

    def create_gpadl(self, relid: int, ranges: Iterable[PageRange]) -> tuple[int, list[act.Send]]:
        """Share memory with a channel's host: the handle, and a header with its bodies to send in order. Comes to GpadlReady.

        The page numbers are IOVAs / 4096 (`whole_pages` makes a range of whole pages). Raises UsageError for ranges that
        cannot be, or more than 8190 pages.
        """
        channel = self._channel(relid)
        handle = self._free_handle()
        messages = gpadl_messages(relid, handle, ranges)
        self._next_gpadl = handle + 1
        self._gpadls[handle] = relid
        channel.gpadls[handle] = GuestGpadl.CREATING
        return handle, [act.Send(message.pack()) for message in messages]

    def teardown_gpadl(self, handle: int) -> list[act.Send]:
        """Take memory back; comes to GpadlGone. Raises UsageError while it is the ring of an open channel, or not ready."""
        self._need_running()
        relid = self._gpadls.get(handle)
        if relid is None:
            raise UsageError(f"no GPADL {handle:#x}")
        channel = self._channels[relid]
        if channel.gpadls[handle] is not GuestGpadl.READY:
            raise UsageError(f"GPADL {handle:#x} is {channel.gpadls[handle].value}, need ready")
        if channel.stage is not GuestStage.CLOSED and channel.ring == handle:
            raise UsageError(f"GPADL {handle:#x} is the ring of channel {relid}, which is {channel.stage.value}")
        channel.gpadls[handle] = GuestGpadl.TEARING
        return _send(wire.GpadlTeardown(child_relid=relid, gpadl=handle))

    # Channels.

    def open_channel(
        self,
        relid: int,
        gpadl: int,
        downstream_page_offset: int,
        target_vp: int | None = 0,
        open_id: int | None = None,
        user_data: bytes = b"",
    ) -> list[act.Send]:
        """Open a channel over the rings in `gpadl`; comes to ChannelOpened.

        The ring towards the host is its pages 0..`downstream_page_offset`, the ring towards the guest the rest. `target_vp` None
        asks for no interrupts. `open_id` is the relid unless given, as in Linux. At most 120 bytes of `user_data`.
        """
        channel = self._channel(relid)
        if channel.stage is not GuestStage.CLOSED:
            raise UsageError(f"channel {relid} is {channel.stage.value}, need closed")
        if channel.gpadls.get(gpadl) is not GuestGpadl.READY:
            raise UsageError(f"GPADL {gpadl:#x} is not a ready one of channel {relid}")
        message = wire.OpenChannel(
            child_relid=relid,
            open_id=relid if open_id is None else open_id,
            ring_gpadl=gpadl,
            target_vp=wire.VP_INDEX_DISABLE_INTERRUPT if target_vp is None else target_vp,
            downstream_page_offset=downstream_page_offset,
            user_data=user_data,
        )
        sends = _send(message)
        channel.stage = GuestStage.OPENING
        channel.open_id = message.open_id
        channel.ring = gpadl
        return sends

    def close_channel(self, relid: int) -> list[act.Send]:
        """Close an open channel. No answer comes: its memory is free when its GPADLs are gone. Nothing to send on a rescinded one."""
        self._need_running()
        channel = self._known(relid)
        if channel.rescinded:
            return []
        if channel.stage is not GuestStage.OPEN:
            raise UsageError(f"channel {relid} is {channel.stage.value}, need open")
        channel.stage = GuestStage.CLOSED
        return _send(wire.CloseChannel(child_relid=relid))

    def modify_channel(self, relid: int, target_vp: int) -> list[act.Send]:
        """Move a channel's interrupts; from version 5.3 on it comes to Modified, before that there is no answer.

        Raises UsageError below version 4.1, and while another one is under way.
        """
        channel = self._channel(relid)
        assert self._version is not None
        if self._version < wire.ModifyChannel.SINCE:
            need = wire.version_text(wire.ModifyChannel.SINCE)
            raise UsageError(f"ModifyChannel needs version {need}, negotiated {wire.version_text(self._version)}")
        if channel.stage is not GuestStage.OPEN or channel.modifying:
            raise UsageError(f"channel {relid} is {'being modified' if channel.modifying else channel.stage.value}, need open")
        sends = _send(wire.ModifyChannel(child_relid=relid, target_vp=target_vp))
        channel.modifying = self._version >= wire.ModifyChannelResponse.SINCE
        return sends

    def release_relid(self, relid: int) -> list[act.Send]:
        """Give a rescinded channel's number back, once its GPADLs are gone. UsageError before."""
        self._need_running()
        channel = self._known(relid)
        if not channel.rescinded or channel.gpadls:
            have = f"has {len(channel.gpadls)} GPADLs" if channel.gpadls else "was not rescinded"
            raise UsageError(f"channel {relid} {have}, so its number cannot be released")
        del self._channels[relid]
        return _send(wire.RelidReleased(child_relid=relid))

    # The host's messages.

    def receive(self, data: bytes) -> list[act.GuestEvent]:
        """Take one message, `data` (not shared memory: a copy of what was there). `Send` among the events is to be sent.

        Raises ProtocolError for what is malformed, out of place, or not an answer to what was asked. The connection has then
        FAILED, and everything but `reset` raises.
        """
        self._need_alive()
        try:
            message = wire.parse_message(data, sender=wire.Side.HOST, version=self._version)
            if type(message) not in GUEST_ACCEPTS[self._state]:
                raise ProtocolError(f"{type(message).__name__} is not allowed while {self._state.value}")
            if self._state is GuestState.UNLOADING and not isinstance(message, wire.UnloadResponse):
                return []
            return self._handlers[type(message)](message)
        except ProtocolError as error:
            self._state = GuestState.FAILED
            self._failure = str(error)
            raise

    def _on_version(self, message: wire.VersionResponse) -> Events:
        version = self._candidates.pop(0)
        if message.version_supported and message.connection_state == wire.CONNECTION_SUCCESSFUL:
            self._state = GuestState.CONNECTED
            self._version = version
            v5 = version >= wire.VERSION_WIN10_V5
            return [act.Connected(version, message.message_connection_id if v5 else wire.MESSAGE_CONNECTION_ID)]
        if not message.version_supported and self._candidates:
            return [*self._contact()]
        self._state = GuestState.DISCONNECTED
        return [act.ConnectionRefused(message.connection_state)]

    def _on_offer(self, message: wire.OfferChannel) -> Events:
        relid, offer = message.child_relid, message.offer
        if not 1 <= relid <= wire.MAX_RELID:
            raise ProtocolError(f"offer of channel {relid}, limit 1..{wire.MAX_RELID}")
        if relid in self._channels:
            raise ProtocolError(f"offer of channel {relid}, which is offered and not released")
        if len(self._channels) >= self.limits.max_offers:
            raise ProtocolError(f"offer of channel {relid}: {len(self._channels)} are offered, limit {self.limits.max_offers}")
        key = (offer.class_guid.bytes, offer.instance_guid.bytes, offer.sub_channel_index)
        alive = {channel.key for channel in self._channels.values() if not channel.rescinded}
        if key in alive:
            raise ProtocolError(f"offer of channel {offer.sub_channel_index} of {offer.instance_guid} a second time")
        if offer.sub_channel_index and (*key[:2], 0) not in alive:
            raise ProtocolError(
                f"offer of subchannel {offer.sub_channel_index} of {offer.instance_guid} without its primary channel"
            )
        self._channels[relid] = GuestChannel(key)
        monitor = message.monitor_id if message.monitor.allocated else None
        return [act.OfferReceived(relid, offer, message.connection_id, monitor, bool(message.interrupt.dedicated))]

    def _on_all_offers(self, message: wire.AllOffersDelivered) -> Events:
        self._state = GuestState.RUNNING
        return [act.AllOffersDelivered()]

    def _on_rescind(self, message: wire.RescindChannelOffer) -> Events:
        channel = self._offered(message, message.child_relid)
        if channel.rescinded:
            raise ProtocolError(f"rescind of channel {message.child_relid} a second time")
        channel.rescinded = True
        channel.stage = GuestStage.CLOSED
        channel.modifying = False
        return [act.Rescinded(message.child_relid)]

    def _on_gpadl_created(self, message: wire.GpadlCreated) -> Events:
        handle, relid = message.gpadl, message.child_relid
        channel = self._awaited(message, handle, GuestGpadl.CREATING)
        if self._gpadls[handle] != relid:
            raise ProtocolError(f"GpadlCreated: GPADL {handle:#x} is of channel {self._gpadls[handle]}, not {relid}")
        if message.status == wire.STATUS_SUCCESS:
            channel.gpadls[handle] = GuestGpadl.READY
        else:
            self._forget(handle)
        return [act.GpadlReady(handle, relid, message.status)]

    def _on_gpadl_torndown(self, message: wire.GpadlTorndown) -> Events:
        self._awaited(message, message.gpadl, GuestGpadl.TEARING)
        return [act.GpadlGone(message.gpadl, self._forget(message.gpadl))]

    def _on_opened(self, message: wire.OpenChannelResult) -> Events:
        channel = self._offered(message, message.child_relid)
        if channel.stage is not GuestStage.OPENING or channel.open_id != message.open_id:
            raise ProtocolError(
                f"OpenChannelResult: channel {message.child_relid} is {channel.stage.value} with open_id {channel.open_id:#x}, "
                f"need opening with {message.open_id:#x}"
            )
        channel.stage = GuestStage.CLOSED if message.status else GuestStage.OPEN
        return [act.ChannelOpened(message.child_relid, message.status)]

    def _on_modified(self, message: wire.ModifyChannelResponse) -> Events:
        channel = self._offered(message, message.child_relid)
        if not channel.modifying:
            raise ProtocolError(f"ModifyChannelResponse: channel {message.child_relid} is not being modified")
        channel.modifying = False
        return [act.Modified(message.child_relid, message.status)]

    def _on_unloaded(self, message: wire.UnloadResponse) -> Events:
        self.reset()
        return [act.Unloaded()]

    # Small things.

    def _need_alive(self) -> None:
        if self._state is GuestState.FAILED:
            raise ProtocolError(f"the connection failed before: {self._failure}")

    def _need(self, *states: GuestState) -> None:
        self._need_alive()
        if self._state not in states:
            need = " or ".join(state.value for state in states)
            raise UsageError(f"the connection is {self._state.value}, need {need}")

    def _need_running(self) -> None:
        self._need(GuestState.REQUESTING, GuestState.RUNNING)

    def _known(self, relid: int) -> GuestChannel:
        channel = self._channels.get(relid)
        if channel is None:
            raise UsageError(f"no channel {relid}")
        return channel

    def _channel(self, relid: int) -> GuestChannel:
        """One to do something new with."""
        self._need_running()
        channel = self._known(relid)
        if channel.rescinded:
            raise RescindedError(f"channel {relid} was rescinded by the host")
        return channel

    def _offered(self, message: wire.Message, relid: int) -> GuestChannel:
        channel = self._channels.get(relid)
        if channel is None:
            raise ProtocolError(f"{type(message).__name__}: no channel {relid}")
        return channel

    def _awaited(self, message: wire.Message, handle: int, stage: GuestGpadl) -> GuestChannel:
        relid = self._gpadls.get(handle)
        if relid is None:
            raise ProtocolError(f"{type(message).__name__}: no GPADL {handle:#x}")
        channel = self._channels[relid]
        if channel.gpadls[handle] is not stage:
            raise ProtocolError(
                f"{type(message).__name__}: GPADL {handle:#x} is {channel.gpadls[handle].value}, need {stage.value}"
            )
        return channel

    def _free_handle(self) -> int:
        handle = self._next_gpadl if self._next_gpadl <= LAST_GPADL else FIRST_GPADL
        while handle in self._gpadls:
            handle = handle + 1 if handle < LAST_GPADL else FIRST_GPADL
        return handle

    def _forget(self, handle: int) -> int:
        relid = self._gpadls.pop(handle)
        del self._channels[relid].gpadls[handle]
        return relid
