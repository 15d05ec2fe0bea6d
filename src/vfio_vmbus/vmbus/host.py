"""The host end of one guest's VMBus connection: version, offers, the orderly end. Channels and GPADLs are in `host_channels`.

Facts from OpenVMM's vmbus_server and drivers/hv/connection.c of Linux: the guest asks for one version at a time, newest first; a
second InitiateContact ends the running connection first; UnloadResponse comes when nothing of the guest's memory is in use.
"""

from vfio_vmbus.errors import ClosedError, ProtocolError, UsageError
from vfio_vmbus.vmbus.actions import Contact, Disconnected, HostAction
from vfio_vmbus.vmbus.host_channels import Actions, HostChannels, send
from vfio_vmbus.vmbus.host_records import Presence
from vfio_vmbus.vmbus.limits import HostLimits
from vfio_vmbus.vmbus.states import HOST_ACCEPTS, ChannelView, GpadlView, HostState
from vfio_vmbus.wire import vmbus as wire


class HostConnection:
    """One guest's connection: `receive` takes its messages, each method returns what is to be done, in order.

    `max_version` and `min_version` (major << 16 | minor) bound what is agreed to. monitored: channels have a bit in the monitor page,
    as many as it has bits for, and guests signal by it.
    """

    def __init__(
        self,
        limits: HostLimits | None = None,
        *,
        max_version: int = wire.SUPPORTED_VERSIONS[0],
        min_version: int = wire.SUPPORTED_VERSIONS[-1],
        monitored: bool = False,
    ) -> None:
        self._versions = frozenset(item for item in wire.SUPPORTED_VERSIONS if min_version <= item <= max_version)
        if not self._versions:
            raise UsageError(f"no version from {wire.version_text(min_version)} to {wire.version_text(max_version)} is supported")
        self._channels = HostChannels(limits or HostLimits(), monitored=monitored)
        self._state = HostState.DISCONNECTED
        self._version: int | None = None
        self._failure = ""
        self._cleanup: Actions = []
        self._after = HostState.DISCONNECTED
        self._then: wire.Unload | wire.InitiateContact | None = None

    # What there is.

    @property
    def state(self) -> HostState:
        return self._state

    @property
    def version(self) -> int | None:
        """The version agreed, major << 16 | minor, until the connection has ended."""
        return self._version

    @property
    def relids(self) -> tuple[int, ...]:
        """All channels offered or to be offered, and those that are not yet released."""
        return self._channels.relids

    @property
    def open_relids(self) -> tuple[int, ...]:
        """Channels that the shell was told to open, and has not yet reported closed."""
        return self._channels.open_relids

    @property
    def gpadl_handles(self) -> tuple[int, ...]:
        """GPADLs that the host remembers, unfinished ones included."""
        return self._channels.gpadl_handles

    def offer_of(self, relid: int) -> wire.ChannelOffer:
        """What was offered under this number. Raises UsageError when nothing is."""
        return self._channels.offer_of(relid)

    def channel_view(self, relid: int) -> ChannelView:
        """The channel as its guest knows it."""
        return self._channels.view(relid)

    def gpadl_view(self, handle: int) -> GpadlView:
        """The GPADL as its guest knows it."""
        return self._channels.gpadl_view(handle)

    # The guest's messages.

    def receive(self, data: bytes) -> list[HostAction]:
        """Take one message, `data` (not shared memory: a copy of what was there).

        Raises ProtocolError for one that is malformed or fatal (see `states`). The connection has then FAILED: every further
        message raises as well, and `reset` or `close` returns what is to be cleaned up. Raises ClosedError after `close`.
        """
        self._need_open()
        if self._state is HostState.FAILED:
            raise ProtocolError(f"the connection failed before: {self._failure}")
        try:
            message = wire.parse_message(data, sender=wire.Side.GUEST, version=self._version)
            if type(message) not in HOST_ACCEPTS[self._state]:
                raise ProtocolError(f"{type(message).__name__} is not allowed while {self._state.value}")
            actions = self._carry_out(message)
        except ProtocolError as error:
            self._state = HostState.FAILED
            self._failure = str(error)
            self._cleanup = self._channels.let_all_go(Presence.HIDDEN)
            raise
        return self._advance(actions)

    def _carry_out(self, message: wire.Message) -> Actions:
        match message:
            case wire.InitiateContact():
                if self._state in (HostState.DISCONNECTED, HostState.UNLOADED):
                    return self._negotiate(message)
                return self._disconnect(HostState.DISCONNECTED, message)
            case wire.Unload():
                return self._disconnect(HostState.UNLOADED, message)
            case wire.RelidReleased() if self._state is HostState.UNLOADED:
                return []
            case wire.RequestOffers():
                self._state = HostState.OFFERED
                return [*self._channels.show_all(), send(wire.AllOffersDelivered())]
            case wire.TlConnectRequest():
                return []  # there is nobody to connect to; the guest waits for an offer until its time is up
            case _:
                return self._channels.receive(message)

    def _negotiate(self, contact: wire.InitiateContact) -> Actions:
        version, target = contact.version_requested, contact.target_info
        v5 = version >= wire.VERSION_WIN10_V5
        monitor = contact.monitor_page1, contact.monitor_page2
        if version not in self._versions or (v5 and (target.sint != wire.MESSAGE_SINT or target.vtl != 0)):
            return [Contact(None, contact.target_vcpu, monitor), send(wire.VersionResponse(version_supported=0))]
        failed = (monitor[0] == 0) != (monitor[1] == 0)
        if not failed:
            self._state = HostState.CONNECTED
            self._version = version
            self._channels.answers_modify = version >= wire.VERSION_WIN10_V5_3
        response = wire.VersionResponse(
            version_supported=1,
            connection_state=wire.CONNECTION_FAILED_UNKNOWN if failed else wire.CONNECTION_SUCCESSFUL,
            message_connection_id=wire.MESSAGE_CONNECTION_ID_4 if v5 else version,
        )
        return [Contact(None if failed else version, contact.target_vcpu, monitor), send(response)]

    # The end of a connection.

    def _disconnect(self, after: HostState, then: wire.Unload | wire.InitiateContact | None) -> Actions:
        self._state = HostState.DISCONNECTING
        self._after = after
        self._then = then
        return self._channels.let_all_go(Presence.RELEASED if after is HostState.CLOSED else Presence.HIDDEN)

    def _advance(self, actions: Actions) -> Actions:
        """Once nothing of the guest is in use any more, the connection that ends has ended."""
        if self._state is not HostState.DISCONNECTING or not self._channels.idle:
            return actions
        self._state = self._after
        self._version = None
        then, self._then = self._then, None
        actions.append(Disconnected())
        if isinstance(then, wire.Unload):
            actions.append(send(wire.UnloadResponse()))
        elif then is not None:
            actions += self._negotiate(then)
        return actions

    def reset(self) -> list[HostAction]:
        """End the connection without a word to the guest, as a reset of the device does; offers stay for the next one.

        `Disconnected` comes last, here or after the shell's last answer. Raises ClosedError after `close`.
        """
        self._need_open()
        return self._end(HostState.DISCONNECTED)

    def close(self) -> list[HostAction]:
        """End the connection for good, and every offer with it. `Disconnected` comes last, as with `reset`. Twice does no harm."""
        return [] if self._state is HostState.CLOSED else self._end(HostState.CLOSED)

    def _need_open(self) -> None:
        if self._after is HostState.CLOSED:  # so from close() on, before the shell has answered
            raise ClosedError("the host has closed this VMBus connection")

    def _end(self, after: HostState) -> Actions:
        cleanup, self._cleanup = self._cleanup, []
        return self._advance(cleanup + self._disconnect(after, None))

    # The host's own commands.

    def offer(self, offer: wire.ChannelOffer) -> tuple[int, list[HostAction]]:
        """Offer a channel: its relid, and what to send, if the guest has asked for offers already.

        A subchannel (sub_channel_index 1 and up) has its primary channel's GUIDs. Raises UsageError for one too many, for one that
        is offered already, for a subchannel alone; ClosedError after `close`.
        """
        self._need_open()
        channel = self._channels.add(offer)
        return channel.relid, [self._channels.show(channel)] if self._state is HostState.OFFERED else []

    def rescind(self, relid: int) -> list[HostAction]:
        """Take an offer back, a primary channel together with its subchannels. `RelidReleased` follows, at once or later.

        Raises UsageError for a relid that is not offered, or taken back already.
        """
        return self._advance(self._channels.rescind(relid))

    # The shell's answers. Each raises UsageError when nothing of the kind was asked for.

    def gpadl_created(self, handle: int, status: int = wire.STATUS_SUCCESS) -> list[HostAction]:
        """Answer to GpadlCreate. With a `status` other than 0 (an NTSTATUS) the shell uses nothing of it."""
        return self._advance(self._channels.gpadl_created(handle, status))

    def gpadl_torn_down(self, handle: int) -> list[HostAction]:
        """Answer to GpadlTeardown: its memory is not touched any more."""
        return self._advance(self._channels.gpadl_torn_down(handle))

    def channel_opened(self, relid: int, status: int = wire.STATUS_SUCCESS) -> list[HostAction]:
        """Answer to ChannelOpen. With a `status` other than 0 (an NTSTATUS) it stays closed."""
        return self._advance(self._channels.channel_opened(relid, status))

    def channel_closed(self, relid: int) -> list[HostAction]:
        """Answer to ChannelClose: its rings are not touched any more."""
        return self._advance(self._channels.channel_closed(relid))
