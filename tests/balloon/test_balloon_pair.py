"""The balloon driver and the embedded host's balloon against each other."""

from __future__ import annotations

import os

import pytest

from tests.balloon.balloon_rig import PLENTY, balloon_pair
from vfio_vmbus.channel.offered import open_offered
from vfio_vmbus.drivers.balloon.driver import Balloon
from vfio_vmbus.drivers.balloon.memory import CHUNK_PAGES
from vfio_vmbus.drivers.balloon.pressure import Pressure, floor, read_pressure
from vfio_vmbus.errors import RefusedError, RescindedError, UnavailableError, UsageError
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire import dm


@pytest.mark.parametrize("versions", [dm.SUPPORTED_VERSIONS, (dm.VERSION_1,), (dm.VERSION_0_3,)])
def test_the_newest_common_version_is_taken(versions):
    with balloon_pair(vsp={"versions": versions}) as pair:
        assert pair.driver.info.version == dm.version_text(versions[0])
        assert pair.vsp.version == versions[0]
        assert pair.vsp.capabilities == dm.Capabilities.of(balloon=1)


def test_no_common_version_is_refused():
    told = pytest.raises(RefusedError, match=r"speaks no dynamic memory protocol of 2\.0, 1\.0")
    with told, balloon_pair(vsp={"versions": (dm.VERSION_0_3,)}, versions=(dm.VERSION_2, dm.VERSION_1)):
        pass


def test_pages_are_given_and_come_back():
    with nothing_left(objects=False), balloon_pair() as pair:
        pair.ask(3 * CHUNK_PAGES + 5)
        assert pair.vsp.ballooned == pair.driver.info.pages == 3 * CHUNK_PAGES + 5
        pair.ask(1)
        assert pair.vsp.ballooned == 3 * CHUNK_PAGES + 6
        pair.give_back(CHUNK_PAGES)
        pair.give_back(2 * CHUNK_PAGES + 6)
        info = pair.driver.info
        assert pair.vsp.ballooned == info.pages == 0
        assert (info.requests, info.given, info.returned) == (2, 3 * CHUNK_PAGES + 6, 3 * CHUNK_PAGES + 6)


def test_memory_that_is_given_goes_back_to_the_machine():
    with balloon_pair() as pair:
        pair.ask(CHUNK_PAGES)
        (given,) = [entry for entry in _maps(pair) if entry.size == CHUNK_PAGES * PAGE]
        assert os.fstat(given.fd).st_blocks == 0
        assert os.fstat(given.fd).st_size == CHUNK_PAGES * PAGE


def _maps(pair):
    return pair.host.connection_of(pair.vsp).domain.maps


def test_no_more_than_the_limit_is_given():
    with balloon_pair(limit=700) as pair:
        pair.ask(600)
        pair.ask(600)
        assert pair.vsp.ballooned == 700
        pair.ask(600)
        assert pair.vsp.ballooned == 700


def test_a_machine_that_is_short_of_memory_gives_less():
    least = Pressure(total=1 << 16, available=floor(1 << 16) + 10, committed=0, swap=0)
    with balloon_pair(pressure=lambda: least) as pair:
        pair.ask(100)
        assert pair.vsp.ballooned == 10
    none = Pressure(total=1 << 16, available=5, committed=0, swap=0)
    with balloon_pair(pressure=lambda: none) as pair:
        pair.ask(100)
        assert pair.vsp.ballooned == 0


def test_without_a_limit_the_host_is_told_that_there_is_nothing_to_have():
    with balloon_pair(limit=0) as pair:
        assert pair.vsp.capabilities == dm.Capabilities(0)
        pair.ask(10)
        assert pair.vsp.ballooned == 0


def test_reports_say_how_it_is():
    with balloon_pair(report=0.01) as pair:
        pair.until(lambda: pair.vsp.reports >= 3)
        status = pair.vsp.status
        assert (status.available, status.committed, status.page_file_size) == (1 << 19, (1 << 18) + floor(1 << 20), 7)
        assert pair.driver.info.reports >= 3


def test_hot_added_memory_is_refused_for_good_unless_somebody_takes_it():
    with balloon_pair() as pair:
        pair.host.run(lambda: pair.vsp.hot_add(1 << 20, 512))
        pair.until(lambda: not pair.vsp.busy)
        assert pair.vsp.hot_added == (0, 1)
    offered = []

    def take(start, count):
        offered.append((start, count))
        return count // 2

    with balloon_pair(hot_add=take) as pair:
        assert pair.vsp.capabilities.hot_add
        pair.host.run(lambda: pair.vsp.hot_add(1 << 20, 512))
        pair.until(lambda: not pair.vsp.busy)
        assert pair.vsp.hot_added == (256, 1)
        assert offered == [(1 << 20, 512)]
        assert pair.driver.info.hot_adds == 1


def test_the_host_says_how_much_there_may_be():
    with balloon_pair(vsp={"max_pages": 12345}) as pair:
        pair.until(lambda: pair.driver.info.max_pages)
        assert pair.driver.info.max_pages == 12345


def test_the_host_is_not_asked_out_of_order():
    with EmbeddedHost() as host:
        vsp = host.add_balloon()
        with pytest.raises(UsageError, match="has no guest"):
            host.run(lambda: vsp.request(1))
        with pytest.raises(UsageError, match="has a balloon balloon0 already"):
            host.add_balloon()
    with balloon_pair() as pair:
        with pytest.raises(UsageError, match="0 are there"):
            pair.host.run(lambda: pair.vsp.give_back(1))
        pair.host.run(lambda: pair.vsp.request(1))
        with pytest.raises(UsageError, match="awaits its BalloonResponse"):
            pair.host.run(lambda: pair.vsp.request(1))


def test_a_driver_that_comes_back_begins_anew():
    with nothing_left(objects=False), EmbeddedHost() as host:
        vsp = host.add_balloon()
        with open_offered(host.attach(vsp)) as device:
            for _ in range(3):
                with Balloon(device, limit=100, pressure=lambda: PLENTY) as driver:
                    host.run(lambda: vsp.request(50))
                    while vsp.busy:
                        driver.serve(0.005)
                    assert vsp.ballooned == 50


def test_a_device_that_is_taken_away_says_so():
    with balloon_pair() as pair:
        pair.host.rescind(pair.vsp)
        with pytest.raises(RescindedError):
            pair.driver.serve(30)


def test_another_device_is_no_balloon():
    with (
        EmbeddedHost() as host,
        open_offered(host.attach(host.add_nic())) as device,
        pytest.raises(UsageError, match="is no balloon"),
    ):
        Balloon(device)


def test_pressure_comes_from_the_machine(tmp_path):
    now = read_pressure()
    assert 0 < now.available <= now.total
    for text in ("", "MemTotal: kB\n", "MemTotal: 4 kB\nMemAvailable: 4 kB\n"):
        (tmp_path / "meminfo").write_text(text)
        with pytest.raises(UnavailableError, match="does not say how much memory"):
            read_pressure(tmp_path / "meminfo")
    with pytest.raises(UnavailableError):
        read_pressure(tmp_path / "nothing")


@pytest.mark.parametrize(("mib", "least"), [(16, 16), (32, 24), (128, 72), (512, 168), (2048, 360), (8192, 744), (32768, 1512)])
def test_the_floor_is_linuxs(mib, least):
    assert floor(mib * 256) == least * 256
