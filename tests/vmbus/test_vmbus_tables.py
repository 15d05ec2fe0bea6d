"""All pairs of state and message, from the tables: each does what its outcome says, and no exception but ProtocolError comes out."""

import pytest

from tests.vmbus.world import Shell, nic
from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.vmbus import (
    ChannelView,
    GpadlView,
    GuestConnection,
    GuestState,
    HostConnection,
    HostState,
    Refused,
    Send,
    whole_pages,
)
from vfio_vmbus.vmbus.gpadl import gpadl_messages
from vfio_vmbus.vmbus.states import CHANNEL_OUTCOMES, GPADL_OUTCOMES, GUEST_ACCEPTS, HOST_ACCEPTS, Outcome
from vfio_vmbus.wire import vmbus as wire

RING, SPARE, OTHER = 0x10, 0x11, 0x12
KINDS = tuple(wire.MESSAGES.values())
FROM_GUEST = tuple(kind for kind in KINDS if kind.SENDER is wire.Side.GUEST)
FROM_HOST = tuple(kind for kind in KINDS if kind.SENDER is wire.Side.HOST)


def named(value):
    return value.__name__ if isinstance(value, type) else value.name.lower()


def contact(version):
    target = wire.TargetInfo.of(sint=wire.MESSAGE_SINT) if version >= wire.VERSION_WIN10_V5 else wire.TargetInfo(0)
    return wire.InitiateContact(version_requested=version, target_info=target)


class Bench:
    """A host that is fed single messages, and a shell that answers when told to."""

    def __init__(self, version=wire.VERSION_WIN10_V5_3):
        self.version = version
        self.host = HostConnection()
        self.shell = Shell(self.host)
        self.host.offer(nic(1))
        self.host.offer(nic(2))

    def feed(self, *messages):
        return [action for message in messages for action in self.shell.do(self.host.receive(message.pack()))]

    def to_offered(self):
        self.feed(contact(self.version), wire.RequestOffers())
        return self

    def create(self, handle, relid=1, pages=8):
        self.feed(*gpadl_messages(relid, handle, [whole_pages(range(pages))]))
        self.shell.answer()

    def open_request(self, ring=RING):
        return wire.OpenChannel(child_relid=1, open_id=1, ring_gpadl=ring, downstream_page_offset=4)


def to_host_state(state):
    bench = Bench()
    if state is not HostState.DISCONNECTED:
        bench.feed(contact(bench.version))
    if state in (HostState.OFFERED, HostState.DISCONNECTING):
        bench.feed(wire.RequestOffers())
    if state is HostState.DISCONNECTING:
        bench.create(RING)
        bench.feed(wire.Unload())
    if state is HostState.UNLOADED:
        bench.feed(wire.Unload())
    if state is HostState.FAILED:
        with pytest.raises(ProtocolError):
            bench.feed(wire.UnloadResponse())
    if state is HostState.CLOSED:
        bench.shell.do(bench.host.close())
    assert bench.host.state is state
    return bench


VALID = {
    wire.InitiateContact: contact(wire.VERSION_WIN10_V5_3),
    wire.GpadlHeader: wire.GpadlHeader(child_relid=1, gpadl=1, range_bytes=16, range_count=1, words=(4096, 1)),
    wire.GpadlBody: wire.GpadlBody(gpadl=1, words=(1,)),
}


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("state", [item for item in HostState if item is not HostState.CLOSED], ids=named)
def test_host_state_and_message(state, kind):
    bench = to_host_state(state)
    message = VALID.get(kind) or kind()
    fatal = kind not in HOST_ACCEPTS[state]
    if not fatal and kind in GPADL_OUTCOMES:
        fatal = GPADL_OUTCOMES[kind][GpadlView.UNKNOWN] is Outcome.FATAL
    if not fatal and kind in CHANNEL_OUTCOMES and state is HostState.OFFERED:  # relid 0, or a GPADL on the closed channel 1
        fatal = CHANNEL_OUTCOMES[kind][ChannelView.UNKNOWN] is Outcome.FATAL
    if fatal:
        with pytest.raises(ProtocolError):
            bench.feed(message)
        assert bench.host.state is HostState.FAILED
        with pytest.raises(ProtocolError, match="failed before"):
            bench.feed(contact(bench.version))
    else:
        bench.feed(message)
        assert bench.host.state is not HostState.FAILED
    bench.shell.end()


def to_channel_view(view, version):
    bench = Bench(version).to_offered()
    bench.create(RING)
    bench.create(SPARE)
    if view not in (ChannelView.UNKNOWN, ChannelView.CLOSED):
        bench.feed(bench.open_request())
    if view not in (ChannelView.UNKNOWN, ChannelView.CLOSED, ChannelView.OPENING):
        bench.shell.answer()
    if view in (ChannelView.CLOSING, ChannelView.REOPENING):
        bench.feed(wire.CloseChannel(child_relid=1))
    if view is ChannelView.REOPENING:
        bench.feed(bench.open_request())
    if view is ChannelView.RESCINDED:
        bench.shell.do(bench.host.rescind(1))
    if view is not ChannelView.UNKNOWN:
        assert bench.host.channel_view(1) is view
    return bench


def channel_message(kind, relid):
    return {
        wire.OpenChannel: wire.OpenChannel(child_relid=relid, open_id=9, ring_gpadl=SPARE, downstream_page_offset=4),
        wire.CloseChannel: wire.CloseChannel(child_relid=relid),
        wire.ModifyChannel: wire.ModifyChannel(child_relid=relid, target_vp=1),
        wire.GpadlHeader: wire.GpadlHeader(child_relid=relid, gpadl=OTHER, range_bytes=16, range_count=1, words=(4096, 1)),
        wire.GpadlTeardown: wire.GpadlTeardown(child_relid=relid, gpadl=SPARE),
        wire.RelidReleased: wire.RelidReleased(child_relid=relid),
    }[kind]


def refusal(actions):
    """Whether the last action is an answer with a failure, told to the shell as well."""
    if len(actions) != 2 or not isinstance(actions[0], Refused) or not isinstance(actions[1], Send):
        return False
    return wire.parse_message(actions[1].data, sender=wire.Side.HOST).status != 0


def snapshot(bench):
    views = {handle: bench.host.gpadl_view(handle) for handle in bench.host.gpadl_handles}
    return bench.host.channel_view(1), views, list(bench.shell.asked)


@pytest.mark.parametrize("version", [wire.VERSION_WIN10_V4_1, wire.VERSION_WIN10_V5_3], ids=wire.version_text)
@pytest.mark.parametrize("kind", CHANNEL_OUTCOMES, ids=named)
@pytest.mark.parametrize("view", ChannelView, ids=named)
def test_channel_view_and_message(view, kind, version):
    bench = to_channel_view(view, version)
    relid = 99 if view is ChannelView.UNKNOWN else 1
    outcome = CHANNEL_OUTCOMES[kind][view]
    if kind is wire.ModifyChannel and outcome is Outcome.REFUSE and version < wire.VERSION_WIN10_V5_3:
        outcome = Outcome.FATAL
    before = snapshot(bench)
    message = channel_message(kind, relid)
    if outcome is Outcome.FATAL:
        with pytest.raises(ProtocolError):
            bench.feed(message)
    else:
        actions = bench.feed(message)
        after = snapshot(bench)
        assert refusal(actions) == (outcome is Outcome.REFUSE)
        if outcome in (Outcome.IGNORE, Outcome.REFUSE):
            assert after == before
        if outcome is Outcome.IGNORE:
            assert actions == []
        if outcome is Outcome.ACT:
            assert after != before or actions
    bench.shell.answer_all()
    bench.shell.end()


def to_gpadl_view(view):
    """A host with one GPADL, number OTHER, on channel 1."""
    bench = Bench().to_offered()
    if view is GpadlView.UNFINISHED:
        bench.feed(wire.GpadlHeader(child_relid=1, gpadl=OTHER, range_bytes=24, range_count=1, words=(8192, 1)))
    elif view is GpadlView.CREATING:
        bench.feed(*gpadl_messages(1, OTHER, [whole_pages(range(8))]))
    elif view is not GpadlView.UNKNOWN:
        bench.create(OTHER)
    if view is GpadlView.RING:
        bench.feed(bench.open_request(OTHER))
    if view is GpadlView.TEARING:
        bench.feed(wire.GpadlTeardown(child_relid=1, gpadl=OTHER))
    if view is GpadlView.RETIRED:
        bench.shell.do(bench.host.rescind(1))
    if view is GpadlView.ORPHANED:
        bench.feed(wire.RelidReleased(child_relid=1))
    assert bench.host.gpadl_view(OTHER) is view
    return bench


@pytest.mark.parametrize("kind", GPADL_OUTCOMES, ids=named)
@pytest.mark.parametrize("view", GpadlView, ids=named)
def test_gpadl_view_and_message(view, kind):
    bench = to_gpadl_view(view)
    message = {
        wire.GpadlHeader: wire.GpadlHeader(child_relid=2, gpadl=OTHER, range_bytes=16, range_count=1, words=(4096, 1)),
        wire.GpadlBody: wire.GpadlBody(gpadl=OTHER, words=(2,)),
        wire.GpadlTeardown: wire.GpadlTeardown(child_relid=1, gpadl=OTHER),
    }[kind]
    outcome = GPADL_OUTCOMES[kind][view]
    if outcome is Outcome.FATAL:
        with pytest.raises(ProtocolError):
            bench.feed(message)
    else:
        actions = bench.feed(message)
        assert refusal(actions) == (outcome is Outcome.REFUSE)
        if outcome is Outcome.REFUSE:
            assert bench.host.gpadl_view(OTHER) is view
        else:
            assert bench.host.gpadl_view(OTHER) is not view or actions
    bench.shell.answer_all()
    bench.shell.end()


def to_guest_state(state):
    guest = GuestConnection()
    if state is not GuestState.DISCONNECTED:
        guest.connect()
    if state in (GuestState.CONNECTED, GuestState.REQUESTING, GuestState.RUNNING, GuestState.UNLOADING):
        guest.receive(wire.VersionResponse(version_supported=1).pack())
    if state in (GuestState.REQUESTING, GuestState.RUNNING, GuestState.UNLOADING):
        guest.request_offers()
    if state in (GuestState.RUNNING, GuestState.UNLOADING):
        guest.receive(wire.AllOffersDelivered().pack())
    if state is GuestState.UNLOADING:
        guest.unload()
    if state is GuestState.FAILED:
        with pytest.raises(ProtocolError):
            guest.receive(b"")
    assert guest.state is state
    return guest


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("state", GuestState, ids=named)
def test_guest_state_and_message(state, kind):
    """Here no channel was offered and nothing asked, so of what is allowed only offers and ends of lists are in place."""
    guest = to_guest_state(state)
    message = wire.OfferChannel(child_relid=1, offer=nic()) if kind is wire.OfferChannel else kind()
    unasked = state in (GuestState.REQUESTING, GuestState.RUNNING) and kind not in (wire.OfferChannel, wire.AllOffersDelivered)
    if kind not in GUEST_ACCEPTS[state] or unasked:
        with pytest.raises(ProtocolError):
            guest.receive(message.pack())
        assert guest.state is GuestState.FAILED
        with pytest.raises(ProtocolError, match="failed before"):
            guest.connect()
        guest.reset()
        assert guest.connect()
    else:
        events = guest.receive(message.pack())
        assert bool(events) == (state is not GuestState.UNLOADING or kind is wire.UnloadResponse)


def test_the_tables_know_every_message():
    assert set().union(*HOST_ACCEPTS.values()) == set(FROM_GUEST)
    assert set().union(*GUEST_ACCEPTS.values()) == set(FROM_HOST)
    assert (
        set(CHANNEL_OUTCOMES) | {wire.GpadlBody} | HOST_ACCEPTS[HostState.CONNECTED] - {wire.RequestOffers}
        == HOST_ACCEPTS[HostState.OFFERED]
    )
