"""The attacks of test_attacks.py by clients whose card the host has opened for them: all that need no VMBus connection of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.netvsp.test_attacks import SMALL, Stage, check_attack
from tests.netvsp.traffic import Traffic
from vfio_vmbus.channel.offered import open_offered
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.host.embedded import EmbeddedHost
from vfio_vmbus.iommu.domain import Fault
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.attacker import Attack, Attacker, Outcome, range_words
from vfio_vmbus.testing.hostile import ATTACKS, Arena
from vfio_vmbus.wire import nvsp

FITTING = tuple(attack for attack in ATTACKS if not attack.bus)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    with EmbeddedHost() as host:
        victim = open_offered(host.attach(host.add_nic("victim")))
        friend = open_device(host.attach(host.add_nic("friend"), personality="vmbus"))
        with victim, friend, Netvsc(victim, **SMALL) as sender, Netvsc(friend, **SMALL) as receiver:
            with Arena(host, victim, personality="vmbus") as arena, Traffic(sender, receiver) as traffic:
                yield Stage(host, arena, traffic)
            assert sender.counters().bad_completions == receiver.counters().bad_completions == 0
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("attack", FITTING, ids=[attack.name for attack in FITTING])
def test_an_attack(stage: Stage, attack: Attack) -> None:
    check_attack(stage, attack)


def test_most_attacks_fit() -> None:
    assert len(FITTING) >= 60
    assert {attack.name for attack in ATTACKS if attack.bus} == {
        "gpadl/read-only",
        "gpadl/write-only",
        "gpadl/forged",
        "gpadl/torn-down",
        "gpadl/unmapped",
        "flood/gpadls",
    }


def test_the_send_buffer_does_not_become_a_receive_buffer(stage: Stage) -> None:
    """It is the host's own memory, but not for it to write: another section would be the guest's while it sends from it."""

    def swap(attacker: Attacker) -> Outcome:
        attacker.inband(nvsp.RevokeReceiveBuffer(buffer_id=nvsp.RECEIVE_BUFFER_ID))
        attacker.inband(nvsp.SendReceiveBuffer(gpadl=attacker.send_buffer.handle, buffer_id=nvsp.RECEIVE_BUFFER_ID))
        return attacker.outcome()

    verdict = stage.arena.judge(Attack("swap", "", swap, lawful=True))
    assert (verdict.outcome.succeeded, verdict.outcome.failed) == (1, 1)
    assert verdict.bytes_touched == 0
    stage.traffic.go_on()


def test_faults_name_client_address_and_direction(stage: Stage) -> None:
    function = stage.host.attach(stage.host.add_nic(), personality="vmbus")
    with open_device(function) as device:
        guest = Attacker(device)
        guest.pages(range_words(100, 8, [5]))
        guest.pages(range_words(100, 0, [guest.deaf.pfns[0]]))
        guest.outcome()
        name, deaf = function.info.name, guest.deaf.iova
        assert function.function.domain.faults() == [
            Fault(name, 5 * PAGE + 8, 100, "read", "not mapped"),
            Fault(name, deaf, 100, "read", "not mapped for this direction"),
        ]
