"""Messages that only a hostile or broken side sends: each has its error, which names value and limit, and nothing is left behind."""

import re

import pytest

from tests.vmbus.test_vmbus_tables import RING, SPARE, Bench, contact
from tests.vmbus.world import World, nic
from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.vmbus import GuestConnection, GuestLimits, HostConnection, HostLimits, HostState, Rescinded, whole_pages
from vfio_vmbus.wire import vmbus as wire


def header(range_bytes=24, range_count=1, words=(8192, 1), relid=1, handle=SPARE):
    return wire.GpadlHeader(child_relid=relid, gpadl=handle, range_bytes=range_bytes, range_count=range_count, words=words)


def body(*words, handle=SPARE, number=0):
    return wire.GpadlBody(gpadl=handle, words=words, message_number=number)


FATAL = {
    "more words than the header said": ([header(), body(2, 3)], "4 words of page list, its header says 3"),
    "more words in the header than it says": ([header(16, 1, (4096, 1, 2))], "3 words"),
    "a body after the last": ([header(), body(2), body(3)], "GPADL 0x11 is creating"),
    "a body of nothing known": ([body(2, handle=0x99)], "GPADL 0x99 is unknown"),
    "an empty body": ([header(), body()], "no words"),
    "bodies out of order": ([header(48), body(2), body(3, number=3)], "body number 3, need 0 or 1..2"),
    "no ranges": ([header(24, 0)], "0 ranges"),
    "more ranges than fit": ([header(24, 2)], "2 ranges in 24 bytes"),
    "half a word": ([header(20)], "20 bytes"),
    "an offset beyond the page": ([header(words=(8192 | 4096 << 32, 1)), body(2)], "offset 4096"),
    "an empty range": ([header(words=(0, 1)), body(2)], "0 bytes"),
    "fewer pages than bytes": ([header(words=(8193, 1)), body(2)], "needs 3 pages, 2 follow"),
    "more pages than bytes": ([header(words=(4096, 1)), body(2)], "3 words, but 1 ranges take 2"),
    "a page number beyond 64 bits of address": ([header(words=(8192, 1 << 52)), body(2)], "page number 0x10000000000000"),
    "a handle twice": ([header(handle=RING)], "GPADL 0x10 is ready"),
    "a handle twice on another channel": ([header(handle=RING, relid=2)], "GPADL 0x10 is ready"),
    "teardown of an unfinished one": ([header(), wire.GpadlTeardown(child_relid=1, gpadl=SPARE)], "is unfinished"),
    "teardown through another channel": ([wire.GpadlTeardown(child_relid=2, gpadl=RING)], "is of channel 1, not 2"),
    "offers asked for twice": ([wire.RequestOffers()], "RequestOffers is not allowed while offered"),
    "a host's message": ([wire.UnloadResponse()], "only the host sends it"),
}


@pytest.mark.parametrize("name", FATAL)
def test_fatal_to_the_connection_and_to_nothing_else(name):
    messages, error = FATAL[name]
    bench = Bench().to_offered()
    bench.create(RING)
    with pytest.raises(ProtocolError, match=re.escape(error)):
        bench.feed(*messages)
    assert bench.host.state is HostState.FAILED
    with pytest.raises(ProtocolError, match="failed before: .*" + re.escape(error)):
        bench.feed(wire.Unload())
    bench.shell.answer_all()
    bench.shell.do(bench.host.reset())
    bench.shell.answer_all()
    assert bench.shell.mapped == {}
    assert bench.host.gpadl_handles == ()
    bench.to_offered()  # the offers are still there for a guest that begins anew
    assert bench.host.relids == (1, 2)
    bench.shell.end()


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(8), b"\xff" * 240, bytes(241), wire.OpenChannel().pack()[:-1]])
def test_bytes_that_are_no_message(data):
    bench = Bench().to_offered()
    with pytest.raises(ProtocolError):
        bench.host.receive(data)
    guest = World().start().guest
    with pytest.raises(ProtocolError):
        guest.receive(data)


def test_teardown_of_the_ring_of_an_open_channel_is_fatal_and_cleaned_up_in_order():
    bench = Bench().to_offered()
    bench.create(RING)
    bench.feed(bench.open_request())
    bench.shell.answer()
    with pytest.raises(ProtocolError, match="GPADL 0x10 is ring"):
        bench.feed(wire.GpadlTeardown(child_relid=1, gpadl=RING))
    bench.shell.do(bench.host.reset())
    assert [type(asked).__name__ for asked in bench.shell.asked] == ["ChannelClose"]
    bench.shell.answer()
    assert [type(asked).__name__ for asked in bench.shell.asked] == ["GpadlTeardown"]
    bench.shell.end()


def test_the_shell_may_still_answer_after_a_failure():
    bench = Bench().to_offered()
    bench.create(RING)
    bench.feed(bench.open_request(), *[header(16, words=(4096, 1))])
    with pytest.raises(ProtocolError):
        bench.feed(wire.RequestOffers())
    bench.shell.sent.clear()
    bench.shell.answer_all()
    assert bench.shell.replies() == []  # nobody listens any more
    bench.shell.end()


@pytest.mark.parametrize(
    ("limits", "messages", "error"),
    [
        (HostLimits(max_unfinished=2), [header(800, handle=3)], "3 unfinished GPADLs, limit 2"),
        (HostLimits(max_bodies=2), [body(1, handle=1)] * 3, "3 bodies, limit 2"),
    ],
)
def test_limits_that_are_fatal(limits, messages, error):
    host = HostConnection(limits)
    host.offer(nic())
    for message in (contact(wire.VERSION_WIN10_V5_3), wire.RequestOffers(), header(800, handle=1), header(800, handle=2)):
        host.receive(message.pack())
    *fine, last = messages
    for message in fine:
        assert host.receive(message.pack()) == []
    with pytest.raises(ProtocolError, match=error):
        host.receive(last.pack())


def test_refused_gpadls_count_as_unfinished_but_hold_no_memory():
    """Bodies of a refused GPADL find their place; the answer comes when it is complete."""
    host = HostConnection(HostLimits(max_gpadl_pages=1))
    host.offer(nic())
    for message in (contact(wire.VERSION_WIN10_V5_3), wire.RequestOffers(), header()):
        assert host.receive(message.pack()) == [] or not isinstance(message, wire.GpadlHeader)
    refused, answer = host.receive(body(2).pack())
    assert "2 pages, limit 1" in refused.reason
    created = wire.parse_message(answer.data)
    assert (created.gpadl, created.status) == (SPARE, wire.STATUS_INSUFFICIENT_RESOURCES)
    assert host.gpadl_handles == ()


def test_a_ring_of_another_channel_is_refused():
    bench = Bench().to_offered()
    bench.create(RING, relid=2)
    actions = bench.feed(bench.open_request())
    assert "GPADL 0x10 is not a ready one of this channel" in actions[0].reason
    assert bench.shell.asked == []


def test_monitor_pages_come_both_or_none_and_targets_must_fit():
    for change, supported, state in (
        ({"monitor_page1": 4096}, 1, wire.CONNECTION_FAILED_UNKNOWN),
        ({"monitor_page1": 4096, "monitor_page2": 8192}, 1, wire.CONNECTION_SUCCESSFUL),
        ({"target_info": wire.TargetInfo.of(sint=3)}, 0, 0),
        ({"target_info": wire.TargetInfo.of(sint=2, vtl=1)}, 0, 0),
        ({"version_requested": 0x60000}, 0, 0),
        ({"version_requested": 0}, 0, 0),
    ):
        bench = Bench()
        fields = {"version_requested": bench.version, "target_info": wire.TargetInfo.of(sint=2)} | change
        bench.feed(wire.InitiateContact(**fields))
        (answer,) = bench.shell.replies()
        assert (answer.version_supported, answer.connection_state) == (supported, state)
        assert (bench.host.version is not None) == (supported == 1 and state == 0)


def test_contact_while_disconnecting_is_answered_once_all_has_ended():
    bench = Bench().to_offered()
    bench.create(RING)
    bench.feed(wire.Unload())
    bench.shell.replies()
    bench.feed(contact(wire.VERSION_WIN10))
    assert bench.shell.replies() == []
    bench.shell.answer_all()
    (answer,) = bench.shell.replies()
    assert isinstance(answer, wire.VersionResponse)
    assert bench.host.version == wire.VERSION_WIN10


def offer(relid=2, **fields):
    return wire.OfferChannel(child_relid=relid, offer=nic(**fields))


HOSTILE_HOST = {
    "a number in use": (offer(1, number=2), "offer of channel 1, which is offered"),
    "number 0": (offer(0), "offer of channel 0, limit 1..2047"),
    "a large number": (offer(2048), "offer of channel 2048, limit 1..2047"),
    "a device twice": (offer(2), "a second time"),
    "a subchannel alone": (offer(2, number=7, sub_channel_index=1), "without its primary channel"),
    "rescind of nothing": (wire.RescindChannelOffer(child_relid=5), "no channel 5"),
    "open result of nothing": (wire.OpenChannelResult(child_relid=5), "no channel 5"),
    "open result unasked": (wire.OpenChannelResult(child_relid=1), "channel 1 is closed"),
    "GPADL created unasked": (wire.GpadlCreated(child_relid=1, gpadl=5), "no GPADL 0x5"),
    "GPADL torn down unasked": (wire.GpadlTorndown(gpadl=0xE1E10), "GPADL 0xe1e10 is ready, need tearing down"),
    "GPADL created twice": (wire.GpadlCreated(child_relid=1, gpadl=0xE1E10), "GPADL 0xe1e10 is ready, need creating"),
    "modified unasked": (wire.ModifyChannelResponse(child_relid=1), "channel 1 is not being modified"),
    "unloaded unasked": (wire.UnloadResponse(), "not allowed while running"),
    "a second version": (wire.VersionResponse(version_supported=1), "not allowed while running"),
    "the end twice": (wire.AllOffersDelivered(), "not allowed while running"),
    "a guest's message": (wire.Unload(), "only the guest sends it"),
}


@pytest.mark.parametrize("name", HOSTILE_HOST)
def test_a_hostile_host_fails_the_connection(name):
    message, error = HOSTILE_HOST[name]
    world = World().start()
    world.gpadl()
    with pytest.raises(ProtocolError, match=re.escape(error)):
        world.guest.receive(message.pack())
    with pytest.raises(ProtocolError, match="failed before: .*" + re.escape(error)):
        world.guest.receive(message.pack())
    with pytest.raises(ProtocolError, match="failed before"):
        world.guest.unload()


def test_answers_to_the_wrong_question():
    world = World().start()
    ring = world.gpadl()
    world.guest.open_channel(1, ring, 4, open_id=7)
    with pytest.raises(ProtocolError, match="opening with open_id 0x7, need opening with 0x8"):
        world.guest.receive(wire.OpenChannelResult(child_relid=1, open_id=8).pack())
    world = World().start(nic(1), nic(2))
    handle, _ = world.guest.create_gpadl(1, [whole_pages(range(4))])
    with pytest.raises(ProtocolError, match="is of channel 1, not 2"):
        world.guest.receive(wire.GpadlCreated(child_relid=2, gpadl=handle).pack())
    world = World().start()
    assert world.guest.receive(wire.RescindChannelOffer(child_relid=1).pack()) == [Rescinded(1)]
    with pytest.raises(ProtocolError, match="a second time"):
        world.guest.receive(wire.RescindChannelOffer(child_relid=1).pack())


def test_modified_twice_or_after_a_rescind():
    for answers in (
        [wire.ModifyChannelResponse(child_relid=1), wire.ModifyChannelResponse(child_relid=1)],
        [wire.RescindChannelOffer(child_relid=1), wire.ModifyChannelResponse(child_relid=1)],
    ):
        world = World().start()
        world.open()
        world.guest.modify_channel(1, 1)
        assert len(world.guest.receive(answers[0].pack())) == 1
        with pytest.raises(ProtocolError, match="not being modified"):
            world.guest.receive(answers[1].pack())


def test_a_body_after_its_channel_was_released():
    bench = Bench().to_offered()
    bench.feed(header())
    bench.shell.do(bench.host.rescind(1))
    bench.feed(wire.RelidReleased(child_relid=1))
    assert bench.shell.released == [1]
    with pytest.raises(ProtocolError, match="GPADL 0x11 is unknown"):
        bench.feed(body(2))
    bench.shell.end()


def test_a_flood_of_offers_ends():
    guest = GuestConnection(GuestLimits(max_offers=3))
    guest.connect()
    guest.receive(wire.VersionResponse(version_supported=1).pack())
    guest.request_offers()
    for relid in (1, 2, 3):
        guest.receive(offer(relid, number=relid).pack())
    with pytest.raises(ProtocolError, match="3 are offered, limit 3"):
        guest.receive(offer(4, number=4).pack())


def test_version_response_with_a_failure_is_told():
    guest = GuestConnection()
    guest.connect()
    response = wire.VersionResponse(version_supported=1, connection_state=wire.CONNECTION_FAILED_LOW_RESOURCES)
    (event,) = guest.receive(response.pack())
    assert event.connection_state == wire.CONNECTION_FAILED_LOW_RESOURCES
    assert guest.version is None
