"""Our driver on a host with faults: it goes on, or says what is wrong in time; and a lying host does not get it out of its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from vfio_vmbus.channel.connection import VmbusConnection
from vfio_vmbus.channel.device import VmbusDevice
from vfio_vmbus.channel.offered import OfferedDevice
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import PeerError, RefusedError, WaitTimeout
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.host.faults.plan import LIES, FaultPlan, Flow
from vfio_vmbus.testing.leaks import nothing_left
from vfio_vmbus.wire import oid

SMALL: dict[str, Any] = {"ring_pages": 16, "receive_buffer": 1 << 20, "send_buffer": 1 << 18}
PATIENCE = 60.0


@dataclass
class Duo:
    """Two cards on a host, each with its driver."""

    host: EmbeddedHost
    options: dict[str, Any]
    personality: str
    nics: list[Netvsc] = field(default_factory=list)
    stacks: list[ExitStack] = field(default_factory=list)

    def open(self, name: str) -> None:
        """One more."""
        with ExitStack() as stack:
            device = stack.enter_context(open_device(self.host.attach(self.host.nics[name], personality=self.personality)))
            self.nics.append(stack.enter_context(Netvsc(device, **(SMALL | self.options))))
            self.stacks.append(stack.pop_all())

    def reopen_left(self) -> None:
        """Another driver for the left card; it stands first again."""
        self.stacks.pop(0).close()
        self.nics.pop(0)
        self.open("left")
        for items in (self.nics, self.stacks):
            items.reverse()  # type: ignore[attr-defined]

    @property
    def left(self) -> Netvsc:
        return self.nics[0]

    @property
    def right(self) -> Netvsc:
        return self.nics[1]

    def frame(self, fill: int = 7) -> bytes:
        """From left to right."""
        return (self.right.mac + self.left.mac + b"\x88\xb5").ljust(60, bytes([fill]))

    def pass_frames(self, count: int, came: int | None = None) -> list[bytes]:
        """Send so many one by one, each as a transfer of its own, and wait for those that are to come (all)."""
        got: list[bytes] = []
        end = time.monotonic() + PATIENCE
        for number in range(count):
            while self.left.queue.send([self.frame(number % 256)]) == 0:
                assert time.monotonic() < end, "no room"
            self.left.queue.receive()
        while len(got) < (count if came is None else came):
            self.right.queue.wait(0.05)
            got += self.right.queue.receive()
            self.left.queue.receive()
            assert time.monotonic() < end, f"{len(got)} frames of {count}"
        return got

    def answered(self, outstanding: int = 0) -> None:
        """Wait until so many transfers of the left one are unanswered."""
        end = time.monotonic() + PATIENCE
        while self.left.queue.unanswered != outstanding:
            self.left.queue.wait(0.02)
            self.left.queue.receive()
            assert time.monotonic() < end, f"{self.left.queue.unanswered} transfers are unanswered"

    def answered_twice(self, times: int) -> None:
        """Wait until the left one has counted so many completions of nothing, and no more."""
        end = time.monotonic() + PATIENCE
        while self.left.counters().bad_completions < times:
            self.left.queue.wait(0.02)
            self.left.queue.receive()
            assert time.monotonic() < end, self.left.counters()
        assert self.left.counters().bad_completions == times

    def hits(self, device: str, flow: Flow) -> int:
        return sum(count.hits for count in self.host.fault_counts() if (count.device, count.flow) == (device, flow.value))


@contextmanager
def duo(*texts: str, seed: int = 0, personality: str = "pci", **options: Any) -> Iterator[Duo]:
    with EmbeddedHost(faults=FaultPlan.parse(texts, seed)) as host:
        made = Duo(host, options, personality)
        try:
            for name in ("left", "right"):
                host.add_nic(name)
                made.open(name)
            yield made
        finally:
            for stack in made.stacks:
                stack.close()


AFTER = ":after=30"
"""Packets of the handshake, and some."""


@pytest.mark.parametrize("personality", ["pci", "vmbus"])
def test_without_a_hit_all_is_as_ever(personality: str) -> None:
    with nothing_left(objects=False), duo("drop:packets:1:after=1000000", personality=personality) as rig:
        assert len(rig.pass_frames(300)) == 300
        rig.answered()
        assert all(count.hits == 0 for count in rig.host.fault_counts())


@pytest.mark.parametrize("personality", ["pci", "vmbus"])
def test_a_lost_announcement_costs_its_frames_and_nothing_else(personality: str) -> None:
    with duo("drop:packets-to-guest:1:after=20:times=5", personality=personality) as rig:
        lost = 0
        for number in range(40):
            rig.left.queue.send([rig.frame(number)])
            end = time.monotonic() + PATIENCE
            while not (got := rig.right.queue.receive()) and rig.hits("right", Flow.PACKETS_TO_GUEST) == lost:
                rig.right.queue.wait(0.01)
                assert time.monotonic() < end
            assert got in ([rig.frame(number)], [])
            lost += not got
        assert lost == 5
        rig.answered()
        rig.right.queue.receive()
        for _ in range(3):  # more than there are sections
            assert len(rig.pass_frames(250)) == 250
        counters = rig.host.nics["right"].counters()
        assert (counters["bad_completions"], counters["no_buffer"]) == (0, 0)


def test_a_lost_completion_costs_its_section_until_the_channel_closes() -> None:
    """As in Linux, which waits for it when the card goes down; we do not wait: the host is done with a channel that is closed."""
    with duo(f"drop:completions:1{AFTER}:times=3") as rig:
        assert len(rig.pass_frames(150)) == 150
        rig.answered(3)
        assert rig.left.counters().bad_completions == 0
        rig.reopen_left()
        assert len(rig.pass_frames(150)) == 150
        rig.answered()


def test_when_all_completions_are_lost_sending_stops_and_says_so() -> None:
    """A full queue is flow control, a question without answer an error."""
    with duo(f"drop:completions:1{AFTER}", timeout=1.0) as rig:
        end = time.monotonic() + PATIENCE
        while rig.left.queue.send([rig.frame()]) or rig.left.queue.send([rig.frame()]):
            assert time.monotonic() < end
        assert rig.left.queue.unanswered >= SMALL["send_buffer"] // 6144
        for _ in range(200):
            with suppress(WaitTimeout):
                rig.left.query(oid.OID_GEN_LINK_SPEED, 4)
                continue
            break
        else:
            pytest.fail("questions are GPA-direct, out of a pool: without completions it is empty one day")


def test_completions_twice_are_counted() -> None:
    with duo(f"duplicate:completions:0.3{AFTER}") as rig:
        rig.pass_frames(200)
        rig.answered()
        hits = rig.hits("left", Flow.COMPLETIONS)
        assert hits > 20
        rig.answered_twice(hits)


def test_frames_twice_where_transfers_come_twice() -> None:
    with duo(f"duplicate:packets-to-host:1{AFTER}:times=10") as rig:
        got = rig.pass_frames(100, 110)
        assert len(got) == 110
        rig.answered_twice(10)  # the host answered each


def test_late_completions_and_packets_come() -> None:
    with duo(f"delay:completions:0.5:2ms{AFTER}", f"delay:packets:0.2:2ms{AFTER}") as rig:
        got = rig.pass_frames(200)
        assert sorted(got) == sorted(rig.frame(number % 256) for number in range(200))
        rig.answered()


def test_lost_interrupts_are_made_up_for_by_looking() -> None:
    """Nothing tells of a frame whose interrupt is lost, so a driver that waits for nothing else waits in vain; ours looks again."""
    with duo("drop:interrupts:1:after=3") as rig:
        for number in range(5):
            rig.left.queue.send([rig.frame(number)])
            end = time.monotonic() + PATIENCE
            while not (got := rig.right.queue.receive()):
                rig.right.queue.wait(0.02)
                assert time.monotonic() < end
            assert got == [rig.frame(number)]
        assert rig.right.query(oid.OID_GEN_LINK_SPEED, 4)
        assert rig.hits("right", Flow.INTERRUPTS) > 0


def test_late_and_doubled_interrupts_are_no_matter() -> None:
    with duo("delay:interrupts:0.5:3ms", "duplicate:interrupts:0.5") as rig:
        assert len(rig.pass_frames(100)) == 100
        assert rig.right.query(oid.OID_GEN_LINK_SPEED, 4)


QUESTIONS = 40


def conversation(seed: int) -> tuple[list[tuple[int, int]], int]:
    """A driver that asks one thing after the other: what was hit on the way, and what it noticed."""
    plan = FaultPlan.parse(["duplicate:completions:0.3", "delay:packets-to-host:0.2:1ms"], seed)
    with (
        EmbeddedHost(faults=plan) as host,
        open_device(host.attach(host.add_nic("card"))) as device,
        Netvsc(device, **SMALL) as nic,
    ):
        for _ in range(QUESTIONS):
            nic.query(oid.OID_GEN_LINK_SPEED, 4)
        nic.queue.receive()
        return [(count.seen, count.hits) for count in host.fault_counts()], nic.counters().bad_completions


def test_the_same_seed_hits_the_same() -> None:
    first = conversation(3)
    assert first == conversation(3)
    assert first[0] != conversation(4)[0]


# Whatever happens, it ends: with what was asked for, or an error of the peer's.

KINDS = [
    "drop:packets:0.05",
    "drop:completions:0.1",
    "drop:completions-to-host:0.1",
    "drop:messages:0.05",
    "duplicate:packets:0.2",
    "duplicate:messages:0.2",
    "duplicate:completions-to-host:0.5",
    "corrupt:packets:0.1",
    "corrupt:completions:0.2",
    "corrupt:completions-to-host:0.2",
    "corrupt:messages:0.1",
    "delay:messages:0.3:1ms",
    "delay:packets:0.3:1ms",
    "drop:interrupts:0.3",
]


def connected(stack: ExitStack, host: EmbeddedHost, name: str, personality: str) -> VmbusDevice:
    """A card's device, whose host is not waited for as long as usual."""
    if personality == "vmbus":
        return stack.enter_context(open_device(host.attach(host.nics[name], personality=personality)))
    connection = stack.enter_context(VmbusConnection(stack.enter_context(host.attach(host.nics[name])), timeout=0.2))
    for offer in connection.offers.values():
        return stack.enter_context(OfferedDevice(connection, offer, lambda: None))
    raise RefusedError("nothing is offered")


def drive(host: EmbeddedHost, personality: str = "pci", steps: int = 20) -> list[PeerError]:
    """Two drivers come up, exchange frames, ask questions, go down, whatever it comes to. What they said of it."""
    errors: list[PeerError] = []
    try:
        with ExitStack() as stack:
            nics = []
            for name in ("left", "right"):
                nics.append(stack.enter_context(Netvsc(connected(stack, host, name, personality), **SMALL, timeout=0.2)))
            frame = (nics[1].mac + nics[0].mac + b"\x88\xb5").ljust(60, b"\5")
            for step in range(steps):
                for nic in nics:
                    try:
                        exchange(nic, frame, asked=step % 10 == 9)
                    except PeerError as error:
                        errors.append(error)
    except PeerError as error:
        errors.append(error)
    return errors


def exchange(nic: Netvsc, frame: bytes, *, asked: bool) -> None:
    nic.queue.send([frame] * 8)
    nic.queue.wait(0.001)
    nic.queue.receive()
    nic.poll()
    if asked:
        nic.query(oid.OID_GEN_LINK_SPEED, 4)


def survives(*orders: str, seed: int, noticed: bool = False, personality: str = "pci") -> list[PeerError]:
    """Drive a host that does this, twice; then nothing is left of it. noticed: until somebody says that something is wrong."""
    with nothing_left(objects=False), EmbeddedHost(faults=FaultPlan.parse(orders, seed)) as host:
        for name in ("left", "right"):
            host.add_nic(name)
        errors = [error for _ in range(2) for error in drive(host, personality)]
        end = time.monotonic() + PATIENCE
        while noticed and not errors:
            errors = drive(host, personality)
            assert time.monotonic() < end, "so many lies, and nobody has noticed"
    return errors


@pytest.mark.parametrize("order", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_every_fault_ends_well_or_in_a_typed_error(order: str, seed: int) -> None:
    survives(order, seed=seed)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("seed", range(5))
def test_a_host_that_lies_gets_no_driver_out_of_its_memory(lie: str, seed: int) -> None:
    """Early, during the handshake, and late. Interpreted, each access that leaves the driver's memory is found."""
    survives(f"hostile:{lie}:1/5", seed=seed)
    survives(f"hostile:{lie}:1/8:after=15", seed=seed, noticed=lie in ("indices", "headers", "nvsp", "rndis", "messages"))


@pytest.mark.parametrize("personality", ["pci", "vmbus"])
@pytest.mark.parametrize("seed", range(5))
def test_a_host_that_lies_about_everything(seed: int, personality: str) -> None:
    assert survives("hostile:all:1/5", seed=seed, noticed=True, personality=personality)
