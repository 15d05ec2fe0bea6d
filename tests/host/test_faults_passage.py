"""One flow on its way: what comes out, when, and how often. Order is what these tests look at, not time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from vfio_vmbus.host.faults.fate import Desk
from vfio_vmbus.host.faults.passage import MAX_HELD, Passage
from vfio_vmbus.host.faults.plan import FaultPlan, Flow


def passed(
    texts: list[str],
    things: list[bytes],
    check: Callable[[Passage, list[bytes]], None] = lambda passage, out: None,
    **options: object,
) -> list[bytes]:
    """What comes out in the end. check: is called when everything was put in, before anything late has come."""
    out: list[bytes] = []

    async def run() -> None:
        done = asyncio.Event()
        gate = Desk(FaultPlan.parse(texts)).gate("nic0", Flow.COMPLETIONS)
        passage = Passage(gate, out.append, kick=done.set, **options)  # type: ignore[arg-type]
        for thing in things:
            passage.put(thing)
        check(passage, out)
        while passage.held:
            await asyncio.wait_for(done.wait(), 60)
            done.clear()

    asyncio.run(run())
    return out


THINGS = [bytes([number]) * 16 for number in range(10)]


def test_nothing_ordered() -> None:
    assert passed([], THINGS) == THINGS


def test_lost_and_doubled() -> None:
    lost: list[bytes] = []
    assert passed(["drop:completions:1:after=3:times=2"], THINGS, dropped=lost.append) == THINGS[:3] + THINGS[5:]
    assert lost == THINGS[3:5]
    assert passed(["duplicate:completions:1:times=1"], THINGS) == [THINGS[0], *THINGS]


@pytest.mark.parametrize("spared", [0, 8, 15])
def test_corrupted_by_one_bit_behind_what_is_spared(spared: int) -> None:
    out = passed(["corrupt:completions:1"], THINGS, spared=spared)
    assert all(changed[:spared] == thing[:spared] for changed, thing in zip(out, THINGS, strict=True))
    flips = [int.from_bytes(a, "big") ^ int.from_bytes(b, "big") for a, b in zip(out, THINGS, strict=True)]
    assert [flip.bit_count() for flip in flips] == [1] * len(THINGS)
    assert len(set(flips)) > 3


@pytest.mark.parametrize("spared", [16, 20])
def test_nothing_left_to_corrupt(spared: int) -> None:
    assert passed(["corrupt:completions:1"], THINGS, spared=spared) == THINGS


def test_late_ones_are_overtaken() -> None:
    out = passed(["delay:completions:1:1ms:after=2:times=2"], THINGS)
    assert out == THINGS[:2] + THINGS[4:] + THINGS[2:4]


def test_a_shorter_delay_overtakes_a_longer_one_behind_it() -> None:
    out = passed(["delay:completions:1:200ms:times=1", "delay:completions:1:1ms:after=1:times=1"], THINGS[:3])
    assert out == [THINGS[2], THINGS[1], THINGS[0]]


def test_in_order_what_is_behind_waits() -> None:
    orders = ["delay:completions:1:20ms:after=2:times=1", "delay:completions:1:1ms:after=3:times=1"]

    def check(passage: Passage, out: list[bytes]) -> None:
        assert out == THINGS[:2]
        assert passage.held == 8

    assert passed(orders, THINGS, check, in_order=True) == THINGS


def test_no_more_is_held_than_may_be() -> None:
    many = [number.to_bytes(8, "little") for number in range(MAX_HELD + 50)]

    def check(passage: Passage, out: list[bytes]) -> None:
        assert passage.held == MAX_HELD
        assert out == many[MAX_HELD:]

    assert passed(["delay:completions:1:50ms"], many, check) == many[MAX_HELD:] + many[:MAX_HELD]


def test_no_more_is_held_in_order_either() -> None:
    many = [number.to_bytes(8, "little") for number in range(3 * MAX_HELD + 7)]

    def check(passage: Passage, out: list[bytes]) -> None:
        assert passage.held <= MAX_HELD
        assert out == many[: len(many) - passage.held]

    assert passed(["delay:completions:1/10:50ms"], many, check, in_order=True) == many


def test_copies_of_an_interrupt_come_apart() -> None:
    def check(passage: Passage, out: list[bytes]) -> None:
        assert out == [b"", b""]
        assert passage.held == 2

    assert passed(["duplicate:completions:1"], [b"", b""], check, gap=0.001) == [b""] * 4


def test_closing_lets_go() -> None:
    def check(passage: Passage, out: list[bytes]) -> None:
        passage.close()
        passage.close()
        assert passage.held == 0

    assert passed(["delay:completions:1:1ms"], THINGS, check) == []
