"""The embedded host as its owner sees it: attaching, closing at any moment, calls from any thread, and defects that do not spread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from raw_client import RawClient, eventually

from vfio_vmbus.channel.connection import VmbusConnection
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import ClosedError, RescindedError, UsageError, VfioVmbusError, WaitTimeout
from vfio_vmbus.host import embedded
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import registers as reg
from vfio_vmbus.vfio.device import BAR0_REGION


@pytest.fixture
def host() -> Iterator[EmbeddedHost]:
    with nothing_left(objects=False), EmbeddedHost(poll="interrupt") as host:
        yield host


# Cards and clients.


def test_cards_have_names_of_their_own(host: EmbeddedHost) -> None:
    first, second = host.add_nic(), host.add_nic()
    assert [first.name, second.name] == ["nic0", "nic1"] == list(host.nics)
    assert first.mac != second.mac
    assert first.mac[:3] == second.mac[:3] == b"\x00\x15\x5d"
    with pytest.raises(UsageError, match="nic0 already"):
        host.add_nic("nic0")
    with pytest.raises(UsageError, match="unicast"):
        host.add_nic("group", bytes(5) + b"\1\1")
    assert len(host.nics) == 2
    host.add_nic("nic3")
    assert host.add_nic().name == "nic2"
    assert host.add_nic().name == "nic4"


def test_a_card_has_one_client(host: EmbeddedHost) -> None:
    nic = host.add_nic()
    with host.attach(nic) as device:
        for _ in range(2):
            with pytest.raises(UsageError, match="has a client already"):
                host.attach(nic)
        assert host.connection(device).has(nic)
    with pytest.raises(UsageError, match="not attached"):
        host.connection(device)
    host.attach(nic).close()


def test_what_cannot_be_attached_costs_nothing(host: EmbeddedHost) -> None:
    nic = host.add_nic()
    with nothing_left():
        for _ in range(3):
            with pytest.raises(UsageError, match="once"):
                host.attach(nic, nic)
    with EmbeddedHost(name="another") as other:
        with pytest.raises(UsageError, match="no card of host"):
            host.attach(other.add_nic("theirs"))
        with pytest.raises(UsageError, match="no card of host"):
            host.set_link(other.nics["theirs"], False)
    host.attach(nic).close()


def test_a_function_may_have_a_name(host: EmbeddedHost) -> None:
    with host.attach(name="mine") as mine, host.attach() as other:
        assert mine.info.name == "mine"
        assert other.info.name.startswith("embedded:")


def test_a_card_is_taken_away_and_may_be_had_again_by_the_next_client(host: EmbeddedHost) -> None:
    nic = host.add_nic()
    with pytest.raises(UsageError, match="no client"):
        host.rescind(nic)
    device = open_device(host.attach(nic))
    driver = Netvsc(device)
    host.rescind(nic)
    assert device.rescinded
    with pytest.raises(UsageError, match="already"):
        host.rescind(nic)
    with pytest.raises(RescindedError):
        device.open(4)
    driver.close()
    device.close()
    with open_device(host.attach(nic)) as device, Netvsc(device) as driver:
        assert driver.mac == nic.mac


def test_a_card_taken_away_before_anybody_looked_is_not_offered(host: EmbeddedHost) -> None:
    a, b = host.add_nic("a"), host.add_nic("b")
    with host.attach(a, b) as device:
        host.rescind(a)
        with VmbusConnection(device) as connection:
            assert [offer.offer.instance_guid for offer in connection.offers.values()] == [b.offer.instance_guid]
        with VmbusConnection(device) as connection:
            assert len(connection.offers) == 1


# The end.


def close_under_clients() -> None:
    host = EmbeddedHost(poll="interrupt")
    device = open_device(host.attach(host.add_nic("a")))
    channel = device.open(8)
    raw = RawClient(host.attach(host.add_nic("b"))).connect()
    untouched = host.attach(host.add_nic("c"))
    host.close()
    channel.close()
    device.close()
    for use in (lambda: untouched.region(BAR0_REGION).read32(0), raw.device.reset, host.add_nic, lambda: host.run(int)):
        with pytest.raises(ClosedError):
            use()
    untouched.close()
    raw.close()


def test_closed_with_clients_attached_it_takes_everything_back() -> None:
    with nothing_left():
        close_under_clients()


def test_clients_may_go_in_any_order_with_the_host(host: EmbeddedHost) -> None:
    with nothing_left(objects=False):
        other = EmbeddedHost(poll="interrupt", name="short-lived")
        devices = [open_device(other.attach(other.add_nic())) for _ in range(3)]
        for device in devices:
            device.open(4)
        devices[1].close()
        closers = [threading.Thread(target=close) for close in (devices[0].close, other.close, devices[2].close)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()


def test_a_host_is_not_closed_from_its_own_loop(host: EmbeddedHost) -> None:
    with pytest.raises(UsageError, match="own loop"):
        host.run(host.close)
    assert host.run(lambda: 5) == 5


# Calls on the loop.


def test_calls_bring_back_what_they_return_or_raise(host: EmbeddedHost) -> None:
    assert host.run(lambda: "answer") == "answer"
    assert host.run(lambda: host.run(lambda: "within")) == "within"
    for error in (KeyError("key"), WaitTimeout("a thing", 1), TimeoutError("late"), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            host.run(lambda error=error: (_ for _ in ()).throw(error))
        assert caught.value is error
    assert host.run(lambda: 1) == 1


def test_calls_of_many_threads_are_made_one_at_a_time(host: EmbeddedHost) -> None:
    total = [0]
    results: list[int] = []

    def count() -> int:
        before = total[0]
        total[0] = before + 1
        return total[0]

    def many() -> None:
        results.extend(host.run(count) for _ in range(100))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(1, 401))


def test_a_call_that_the_loop_does_not_get_to_is_never_made(host: EmbeddedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_CALL_SECONDS", 0.05)
    stuck, begun = threading.Event(), threading.Event()
    made: list[int] = []

    def wait() -> None:
        begun.set()
        stuck.wait()

    blocker = threading.Thread(target=lambda: host._loop.call_soon_threadsafe(wait))
    blocker.start()
    blocker.join()
    begun.wait()
    with pytest.raises(WaitTimeout, match="control plane"):
        host.run(lambda: made.append(1))
    stuck.set()
    monkeypatch.undo()
    host.run(lambda: None)
    assert made == []


def test_calls_that_race_with_the_end_are_answered_or_refused() -> None:
    with nothing_left(objects=False):
        host = EmbeddedHost(poll="interrupt")
        outcomes: list[object] = []

        def call() -> None:
            while True:
                try:
                    outcomes.append(host.run(lambda: 1))
                except VfioVmbusError as error:
                    outcomes.append(type(error))
                    return

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(outcomes) > 50, "some calls")
        host.close()
        for thread in threads:
            thread.join()
        assert outcomes.count(ClosedError) == 4
        assert set(outcomes) == {1, ClosedError}


# Defects.


def test_a_callback_that_raises_is_logged_and_the_loop_goes_on(host: EmbeddedHost, caplog: pytest.LogCaptureFixture) -> None:
    def defect() -> None:
        raise ZeroDivisionError("in a callback")

    host._loop.call_soon_threadsafe(defect)
    host.run(lambda: None)
    assert host.run(lambda: 2) == 2
    record = next(record for record in caplog.records if record.name == "vfio_vmbus.host")
    assert record.levelname == "ERROR"
    assert "in a callback" in caplog.text


def test_a_client_that_cannot_be_freed_does_not_keep_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with nothing_left(objects=False):
        host = EmbeddedHost(poll="interrupt")
        stuck, other = host.attach(name="stuck"), host.attach(name="other")
        function = stuck.function
        backend = function.backend
        assert backend is not None

        def refuse() -> None:
            backend.stop = type(backend).stop.__get__(backend)  # type: ignore[method-assign]
            raise ZeroDivisionError("a defect")

        backend.stop = refuse  # type: ignore[method-assign]
        assert other.region(BAR0_REGION).read32(reg.REG_MAGIC) == reg.MAGIC
        host.close()
    assert "a defect" in caplog.text
    with pytest.raises(ClosedError):
        other.reset()


def test_the_operator_is_not_bothered_by_a_client_that_broke_its_ring(host: EmbeddedHost) -> None:
    """A change of the link is told over the channel's ring: if that is broken, that card's client alone is affected."""
    a, b = host.add_nic("a"), host.add_nic("b")
    with open_device(host.attach(a)) as first, open_device(host.attach(b)) as second:
        broken, good = Netvsc(first, ring_pages=4), Netvsc(second)
        ring = broken.queue.channel.incoming
        for _ in range(1000):  # until the ring towards the card's driver is full
            ring.mapping.write(4, (0xFFFF_FFFC).to_bytes(4, "little"))
            host.set_link(a, not a.link)
            if a.version is None:  # the card uses its channel no more
                break
        assert a.version is None
        host.set_link(b, False)

        def down() -> bool:
            good.queue.rx_burst()
            good.poll()
            return not good.link

        eventually(down, "the link of the other card is down")
        good.close()
