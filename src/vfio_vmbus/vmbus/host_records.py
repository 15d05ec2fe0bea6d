"""What the host remembers of one channel and of one GPADL."""

from dataclasses import dataclass, field
from enum import Enum

from vfio_vmbus.vmbus.states import ChannelView, GpadlView
from vfio_vmbus.wire.vmbus import ChannelOffer, GpadlCreated, GpadlTorndown, OpenChannel


class Presence(Enum):
    """Whether the guest knows the channel."""

    HIDDEN = "hidden"  # not shown to the guest of this connection
    OFFERED = "offered"
    RESCINDED = "rescinded"  # taken back, the guest has not released it yet
    RELEASED = "released"  # goes as soon as the shell uses nothing of it


class Stage(Enum):
    """What the shell does with the channel. While OPENING and CLOSING its answer is awaited."""

    IDLE = "idle"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


class GpadlStage(Enum):
    """What the shell does with the GPADL. While CREATING and TEARING its answer is awaited."""

    CREATING = "creating"
    READY = "ready"
    WAITING = "waiting"  # to be torn down as soon as its channel has stopped
    TEARING = "tearing"
    DETACHED = "detached"  # torn down after a rescind, the guest has not said so yet


@dataclass(slots=True, eq=False)
class HostGpadl:
    """A complete GPADL. `answer` is what the guest hears when it is gone, if anything."""

    handle: int
    relid: int
    pages: int
    ring_pages: int
    stage: GpadlStage = GpadlStage.CREATING
    retired: bool = False  # its channel was rescinded
    orphaned: bool = False  # its channel was released, or the guest has gone
    answer: GpadlTorndown | GpadlCreated | None = None


@dataclass(slots=True, eq=False)
class HostChannel:
    """An offer and what became of it. `request` is the open request in force, `reopen` the next, held back while the last one ends."""

    relid: int
    offer: ChannelOffer
    presence: Presence = Presence.HIDDEN
    stage: Stage = Stage.IDLE
    request: OpenChannel | None = None
    reopen: OpenChannel | None = None
    gpadls: dict[int, HostGpadl] = field(default_factory=dict)

    @property
    def key(self) -> tuple[bytes, bytes, int]:
        """What the device and this channel of it are recognised by."""
        offer = self.offer
        return offer.class_guid.bytes, offer.instance_guid.bytes, offer.sub_channel_index

    @property
    def view(self) -> ChannelView:
        """The channel as its guest knows it."""
        if self.presence is Presence.RESCINDED:
            return ChannelView.RESCINDED
        if self.presence is not Presence.OFFERED:
            return ChannelView.UNKNOWN
        if self.reopen is not None:
            return ChannelView.REOPENING
        return _VIEWS[self.stage]

    @property
    def stopping(self) -> bool:
        """Whether the shell has still to stop it; until then its GPADLs stay."""
        return self.stage is Stage.CLOSING or (self.stage is Stage.OPENING and self.presence is not Presence.OFFERED)

    def gpadl_view(self, gpadl: HostGpadl) -> GpadlView:
        """The GPADL as its guest knows it."""
        if gpadl.orphaned:
            return GpadlView.ORPHANED
        if gpadl.stage is GpadlStage.CREATING or isinstance(gpadl.answer, GpadlCreated):
            return GpadlView.CREATING
        if gpadl.answer is not None:
            return GpadlView.TEARING
        if gpadl.retired:
            return GpadlView.RETIRED
        return GpadlView.RING if self._is_ring(gpadl.handle) else GpadlView.READY

    def _is_ring(self, handle: int) -> bool:
        wanted = self.request if self.stage in (Stage.OPENING, Stage.OPEN) else self.reopen
        return wanted is not None and wanted.ring_gpadl == handle


_VIEWS = {
    Stage.IDLE: ChannelView.CLOSED,
    Stage.OPENING: ChannelView.OPENING,
    Stage.OPEN: ChannelView.OPEN,
    Stage.CLOSING: ChannelView.CLOSING,
}
