"""The VMBus control plane, both ends, without I/O: bytes in, actions out.

**Host end**, one `HostConnection` a guest. Every method returns a list of actions, to be carried out in that order:

    host = HostConnection(HostLimits(target_vps=8))
    relid, actions = host.offer(ChannelOffer(class_guid=CLASS_NETWORK, instance_guid=guid))
    for action in host.receive(data):             # data: one message, a private copy
        match action:
            case Send(data): ...                  # one message to the guest
            case Contact(version, target_vp): ... # where messages go from now on
            case GpadlCreate(handle, relid, ranges): ...   # map, then   host.gpadl_created(handle, status)
            case GpadlTeardown(handle, relid): ...         # unmap, then host.gpadl_torn_down(handle)
            case ChannelOpen(relid=relid): ...             # start, then host.channel_opened(relid, status)
            case ChannelClose(relid): ...                  # stop, then  host.channel_closed(relid)
            case ChannelModify(relid, target_vp): ...      # at once, no answer
            case RelidReleased(relid): ...                 # the offer is gone
            case Refused(reason): ...                      # for counters and logs
            case Disconnected(): ...                       # nothing of the guest is in use any more

The four answers may come at once or at any later time; each returns further actions, and nothing is answered to the guest before.
A GPADL is torn down only when its channel has stopped: the shell never sees GpadlTeardown for the ring of a running channel.
`rescind(relid)` takes an offer back. `reset()` ends the connection silently and keeps the offers, `close()` ends it for good; both
return the clean-up, and Disconnected when it is done.

`receive` raises ProtocolError for what is malformed or fatal; the connection is then FAILED until `reset` or `close`. What is
fatal, refused or ignored is written in the tables of `states`.

    DISCONNECTED --InitiateContact--> CONNECTED --RequestOffers--> OFFERED --Unload--> DISCONNECTING --> UNLOADED
    any --ProtocolError--> FAILED --reset--> DISCONNECTING --> DISCONNECTED        any --close--> DISCONNECTING --> CLOSED

**Guest end**, one `GuestConnection`. Commands return a list of `Send`; `receive` returns events, with `Send` among them:

    guest = GuestConnection()
    guest.connect()              -> Connected(version) or ConnectionRefused
    guest.request_offers()       -> OfferReceived ..., AllOffersDelivered
    guest.create_gpadl(relid, [whole_pages(pfns)])   returns (handle, sends) -> GpadlReady(handle, relid, status)
    guest.open_channel(relid, handle, downstream_page_offset, target_vp)     -> ChannelOpened(relid, status)
    guest.modify_channel(relid, target_vp)           -> Modified(relid, status), from version 5.3 on
    guest.close_channel(relid)                       (no answer)
    guest.teardown_gpadl(handle)                     -> GpadlGone(handle, relid): only then the memory is the driver's again
    guest.release_relid(relid)                       after Rescinded(relid), when its GPADLs are gone
    guest.unload()                                   -> Unloaded: all memory is the driver's again

On Rescinded, whatever was awaited of that channel but its GPADLs' answers does not come any more.
"""

from vfio_vmbus.vmbus.actions import (
    AllOffersDelivered,
    ChannelClose,
    ChannelModify,
    ChannelOpen,
    ChannelOpened,
    Connected,
    ConnectionRefused,
    Contact,
    Disconnected,
    GpadlCreate,
    GpadlGone,
    GpadlReady,
    GpadlTeardown,
    GuestEvent,
    HostAction,
    Modified,
    OfferReceived,
    Refused,
    RelidReleased,
    Rescinded,
    Send,
    Unloaded,
)
from vfio_vmbus.vmbus.gpadl import whole_pages
from vfio_vmbus.vmbus.guest import GuestConnection
from vfio_vmbus.vmbus.host import HostConnection
from vfio_vmbus.vmbus.limits import GuestLimits, HostLimits
from vfio_vmbus.vmbus.states import ChannelView, GpadlView, GuestState, HostState

__all__ = [
    "AllOffersDelivered",
    "ChannelClose",
    "ChannelModify",
    "ChannelOpen",
    "ChannelOpened",
    "ChannelView",
    "Connected",
    "ConnectionRefused",
    "Contact",
    "Disconnected",
    "GpadlCreate",
    "GpadlGone",
    "GpadlReady",
    "GpadlTeardown",
    "GpadlView",
    "GuestConnection",
    "GuestEvent",
    "GuestLimits",
    "GuestState",
    "HostAction",
    "HostConnection",
    "HostLimits",
    "HostState",
    "Modified",
    "OfferReceived",
    "Refused",
    "RelidReleased",
    "Rescinded",
    "Send",
    "Unloaded",
    "whole_pages",
]
