"""The monitor page: bits that a guest sets become signals of those channels, however fast they come; nothing else is touched."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from raw_client import eventually

from vfio_vmbus.host.monitor import FASTEST_NS, SLOWEST_NS, Monitor
from vfio_vmbus.memory.access import or32
from vfio_vmbus.memory.kernel import INTERPRETED, step
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.memory.shared import SharedMemory
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.wire.monitor import MonitorPage, TriggerGroup, pending_bit


@step("i8(i8, i8)")
def _or(word: int, bits: int) -> int:
    return or32(word, bits)


@contextmanager
def monitored() -> Iterator[tuple[Monitor, int]]:
    """A monitor, and the address of the guest's page."""
    with nothing_left(objects=False), SharedMemory(PAGE) as memory, memory.map() as guest:
        page = memory.map()
        monitor = Monitor(page, "monitor")
        try:
            yield monitor, guest.address
        finally:
            monitor.stop()
            page.close()


def set_bit(page: int, number: int) -> None:
    offset, bit = pending_bit(number)
    _or(page + offset, bit)


def ready(fd: int) -> bool:
    return eventfd.take(fd)


@pytest.fixture
def bells() -> Iterator[dict[int, int]]:
    bells = {number: eventfd.make() for number in (0, 1, 31, 32, 63, 64, 127)}
    yield bells
    for fd in bells.values():
        os.close(fd)


def test_each_bit_rings_its_own_channel(bells: dict[int, int]) -> None:
    with monitored() as (monitor, page):
        for number, fd in bells.items():
            monitor.watch(number, fd)
        for number, fd in bells.items():
            for _ in range(3):
                set_bit(page, number)
                eventually(lambda fd=fd: ready(fd), f"a signal of {number}")
            assert not any(ready(other) for other in bells.values())
            assert monitor.page.read(pending_bit(number)[0], 4) == bytes(4)
        assert monitor.state["signals"] == 3 * len(bells)


def test_bits_set_together_ring_all_of_them(bells: dict[int, int]) -> None:
    with monitored() as (monitor, page):
        for number, fd in bells.items():
            monitor.watch(number, fd)
        for group in range(4):
            _or(page + MonitorPage.OFFSETS["groups"] + group * TriggerGroup.SIZE, 0xFFFF_FFFF)
        for fd in bells.values():
            eventually(lambda fd=fd: ready(fd), "a signal")
        looks = monitor.state["looks"]
        eventually(lambda: monitor.state["looks"] > looks + 2, "more looks")
        assert monitor.state["signals"] == len(bells)
        left = [int.from_bytes(monitor.page.read(8 + group * 8, 4), "little") for group in range(4)]
        for group, bits in enumerate(left):  # the bits of nobody are not ours
            mine = sum(1 << number % 32 for number in bells if number // 32 == group)
            assert bits == 0xFFFF_FFFF & ~mine


def test_without_an_open_channel_the_page_is_nobodys_business(bells: dict[int, int]) -> None:
    """Linux frees the page without a word when it unloads its driver; its channels are closed by then."""
    with monitored() as (monitor, page):
        monitor.watch(3, bells[0])
        set_bit(page, 3)
        eventually(lambda: ready(bells[0]), "a signal")
        monitor.unwatch(3)
        monitor.page.write(0, b"\xa5" * PAGE)
        with monitor.worker.paused():
            looks = monitor.state["looks"]
        sleeps = monitor.worker.control["sleeps"]
        monitor.worker.wake()
        eventually(lambda: monitor.worker.control["sleeps"] > sleeps, "it has woken up and sleeps again")
        assert monitor.page.read(0, PAGE) == b"\xa5" * PAGE
        assert monitor.state["looks"] == looks
        monitor.page.write(0, bytes(PAGE))
        monitor.watch(3, bells[1])
        set_bit(page, 3)
        eventually(lambda: ready(bells[1]), "a signal")


def test_the_rest_of_the_page_is_the_guests(bells: dict[int, int]) -> None:
    with monitored() as (monitor, page), SharedMemory(PAGE) as other, other.map() as pattern:
        pattern.write(0, b"\xa5" * PAGE)
        monitor.watch(0, bells[0])
        begin = MonitorPage.OFFSETS["groups"] + 4 * TriggerGroup.SIZE
        for at in range(begin, PAGE, 4):
            _or(page + at, 0xA5A5A5A5)
        for group in range(4):
            _or(page + MonitorPage.OFFSETS["groups"] + group * TriggerGroup.SIZE + 4, 0xA5A5A5A5)  # `armed`
        set_bit(page, 0)
        eventually(lambda: ready(bells[0]), "a signal")
        seen = monitor.page.read(0, PAGE)
        groups = b"".join(bytes(4) + b"\xa5" * 4 for _ in range(4))
        assert seen == bytes(8) + groups + pattern.read(begin, PAGE - begin)


def test_a_channel_that_is_gone_is_not_rung(bells: dict[int, int]) -> None:
    with monitored() as (monitor, page):
        monitor.watch(5, bells[0])
        monitor.watch(6, bells[1])
        monitor.unwatch(5)
        for _ in range(3):
            set_bit(page, 5)
            set_bit(page, 6)
            eventually(lambda: ready(bells[1]), "a signal of the other")
        assert not ready(bells[0])
        assert monitor.page.read(8, 4) == (1 << 5).to_bytes(4, "little")


def test_a_page_without_channels_is_read_only(bells: dict[int, int]) -> None:
    """Linux frees its page without a word when it unloads hv_vmbus; what it becomes must stay as it is."""
    with monitored() as (monitor, page):
        monitor.watch(5, bells[0])
        monitor.watch(40, bells[1])
        monitor.unwatch(5)
        _or(page + pending_bit(5)[0], 0xFFFF_FFFF)
        set_bit(page, 40)
        eventually(lambda: ready(bells[1]), "a signal of the other")
        looks = monitor.state["looks"]
        eventually(lambda: monitor.state["looks"] > looks + 2, "more looks")
        assert monitor.page.read(pending_bit(5)[0], 4) == b"\xff" * 4
        assert monitor.page.read(pending_bit(40)[0], 4) == bytes(4)
        assert not ready(bells[0])


def test_it_looks_less_often_the_longer_nothing_comes_and_at_once_when_something_does(bells: dict[int, int]) -> None:
    with monitored() as (monitor, page):
        monitor.watch(0, bells[0])
        eventually(lambda: monitor.state["period"] == SLOWEST_NS, "the longest period")
        set_bit(page, 0)
        eventually(lambda: ready(bells[0]), "a signal")
        eventually(lambda: monitor.state["period"] == SLOWEST_NS, "the longest period once more")
        assert monitor.state["looks"] > 50
        assert FASTEST_NS < SLOWEST_NS


def test_no_signal_is_lost_while_both_sides_are_at_it(bells: dict[int, int]) -> None:
    """Each time that the guest finds its bit clear before it sets it, a signal of its own must follow."""
    if INTERPRETED:
        return  # there a change of a word is not atomic, and says so
    with monitored() as (monitor, page):
        monitor.watch(0, bells[0])
        monitor.watch(1, bells[1])
        stop = threading.Event()

        def noise() -> None:
            while not stop.is_set():
                set_bit(page, 1)

        thread = threading.Thread(target=noise)
        thread.start()
        for _ in range(200):
            set_bit(page, 0)
            eventually(lambda: ready(bells[0]), "a signal")
        stop.set()
        thread.join()


def test_stopping_takes_no_longer_than_a_look(bells: dict[int, int]) -> None:
    with monitored() as (monitor, page):
        monitor.watch(0, bells[0])
        monitor.stop()
        monitor.stop()
        set_bit(page, 0)
        assert not ready(bells[0])
        assert not monitor.worker.running
