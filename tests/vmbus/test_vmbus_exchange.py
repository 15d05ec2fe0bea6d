"""Every exchange of the control plane, through two real endpoints."""

import pytest

from tests.vmbus.world import World, nic
from vfio_vmbus.errors import ClosedError, ProtocolError, RescindedError, UsageError
from vfio_vmbus.vmbus import (
    AllOffersDelivered,
    ChannelOpen,
    ChannelOpened,
    ChannelView,
    Connected,
    ConnectionRefused,
    Contact,
    GpadlCreate,
    GpadlGone,
    GpadlReady,
    GpadlView,
    GuestState,
    HostLimits,
    HostState,
    Modified,
    OfferReceived,
    Rescinded,
    Send,
    Unloaded,
    whole_pages,
)
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.gpa import PageRange


@pytest.mark.parametrize("version", wire.SUPPORTED_VERSIONS)
def test_guest_walks_down_to_the_hosts_version(version):
    world = World(max_version=version)
    events = world.run(world.guest.connect())
    expected = wire.MESSAGE_CONNECTION_ID_4 if version >= wire.VERSION_WIN10_V5 else wire.MESSAGE_CONNECTION_ID
    assert [event for event in events if not isinstance(event, Send)] == [Connected(version, expected)]
    assert len(events) == wire.SUPPORTED_VERSIONS.index(version) + 1  # one more contact for each version refused
    assert world.host.version == world.guest.version == version


def test_guest_asks_for_no_more_than_its_own_version():
    world = World().start(max_version=wire.VERSION_WIN10)
    assert world.host.version == wire.VERSION_WIN10


def test_no_version_in_common_is_told_and_may_be_tried_again():
    world = World(min_version=wire.VERSION_WIN10_V5)
    assert world.run(world.guest.connect(max_version=wire.VERSION_WIN10))[-1] == ConnectionRefused(0)
    assert world.guest.state is GuestState.DISCONNECTED
    world.start()
    assert world.guest.state is GuestState.RUNNING


def test_offers_come_primary_first_then_the_end_then_hot_plugged_ones():
    world = World()
    for offer in (nic(1), nic(2), nic(1, 1)):
        world.host.offer(offer)
    world.run(world.guest.connect())
    events = world.run(world.guest.request_offers())
    assert [(event.relid, event.offer) for event in events[:-1]] == [(1, nic(1)), (2, nic(2)), (3, nic(1, 1))]
    assert events[-1] == AllOffersDelivered()
    relid, actions = world.host.offer(nic(2, 1))
    world.shell.do(actions)
    (late,) = world.run()
    assert isinstance(late, OfferReceived)
    assert (late.relid, late.connection_id, late.monitor_id, late.dedicated_interrupt) == (relid, relid, None, True)


@pytest.mark.parametrize("pages", [1, 26, 27, 54, 55, 8190])
def test_gpadl_of_any_size_arrives_whole(pages):
    world = World().start()
    handle, sends = world.guest.create_gpadl(1, [whole_pages(range(pages))])
    assert all(len(send.data) <= 240 for send in sends)
    world.post(sends)
    while world.to_host:
        world.deliver_to_host()
    (asked,) = world.shell.asked
    assert asked == GpadlCreate(handle, 1, (whole_pages(range(pages)),))
    assert world.run() == [GpadlReady(handle, 1, 0)]


def test_gpadl_of_several_ranges_with_offsets():
    world = World().start()
    ranges = (PageRange(100, 4090, (7, 9)), PageRange(4096, 0, (1,)))
    _, sends = world.guest.create_gpadl(1, ranges)
    world.post(sends)
    world.deliver_to_host()
    assert world.shell.asked[0].ranges == ranges


def test_gpadl_too_long_for_its_length_field_is_the_callers_mistake():
    world = World().start()
    with pytest.raises(UsageError, match="65536 bytes"):
        world.guest.create_gpadl(1, [whole_pages(range(8191))])
    assert world.guest.gpadl_handles == ()


def test_gpadls_may_arrive_interleaved():
    world = World().start()
    first, a = world.guest.create_gpadl(1, [whole_pages(range(100))])
    second, b = world.guest.create_gpadl(1, [whole_pages(range(500, 600))])
    events = world.run([send for pair in zip(a, b, strict=True) for send in pair])
    assert events == [GpadlReady(first, 1, 0), GpadlReady(second, 1, 0)]


def test_a_channel_lives():
    world = World().start()
    handle = world.gpadl()
    world.post(world.guest.open_channel(1, handle, 3, target_vp=5, open_id=77, user_data=b"hello"))
    world.deliver_to_host()
    assert world.shell.asked == [ChannelOpen(1, 77, handle, 3, 5, b"hello".ljust(120, b"\0"))]
    assert world.run() == [ChannelOpened(1, 0)]
    assert world.run(world.guest.modify_channel(1, 6)) == [Modified(1, 0)]
    assert world.shell.modified == [(1, 6)]
    assert world.run(world.guest.close_channel(1)) == []
    assert world.run(world.guest.teardown_gpadl(handle)) == [GpadlGone(handle, 1)]
    assert world.run(world.guest.unload()) == [Unloaded()]
    assert world.host.state is HostState.UNLOADED
    assert world.shell.disconnections == 1
    assert world.host.relids == (1,)  # the offer waits for the next guest
    assert world.host.version is world.guest.version is None


def test_no_interrupts():
    world = World().start()
    handle = world.gpadl()
    world.post(world.guest.open_channel(1, handle, 3, target_vp=None))
    world.deliver_to_host()
    assert world.shell.asked[0].target_vp is None
    world.run()
    (answer,) = world.run(world.guest.modify_channel(1, 2))
    assert answer.status == wire.STATUS_INVALID_PARAMETER
    assert world.shell.modified == []


def test_modify_is_not_answered_before_5_3_and_unknown_before_4_1():
    world = World(max_version=wire.VERSION_WIN10_V5_2).start()
    world.open()
    assert world.run(world.guest.modify_channel(1, 2)) == []
    assert world.shell.modified == [(1, 2)]
    old = World(max_version=wire.VERSION_WIN10).start()
    old.open()
    with pytest.raises(UsageError, match=r"needs version 4\.1, negotiated 4\.0"):
        old.guest.modify_channel(1, 2)


def test_teardown_waits_until_the_channel_has_stopped():
    world = World().start()
    ring, other = world.open(), world.gpadl()
    for sends in (world.guest.close_channel(1), world.guest.teardown_gpadl(ring), world.guest.teardown_gpadl(other)):
        world.post(sends)
    while world.to_host:
        world.deliver_to_host()
    assert len(world.shell.asked) == 1  # the close alone
    world.shell.answer()
    assert [asked.handle for asked in world.shell.asked] == [ring, other]
    assert world.run() == [GpadlGone(ring, 1), GpadlGone(other, 1)]


def test_reopen_waits_until_the_channel_has_stopped():
    world = World().start()
    first, second = world.open(), world.gpadl()
    for sends in (
        world.guest.close_channel(1),
        world.guest.teardown_gpadl(first),
        world.guest.open_channel(1, second, 4, open_id=2),
    ):
        world.post(sends)
    while world.to_host:
        world.deliver_to_host()
    world.shell.answer()
    assert [type(asked).__name__ for asked in world.shell.asked] == ["GpadlTeardown", "ChannelOpen"]
    assert world.run() == [GpadlGone(first, 1), ChannelOpened(1, 0)]
    assert world.shell.running == {1: second}


def test_shell_may_refuse_gpadl_and_open():
    world = World().start()
    handle, sends = world.guest.create_gpadl(1, [whole_pages(range(4))])
    world.post(sends)
    world.deliver_to_host()
    world.shell.answer(status=wire.STATUS_INSUFFICIENT_RESOURCES)
    assert world.run() == [GpadlReady(handle, 1, wire.STATUS_INSUFFICIENT_RESOURCES)]
    assert world.host.gpadl_handles == world.guest.gpadl_handles == ()
    ring = world.gpadl()
    world.post(world.guest.open_channel(1, ring, 4))
    world.deliver_to_host()
    world.shell.answer(status=wire.STATUS_UNSUCCESSFUL)
    assert world.run() == [ChannelOpened(1, wire.STATUS_UNSUCCESSFUL)]
    assert world.host.open_relids == world.guest.open_relids == ()
    assert world.run(world.guest.teardown_gpadl(ring)) == [GpadlGone(ring, 1)]


def test_rescind_of_an_open_channel():
    world = World().start()
    ring, other = world.open(), world.gpadl()
    world.shell.do(world.host.rescind(1))
    assert world.run() == [Rescinded(1)]
    assert world.shell.running == world.shell.mapped == {}  # the host has let go of everything by itself
    with pytest.raises(RescindedError):
        world.guest.open_channel(1, ring, 4)
    with pytest.raises(UsageError, match="has 2 GPADLs"):
        world.guest.release_relid(1)
    assert world.guest.close_channel(1) == []
    world.run([*world.guest.teardown_gpadl(ring), *world.guest.teardown_gpadl(other)])
    world.run(world.guest.release_relid(1))
    assert world.shell.released == [1]
    assert world.host.relids == world.guest.relids == ()
    assert world.host.offer(nic())[0] == 1  # the number may be used again


def test_rescind_crosses_everything_that_a_guest_can_have_sent():
    world = World().start()
    ring = world.open()
    spare = world.gpadl()
    new, create = world.guest.create_gpadl(1, [whole_pages(range(100))])
    world.post(world.guest.modify_channel(1, 3))
    world.post(world.guest.close_channel(1))
    world.post(create)
    world.post(world.guest.teardown_gpadl(ring))
    world.post(world.guest.open_channel(1, spare, 4))
    world.shell.do(world.host.rescind(1))
    events = world.run()
    assert events == [Rescinded(1), GpadlReady(new, 1, wire.STATUS_UNSUCCESSFUL), GpadlGone(ring, 1)]
    world.run(world.guest.teardown_gpadl(spare))
    world.run(world.guest.release_relid(1))
    assert world.shell.released == [1]


def test_rescind_while_the_shell_creates_and_opens():
    world = World().start()
    ring = world.gpadl()
    late, create = world.guest.create_gpadl(1, [whole_pages(range(4))])
    world.post(create)
    world.post(world.guest.open_channel(1, ring, 4))
    world.deliver_to_host()
    world.deliver_to_host()
    world.shell.do(world.host.rescind(1))
    events = world.run()
    assert events == [Rescinded(1), GpadlReady(late, 1, wire.STATUS_UNSUCCESSFUL)]
    assert world.shell.mapped == {}
    world.run(world.guest.teardown_gpadl(ring))
    world.run(world.guest.release_relid(1))
    assert world.shell.released == [1]


def test_rescind_of_a_primary_takes_its_subchannels_first():
    world = World().start(nic(1), nic(2), nic(1, 1), nic(1, 2))
    world.open(3)
    world.shell.do(world.host.rescind(1))
    assert world.run() == [Rescinded(3), Rescinded(4), Rescinded(1)]
    assert world.host.relids == (1, 2, 3, 4)


def test_rescind_before_the_guest_has_seen_the_offer():
    world = World()
    world.host.offer(nic())
    world.run(world.guest.connect())
    world.shell.do(world.host.rescind(1))
    assert world.shell.released == [1]
    assert world.run(world.guest.request_offers()) == [AllOffersDelivered()]


def test_a_device_may_come_back_before_the_guest_has_released_it():
    world = World().start()
    world.shell.do(world.host.rescind(1))
    relid, actions = world.host.offer(nic())
    world.shell.do(actions)
    assert relid == 2
    assert [type(event).__name__ for event in world.run()] == ["Rescinded", "OfferReceived"]


def test_unload_waits_for_the_shell_and_ignores_what_crosses_it():
    world = World().start()
    ring = world.open()
    _, create = world.guest.create_gpadl(1, [whole_pages(range(100))])
    world.post(create[:-1])  # one that never gets complete
    world.post(world.guest.unload())
    world.shell.do(world.host.rescind(1))
    world.deliver_to_guest()
    while world.to_host:
        world.deliver_to_host()
    assert world.host.state is HostState.DISCONNECTING
    assert list(world.shell.sent) == []
    assert world.run() == [Unloaded()]
    assert ring not in world.host.gpadl_handles
    assert world.shell.released == [1]  # a rescinded offer does not come back
    world.guest.connect()
    assert world.guest.state is GuestState.CONNECTING


def test_guest_that_starts_anew_gets_a_fresh_connection():
    world = World().start()
    world.open()
    world.guest.reset()
    events = world.run(world.guest.connect())
    assert isinstance(events[-1], Connected)
    assert world.shell.disconnections == 1
    assert world.shell.mapped == world.shell.running == {}
    assert [event.relid for event in world.run(world.guest.request_offers())[:-1]] == [1]


def test_reset_ends_silently_and_keeps_the_offers():
    world = World().start()
    world.open()
    world.shell.do(world.host.reset())
    world.shell.answer_all()
    assert world.shell.disconnections == 1
    assert list(world.shell.sent) == []
    assert world.host.state is HostState.DISCONNECTED
    world.guest.reset()
    world.run(world.guest.connect())
    assert len(world.run(world.guest.request_offers())) == 2


def test_close_ends_everything():
    world = World().start()
    world.open()
    contact = World().guest.connect()
    for finish in (lambda: world.shell.do(world.host.close()), world.shell.end):
        finish()  # while the shell still stops the channel, and then
        for command in (world.host.reset, lambda: world.host.offer(nic()), lambda: world.host.receive(contact[0].data)):
            with pytest.raises(ClosedError):
                command()
    assert world.shell.released == [1]
    assert world.host.close() == []


def test_limits_are_answered():
    limits = HostLimits(max_gpadls=3, max_gpadl_pages=40, max_total_pages=56, target_vps=4)
    world = World(limits).start()
    big, sends = world.guest.create_gpadl(1, [whole_pages(range(41))])
    assert world.run(sends) == [GpadlReady(big, 1, wire.STATUS_INSUFFICIENT_RESOURCES)]
    world.gpadl(pages=40)
    one_more, sends = world.guest.create_gpadl(1, [whole_pages(range(17))])
    assert world.run(sends) == [GpadlReady(one_more, 1, wire.STATUS_INSUFFICIENT_RESOURCES)]
    ring = world.gpadl(pages=8)
    world.gpadl(pages=8)
    fourth, sends = world.guest.create_gpadl(1, [whole_pages(range(1))])
    assert world.run(sends) == [GpadlReady(fourth, 1, wire.STATUS_INSUFFICIENT_RESOURCES)]
    assert world.run(world.guest.open_channel(1, ring, 4, target_vp=4)) == [ChannelOpened(1, wire.STATUS_INVALID_PARAMETER)]
    assert world.run(world.guest.open_channel(1, ring, 4, target_vp=3)) == [ChannelOpened(1, 0)]
    assert world.run(world.guest.modify_channel(1, 4)) == [Modified(1, wire.STATUS_INVALID_PARAMETER)]
    assert len(world.shell.refused) == 5
    assert "41 pages, limit 40" in world.shell.refused[0]


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 0xFFFFFFFF])
def test_a_ring_needs_its_control_page_and_data(offset):
    world = World().start()
    ring = world.gpadl(pages=8)
    assert world.run(world.guest.open_channel(1, ring, offset)) == [ChannelOpened(1, wire.STATUS_INVALID_PARAMETER)]
    assert f"downstream ring at page {offset} of 8 whole pages" in world.shell.refused[0]


@pytest.mark.parametrize(
    "ranges", [[whole_pages(range(3))], [PageRange(8 * 4096, 8, tuple(range(9)))], [PageRange(20000, 0, (1, 2, 3, 4, 5))]]
)
def test_a_ring_needs_whole_pages(ranges):
    world = World().start()
    handle, sends = world.guest.create_gpadl(1, ranges)
    world.run(sends)
    assert world.run(world.guest.open_channel(1, handle, 2)) == [ChannelOpened(1, wire.STATUS_INVALID_PARAMETER)]


def test_gpadl_numbers_wrap_around_and_skip_those_in_use():
    world = World().start()
    kept = world.gpadl()
    world.guest._next_gpadl = 0xFFFFFFFF
    assert world.gpadl() == 0xFFFFFFFF
    world.guest._next_gpadl = 0xFFFFFFFF
    assert world.gpadl() == kept + 1


def test_the_hosts_own_mistakes():
    world = World(HostLimits(max_offers=3)).start(nic(1), nic(2))
    with pytest.raises(UsageError, match="offered already"):
        world.host.offer(nic(1))
    with pytest.raises(UsageError, match="primary channel is not offered"):
        world.host.offer(nic(3, 1))
    world.host.offer(nic(1, 1))
    with pytest.raises(UsageError, match="3 channels are offered, limit 3"):
        world.host.offer(nic(4))
    world.host.rescind(2)
    for command in (
        lambda: world.host.rescind(2),
        lambda: world.host.rescind(9),
        lambda: world.host.offer_of(9),
        lambda: world.host.gpadl_created(5),
        lambda: world.host.gpadl_torn_down(5),
        lambda: world.host.channel_opened(1),
        lambda: world.host.channel_closed(1),
        lambda: World(min_version=wire.VERSION_WIN10_V5, max_version=wire.VERSION_WIN10),
    ):
        with pytest.raises(UsageError):
            command()
    assert world.host.offer_of(1) == nic(1)


def test_the_drivers_own_mistakes_change_nothing():
    world = World().start()
    ring = world.open()
    guest = world.guest
    for command in (
        guest.connect,
        guest.request_offers,
        lambda: guest.create_gpadl(9, [whole_pages([1])]),
        lambda: guest.create_gpadl(1, []),
        lambda: guest.create_gpadl(1, [PageRange(5000, 0, (1,))]),
        lambda: guest.teardown_gpadl(ring),
        lambda: guest.teardown_gpadl(ring + 1),
        lambda: guest.open_channel(1, ring, 4),
        lambda: guest.close_channel(2),
        lambda: guest.release_relid(1),
        lambda: guest.modify_channel(1, 1 << 32),
    ):
        with pytest.raises(UsageError):
            command()
    handle, _ = guest.create_gpadl(1, [whole_pages([1])])
    with pytest.raises(UsageError, match="creating, need ready"):
        guest.teardown_gpadl(handle)
    guest.modify_channel(1, 1)
    with pytest.raises(UsageError, match="being modified"):
        guest.modify_channel(1, 1)
    guest.close_channel(1)
    with pytest.raises(UsageError, match="closed, need open"):
        guest.close_channel(1)
    with pytest.raises(UsageError):
        guest.open_channel(1, ring, 4, user_data=bytes(121))
    guest.open_channel(1, ring, 4)
    with pytest.raises(UsageError, match="no version"):
        World().guest.connect(max_version=1)


def test_modify_exists_from_4_1_on():
    world = World(max_version=wire.VERSION_WIN10_V4_1).start()
    world.open()
    world.run(world.guest.modify_channel(1, 2))
    assert world.shell.modified == [(1, 2)]


def test_the_smallest_rings():
    world = World().start()
    ring = world.gpadl(pages=4)
    assert world.run(world.guest.open_channel(1, ring, 2)) == [ChannelOpened(1, 0)]


def test_a_handle_is_not_used_again_at_once():
    world = World().start()
    first = world.gpadl()
    world.run(world.guest.teardown_gpadl(first))
    assert world.gpadl() == first + 1


@pytest.mark.parametrize("end", ["rescind", "reset", "unload"])
def test_a_reopening_that_is_overtaken_does_not_happen(end):
    world = World().start()
    ring = world.open()
    world.post(world.guest.close_channel(1) + world.guest.open_channel(1, ring, 4))
    world.deliver_to_host()
    world.deliver_to_host()
    assert world.host.channel_view(1) is ChannelView.REOPENING
    if end == "rescind":
        world.shell.do(world.host.rescind(1))
    elif end == "reset":
        world.shell.do(world.host.reset())
    else:
        world.post(world.guest.unload())
        world.deliver_to_host()
    world.shell.answer_all()
    assert world.shell.running == world.shell.mapped == {}
    assert world.host.open_relids == ()


def test_a_reset_overtakes_answers_that_are_due():
    world = World().start()
    handle = world.gpadl()
    world.post(world.guest.teardown_gpadl(handle))
    world.deliver_to_host()
    world.shell.do(world.host.reset())
    world.shell.answer_all()
    assert list(world.shell.sent) == []


def test_rescind_of_one_channel_leaves_the_gpadls_of_others():
    world = World().start(nic(1), nic(2))
    (first, a), (second, b) = (world.guest.create_gpadl(relid, [whole_pages(range(30))]) for relid in (1, 2))
    world.post([a[0], b[0]])
    world.deliver_to_host()
    world.deliver_to_host()
    world.shell.do(world.host.rescind(1))
    events = world.run([a[1], b[1]])
    assert events == [Rescinded(1), GpadlReady(first, 1, wire.STATUS_UNSUCCESSFUL), GpadlReady(second, 2, 0)]


def test_pages_count_while_they_are_promised_or_in_use_and_no_longer():
    world = World(HostLimits(max_total_pages=50)).start(nic(1), nic(2))
    _, under_way = world.guest.create_gpadl(1, [whole_pages(range(30))])
    world.run(under_way[:1])
    refused, sends = world.guest.create_gpadl(2, [whole_pages(range(21))])
    assert world.run(sends) == [GpadlReady(refused, 2, wire.STATUS_INSUFFICIENT_RESOURCES)]
    world.run(under_way[1:])
    world.shell.do(world.host.rescind(1))
    world.run()
    world.gpadl(2, pages=50)


def test_a_guest_may_release_its_channels_after_it_has_unloaded():
    world = World().start(nic(1), nic(2))
    world.open()
    world.run(world.guest.unload())
    for relid in (1, 2, 1, 77):
        assert world.host.receive(wire.RelidReleased(child_relid=relid).pack()) == []
    with pytest.raises(ProtocolError, match="RequestOffers is not allowed while unloaded"):
        world.host.receive(wire.RequestOffers().pack())
    world.shell.do(world.host.reset())
    world.guest.reset()
    world.run(world.guest.connect())
    assert [event.relid for event in world.run(world.guest.request_offers())[:-1]] == [1, 2]


def test_a_monitored_host_gives_each_channel_a_bit_as_long_as_there_are_bits():
    world = World(HostLimits(max_offers=200), monitored=True)
    world.start(*(nic(number) for number in range(1, 130)))
    relid, actions = world.host.offer(nic(1, 1))
    world.shell.do(actions)
    assert world.run()[0].monitor_id is None
    world.guest.reset()
    world.run(world.guest.connect())
    offers = [event for event in world.run(world.guest.request_offers()) if isinstance(event, OfferReceived)]
    assert [offer.monitor_id for offer in offers] == [*range(128), None, None]
    assert [offer.relid for offer in offers] == [*range(1, 130), relid]


@pytest.mark.parametrize(
    ("version", "pages", "agreed"),
    [
        (wire.VERSION_WIN10_V5_3, (0x5000, 0x6000), wire.VERSION_WIN10_V5_3),
        (wire.VERSION_WIN8, (0, 0), wire.VERSION_WIN8),
        (wire.VERSION_WIN8, (0x5000, 0), None),  # one page alone
        (0x70000, (0x5000, 0x6000), None),
    ],
)
def test_where_messages_go_is_known_before_the_answer(version, pages, agreed):
    world = World()
    target = wire.TargetInfo.of(sint=wire.MESSAGE_SINT) if version >= wire.VERSION_WIN10_V5 else wire.TargetInfo(0)
    contact = wire.InitiateContact(
        version_requested=version, target_vcpu=3, target_info=target, monitor_page1=pages[0], monitor_page2=pages[1]
    )
    first, answer = world.host.receive(contact.pack())
    assert first == Contact(agreed, 3, pages)
    assert wire.parse_message(answer.data).connection_state == (2 if pages == (0x5000, 0) else 0)


def test_closing_a_primary_channel_takes_its_subchannels():
    world = World().start(nic(1), nic(2), nic(1, 1), nic(1, 2))
    ring, sub = world.open(1), world.open(3)
    world.run(world.guest.close_channel(3))  # a subchannel alone may be closed and opened again
    world.run(world.guest.teardown_gpadl(sub))
    sub = world.open(3)
    world.post(world.guest.close_channel(1))
    assert world.run() == [Rescinded(3), Rescinded(4)]
    assert world.shell.running == {}
    for handle in (sub, ring):
        world.run(world.guest.teardown_gpadl(handle))
    for relid in (3, 4):
        world.run(world.guest.release_relid(relid))
    assert world.shell.released == [3, 4]
    world.open(1)
    _, actions = world.host.offer(nic(1, 1))
    world.shell.do(actions)
    assert world.run()[0].offer == nic(1, 1)


def test_gpadls_made_before_a_channel_opens_outlive_its_closing():
    """As uio_hv_generic makes its buffers: once, for as many openings as come."""
    world = World().start()
    receive, send = world.gpadl(), world.gpadl()
    for _ in range(3):
        ring = world.open()
        world.run(world.guest.close_channel(1))
        world.run(world.guest.teardown_gpadl(ring))
        assert set(world.shell.mapped) == {receive, send}
        assert {world.host.gpadl_view(handle) for handle in (receive, send)} == {GpadlView.READY}
