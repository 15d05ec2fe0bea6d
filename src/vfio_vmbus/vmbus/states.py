"""The states of both ends and the tables that say which message may come when.

The host's answer to a message of its guest is one of four `Outcome`s. The rule behind the tables: what the protocol has a
status for is answered with a failure (REFUSE), everything else that a correct guest cannot have sent is FATAL to the
connection, as is every malformed message. One exception: a GPADL handle that is in use is FATAL in a second header, because an
answer would name the first one. A rescind crosses the guest's messages on the way, so on a rescinded channel nothing is FATAL
that was right before; as on Hyper-V, a rescinded channel's open and modify get no answer, its GPADLs do.
"""

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType

from vfio_vmbus.wire import vmbus as wire


class Outcome(Enum):
    """What a host makes of a well-formed message."""

    ACT = auto()
    REFUSE = auto()  # answered with a failure, nothing changes
    IGNORE = auto()  # right when it was sent
    FATAL = auto()  # ProtocolError


ACT, REFUSE, IGNORE, FATAL = Outcome


class HostState(Enum):
    """The host end of a connection."""

    DISCONNECTED = "disconnected"
    CONNECTED = "connected"  # a version is agreed
    OFFERED = "offered"  # the guest asked for offers
    DISCONNECTING = "disconnecting"  # the shell still closes channels and GPADLs
    UNLOADED = "unloaded"  # as DISCONNECTED, after the guest's Unload: it still says of each channel that it has forgotten it
    FAILED = "failed"  # after a ProtocolError; wants reset() or close()
    CLOSED = "closed"


_CHANNEL_MESSAGES = frozenset(
    {
        wire.OpenChannel,
        wire.CloseChannel,
        wire.GpadlHeader,
        wire.GpadlBody,
        wire.GpadlTeardown,
        wire.RelidReleased,
        wire.ModifyChannel,
    }
)

HOST_ACCEPTS: Mapping[HostState, frozenset[type[wire.Message]]] = MappingProxyType(
    {
        HostState.DISCONNECTED: frozenset({wire.InitiateContact}),
        HostState.CONNECTED: frozenset({wire.InitiateContact, wire.RequestOffers, wire.Unload, wire.TlConnectRequest}),
        HostState.OFFERED: _CHANNEL_MESSAGES | {wire.InitiateContact, wire.Unload, wire.TlConnectRequest},
        HostState.DISCONNECTING: frozenset({wire.InitiateContact}),
        HostState.UNLOADED: frozenset({wire.InitiateContact, wire.RelidReleased}),
        HostState.FAILED: frozenset(),
        HostState.CLOSED: frozenset(),
    }
)
"""Every other message in that state is fatal. A second InitiateContact means that the guest starts anew (a crash kernel does).

A guest that has unloaded may still say of its channels that it is done with them, which the host has done already."""


class ChannelView(Enum):
    """A channel as its guest knows it."""

    UNKNOWN = "unknown"  # never offered to this guest, or released by it
    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"  # closed by the guest, the shell still stops it
    REOPENING = "reopening"  # opened again while the shell still stops it
    RESCINDED = "rescinded"  # and not yet released


def _row(*outcomes: Outcome) -> Mapping[ChannelView, Outcome]:
    return MappingProxyType(dict(zip(ChannelView, outcomes, strict=True)))


# fmt: off
CHANNEL_OUTCOMES: Mapping[type[wire.Message], Mapping[ChannelView, Outcome]] = MappingProxyType(
    {
        #                         unknown closed opening open    closing reopening rescinded
        wire.OpenChannel:    _row(REFUSE, ACT,    REFUSE, REFUSE, ACT,    REFUSE, IGNORE),
        wire.CloseChannel:   _row(FATAL,  FATAL,  FATAL,  ACT,    FATAL,  FATAL,  IGNORE),
        wire.ModifyChannel:  _row(REFUSE, REFUSE, REFUSE, ACT,    REFUSE, REFUSE, IGNORE),
        wire.GpadlHeader:    _row(REFUSE, ACT,    ACT,    ACT,    ACT,    ACT,    REFUSE),
        wire.GpadlTeardown:  _row(FATAL,  ACT,    ACT,    ACT,    ACT,    ACT,    ACT),
        wire.RelidReleased:  _row(FATAL,  ACT,    FATAL,  FATAL,  ACT,    FATAL,  ACT),
    }
)
# fmt: on
"""ModifyChannel has an answer from version 5.3 on only; before, REFUSE is FATAL there."""


class GpadlView(Enum):
    """A GPADL as its guest knows it."""

    UNKNOWN = "unknown"
    UNFINISHED = "unfinished"  # bodies are still to come
    CREATING = "creating"  # complete, not yet answered
    READY = "ready"
    RING = "ring"  # ready, and the ring of a channel that opens or is open
    TEARING = "tearing down"
    RETIRED = "retired"  # its channel is rescinded, the guest may still tear it down
    ORPHANED = "orphaned"  # its channel is released, the shell still uses it


GPADL_OUTCOMES: Mapping[type[wire.Message], Mapping[GpadlView, Outcome]] = MappingProxyType(
    {
        wire.GpadlHeader: MappingProxyType(
            dict.fromkeys(GpadlView, FATAL) | {GpadlView.UNKNOWN: ACT, GpadlView.ORPHANED: REFUSE}
        ),
        wire.GpadlBody: MappingProxyType(dict.fromkeys(GpadlView, FATAL) | {GpadlView.UNFINISHED: ACT}),
        wire.GpadlTeardown: MappingProxyType(
            dict.fromkeys(GpadlView, FATAL) | {GpadlView.READY: ACT, GpadlView.RETIRED: ACT},
        ),
    }
)
"""A header counts what its channel's row says as well: the worse of both."""


class GuestState(Enum):
    """The guest end of a connection."""

    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"  # a version is asked for
    CONNECTED = "connected"
    REQUESTING = "requesting offers"
    RUNNING = "running"  # all offers delivered
    UNLOADING = "unloading"
    FAILED = "failed"  # after a ProtocolError; wants reset()


_NEWS = frozenset(
    {
        wire.OfferChannel,
        wire.RescindChannelOffer,
        wire.GpadlCreated,
        wire.GpadlTorndown,
        wire.OpenChannelResult,
        wire.ModifyChannelResponse,
    }
)

GUEST_ACCEPTS: Mapping[GuestState, frozenset[type[wire.Message]]] = MappingProxyType(
    {
        GuestState.DISCONNECTED: frozenset(),
        GuestState.CONNECTING: frozenset({wire.VersionResponse}),
        GuestState.CONNECTED: frozenset(),
        GuestState.REQUESTING: _NEWS | {wire.AllOffersDelivered},
        GuestState.RUNNING: _NEWS,
        GuestState.UNLOADING: _NEWS | {wire.AllOffersDelivered, wire.UnloadResponse},
        GuestState.FAILED: frozenset(),
    }
)
"""Every other message is fatal. While unloading, what crossed the Unload on the way is ignored."""
