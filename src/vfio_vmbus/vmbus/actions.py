"""What the two ends hand out: bytes to send, work for whoever stands around them, news.

All are small frozen records. `Send` belongs to both ends. A `HostAction` is to be carried out in the order of the list;
where its docstring names a call, the connection waits for that call. A `GuestEvent` is news for the driver.
"""

from dataclasses import dataclass

from vfio_vmbus.wire.gpa import PageRange
from vfio_vmbus.wire.vmbus import ChannelOffer


@dataclass(frozen=True, slots=True)
class Send:
    """One message for the other side, at most 240 bytes. Order matters."""

    data: bytes


# Host: work for the shell.


@dataclass(frozen=True, slots=True)
class Contact:
    """The guest asked for a connection: from now on messages go to processor `target_vp`, the answer (which comes next) first.

    version: what was agreed, None if nothing was. monitor_pages: addresses in bytes of the pages from host to guest and from guest to
    host, (0, 0) when the guest has none. Nothing to answer.
    """

    version: int | None
    target_vp: int
    monitor_pages: tuple[int, int]


@dataclass(frozen=True, slots=True)
class GpadlCreate:
    """Map the pages of `ranges` (IOVA page numbers, 4096 bytes each). Answer: `gpadl_created(handle, status)`."""

    handle: int
    relid: int
    ranges: tuple[PageRange, ...]


@dataclass(frozen=True, slots=True)
class GpadlTeardown:
    """Stop using a GPADL's memory and unmap it. Answer: `gpadl_torn_down(handle)`."""

    handle: int
    relid: int


@dataclass(frozen=True, slots=True)
class ChannelOpen:
    """Start a channel. Answer: `channel_opened(relid, status)`.

    The ring towards the host is pages 0..`downstream_page_offset` of the GPADL, the ring towards the guest the rest.
    `target_vp` is where its interrupts go, None for no interrupts.
    """

    relid: int
    open_id: int
    ring_gpadl: int
    downstream_page_offset: int
    target_vp: int | None
    user_data: bytes


@dataclass(frozen=True, slots=True)
class ChannelClose:
    """Stop a channel; its GPADLs stay until they are torn down. Answer: `channel_closed(relid)`."""

    relid: int


@dataclass(frozen=True, slots=True)
class ChannelModify:
    """Send the channel's interrupts to `target_vp`, and none elsewhere by the time the list's next action is carried out. No answer."""

    relid: int
    target_vp: int


@dataclass(frozen=True, slots=True)
class RelidReleased:
    """The offer is gone on both sides, nothing of it is in use, and its number may come again."""

    relid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A request was answered with a failure. Nothing to do; `reason` is for counters and logs."""

    reason: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The guest's connection has ended, and nothing of its memory is in use any more."""


HostAction = (
    Send
    | Contact
    | GpadlCreate
    | GpadlTeardown
    | ChannelOpen
    | ChannelClose
    | ChannelModify
    | RelidReleased
    | Refused
    | Disconnected
)


# Guest: news for the driver.


@dataclass(frozen=True, slots=True)
class Connected:
    """The host agreed to `version`. `message_connection_id` is where further messages go (SynIC; no matter on an admin ring)."""

    version: int
    message_connection_id: int


@dataclass(frozen=True, slots=True)
class ConnectionRefused:
    """The host has no version in common (`connection_state` 0), or failed to set up the connection (not 0)."""

    connection_state: int


@dataclass(frozen=True, slots=True)
class OfferReceived:
    """A channel may be opened. `connection_id` is the number of its doorbell; `monitor_id` None unless the host uses monitor pages."""

    relid: int
    offer: ChannelOffer
    connection_id: int
    monitor_id: int | None
    dedicated_interrupt: bool


@dataclass(frozen=True, slots=True)
class AllOffersDelivered:
    """The answer to `request_offers` is complete."""


@dataclass(frozen=True, slots=True)
class Rescinded:
    """The channel is gone. Tear its GPADLs down, then `release_relid`. An open or modify under way gets no further event."""

    relid: int


@dataclass(frozen=True, slots=True)
class GpadlReady:
    """Answer to `create_gpadl`. With a `status` other than 0 there is no such GPADL."""

    handle: int
    relid: int
    status: int


@dataclass(frozen=True, slots=True)
class GpadlGone:
    """Answer to `teardown_gpadl`: the host does not touch that memory any more."""

    handle: int
    relid: int


@dataclass(frozen=True, slots=True)
class ChannelOpened:
    """Answer to `open_channel`. With a `status` other than 0 it is closed."""

    relid: int
    status: int


@dataclass(frozen=True, slots=True)
class Modified:
    """Answer to `modify_channel`, from version 5.3 on."""

    relid: int
    status: int


@dataclass(frozen=True, slots=True)
class Unloaded:
    """Answer to `unload`: the host has forgotten this guest and its memory."""


GuestEvent = (
    Send
    | Connected
    | ConnectionRefused
    | OfferReceived
    | AllOffersDelivered
    | Rescinded
    | GpadlReady
    | GpadlGone
    | ChannelOpened
    | Modified
    | Unloaded
)
