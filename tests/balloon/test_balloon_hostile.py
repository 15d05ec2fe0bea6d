"""A guest that lies to the host's balloon, and a host that lies to the driver."""

from __future__ import annotations

import time

import pytest

from tests.balloon.balloon_rig import PLENTY, ScriptedVsp, polite, raw_guest, wait_packet
from vfio_vmbus.channel.device import READ, WRITE
from vfio_vmbus.channel.offered import open_offered
from vfio_vmbus.drivers.balloon.driver import Balloon
from vfio_vmbus.errors import PeerError, ProtocolError, RefusedError, WaitTimeout
from vfio_vmbus.host.balloon import PageSet
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire import dm
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_XFER_PAGES, Packet

YES = dm.Accepted.of(is_accepted=1)
VERSION = dm.encode_message(dm.VersionRequest(version=dm.VERSION_2))
CAPABILITIES = dm.encode_message(dm.CapabilitiesReport(capabilities=dm.Capabilities.of(balloon=1)))


def response(*spans, more=False, count=None):
    flags = dm.RangesBefore.of(more_pages=int(more), range_count=len(spans) if count is None else count)
    return dm.encode_message(dm.BalloonResponse(flags=flags, ranges=tuple(spans)))


def span(start, count):
    return dm.PageSpan.of(start_page=start, page_count=count)


OUT_OF_ORDER = {
    "capabilities first": [CAPABILITIES],
    "a report first": [VERSION, dm.encode_message(dm.StatusReport())],
    "a version again": [VERSION, VERSION],
    "capabilities again": [VERSION, CAPABILITIES, CAPABILITIES],
    "pages that nobody asked for": [VERSION, CAPABILITIES, response(span(1 << 20, 1))],
    "an answer to no unballoon": [VERSION, CAPABILITIES, dm.encode_message(dm.UnballoonResponse())],
    "an answer to no hot add": [VERSION, CAPABILITIES, dm.encode_message(dm.HotAddResponse())],
    "a host's message": [dm.encode_message(dm.VersionResponse())],
    "nothing": [b""],
    "a size that cannot be": [VERSION[:2] + b"\xff\xff" + VERSION[4:]],
}


@pytest.mark.parametrize("messages", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_a_guest_out_of_order_loses_its_channel_and_the_host_goes_on(messages):
    with nothing_left(objects=False), raw_guest() as (host, vsp, device, channel):
        connection = host.connection_of(vsp)
        for message in messages:
            assert channel.outgoing.send(message)
        _wait(lambda: connection.errors)
        assert isinstance(connection.errors[-1], PeerError)
        channel.close()
        again = device.open(4)
        assert again.outgoing.send(VERSION)
        assert dm.VersionResponse.unpack(wait_packet(again).payload).flags.is_accepted


def _wait(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


WRONG_PAGES = {
    "more than were asked for": lambda own: response(span(own[0], 9)),
    "more than were asked for, in parts": lambda own: response(span(own[0], 5), span(own[5], 4)),
    "the same twice": lambda own: response(span(own[0], 2), span(own[1], 2)),
    "none, and more to come": lambda own: response(more=True),
    "an empty range": lambda own: response(span(own[0], 0)),
    "pages that it has not mapped": lambda own: response(span(own[-1] + 5, 1)),
    "pages past the end of what it has mapped": lambda own: response(span(own[-1], 2)),
    "page 0": lambda own: response(span(0, 1)),
    "the highest page": lambda own: response(span(dm.MAX_START_PAGE, 8)),
    "ranges that are not there": lambda own: response(span(own[0], 1), count=2),
}


@pytest.mark.parametrize("wrong", WRONG_PAGES.values(), ids=WRONG_PAGES)
def test_a_guest_gives_nothing_but_its_own_pages_and_no_more_than_asked_for(wrong):
    with nothing_left(objects=False), raw_guest() as (host, vsp, device, channel):
        connection = host.connection_of(vsp)
        own = device.dma_buffer(16 * PAGE, READ | WRITE, "own").pfns
        for message in (VERSION, CAPABILITIES):
            assert channel.outgoing.send(message)
            wait_packet(channel)
        host.run(lambda: vsp.request(8))
        wait_packet(channel)
        assert channel.outgoing.send(wrong(own))
        _wait(lambda: connection.errors)
        assert vsp.ballooned == 0
        assert isinstance(connection.errors[-1], PeerError)


def test_memory_that_the_host_may_not_write_is_not_taken():
    with raw_guest() as (host, vsp, device, channel):
        connection = host.connection_of(vsp)
        own = device.dma_buffer(16 * PAGE, READ, "own").pfns
        for message in (VERSION, CAPABILITIES):
            assert channel.outgoing.send(message)
            wait_packet(channel)
        host.run(lambda: vsp.request(8))
        wait_packet(channel)
        assert channel.outgoing.send(response(span(own[0], 8)))
        _wait(lambda: connection.errors)
        assert connection.domain.fault_count == 1


def test_other_packets_end_the_channels_use():
    with raw_guest() as (host, vsp, _device, channel):
        connection = host.connection_of(vsp)
        assert channel.outgoing.send_packet(Packet(packet_type=PACKET_COMPLETION))
        _wait(lambda: connection.errors)


def test_pages_are_taken_as_they_were_given():
    pages = PageSet()
    for start, count in ((10, 5), (0, 10), (20, 2)):
        pages.add(start, count)
    for start, count in ((0, 1), (9, 1), (9, 2), (14, 7), (21, 1), (0, 100), (15, 6), (30, 0)):
        with pytest.raises(ProtocolError):
            pages.add(start, count)
    assert pages.pages == 17
    taken = [page for part in pages.take(8) for page in range(part.start_page, part.start_page + part.page_count)]
    assert sorted(taken) == [9, 10, 11, 12, 13, 14, 20, 21]
    pages.add(20, 2)
    assert pages.pages == 11
    assert sum(part.page_count for part in pages.take(100)) == 11
    assert pages.pages == 0


# Hosts that lie.


def driven(answer, use, **options):
    vsp = ScriptedVsp(answer)
    settings = {"limit": 4096, "pressure": lambda: PLENTY, "report": 3600.0, **options}
    with (
        nothing_left(objects=False),
        EmbeddedHost() as host,
        open_offered(host.attach(vsp)) as device,
        Balloon(device, **settings) as driver,
    ):
        use(host, vsp, driver)


def test_a_host_that_says_nothing_is_not_waited_for_for_ever():
    with pytest.raises(WaitTimeout, match="VersionResponse"):
        driven(lambda message: [], lambda *_: None, timeout=0.2)


def test_a_host_that_does_not_accept_is_told_of():
    def answer(message):
        no = dm.encode_message(dm.CapabilitiesResponse())
        return [no] if isinstance(message, dm.CapabilitiesReport) else polite(message)

    with pytest.raises(RefusedError, match="does not accept"):
        driven(answer, lambda *_: None)


@pytest.mark.parametrize("wrong", [dm.encode_message(dm.CapabilitiesResponse(flags=YES)), b"", b"\1" * 40, VERSION])
def test_another_answer_is_refused(wrong):
    with pytest.raises(ProtocolError):
        driven(lambda message: [wrong], lambda *_: None)


@pytest.mark.parametrize(
    "wrong",
    [
        dm.encode_message(dm.VersionResponse(flags=YES)),
        dm.encode_message(dm.CapabilitiesResponse(flags=YES)),
        dm.encode_message(dm.UnballoonRequest(range_count=1, ranges=(span(5, 1),))),
        dm.encode_message(dm.UnballoonRequest(range_count=1, ranges=(span(0, dm.MAX_RANGE_PAGES),))),
        dm.encode_message(dm.InfoMessage(info_size=100)),
        bytes(16),
    ],
)
def test_a_host_that_breaks_the_protocol_is_told_of(wrong):
    def use(host, vsp, driver):
        host.run(lambda: vsp.say(wrong))
        driver.serve(30)

    with pytest.raises(ProtocolError):
        driven(polite, use)


def test_pages_come_back_once():
    def use(host, vsp, driver):
        host.run(lambda: vsp.say(dm.encode_message(dm.BalloonRequest(page_count=4))))
        _serve(driver, lambda: heard(vsp, dm.BalloonResponse))
        (given,) = heard(vsp, dm.BalloonResponse)[0].ranges
        back = dm.encode_message(dm.UnballoonRequest(range_count=1, ranges=(given,)))
        host.run(lambda: vsp.say(back))
        _serve(driver, lambda: heard(vsp, dm.UnballoonResponse))
        host.run(lambda: vsp.say(back))
        driver.serve(30)

    with pytest.raises(ProtocolError, match="which it does not have"):
        driven(polite, use)


def test_other_packets_are_refused_and_completions_are_not_missed():
    def use(host, vsp, driver):
        host.run(lambda: vsp.say(b"", Packet(packet_type=PACKET_COMPLETION)))
        driver.serve(0.05)
        host.run(lambda: vsp.say(b"", Packet(packet_type=PACKET_XFER_PAGES)))
        driver.serve(30)

    with pytest.raises(ProtocolError, match="packet type 7"):
        driven(polite, use)


def test_a_host_that_wants_no_reports_gets_none():
    def answer(message):
        quiet = dm.Accepted.of(is_accepted=1, suppress_pressure_reports=1)
        if isinstance(message, dm.CapabilitiesReport):
            return [dm.encode_message(dm.CapabilitiesResponse(flags=quiet))]
        return polite(message)

    def use(host, vsp, driver):
        driver.serve(0.05)
        assert not driver.info.reports_wanted
        assert driver.info.reports == 0

    driven(answer, use)


def test_a_request_for_everything_gets_what_the_limit_allows():
    def use(host, vsp, driver):
        host.run(lambda: vsp.say(dm.encode_message(dm.BalloonRequest(page_count=0xFFFFFFFF))))
        _serve(driver, lambda: any(not answer.flags.more_pages for answer in heard(vsp, dm.BalloonResponse)))
        assert driver.info.pages == 4096

    driven(polite, use)


def heard(vsp, kind):
    return [message for message in vsp.heard if isinstance(message, kind)]


def _serve(driver, condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        driver.serve(0.005)
