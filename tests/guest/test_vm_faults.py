"""Linux's hv_netvsc on a host with faults, in virtual machines of ours: what a driver has to take, and what this one is known not to."""

from __future__ import annotations

import pytest

from .conftest import PAYLOADS
from .kvm import KvmGuest

PAYLOAD = PAYLOADS / "vm_faults.py"
PATIENCE = 600.0


def test_what_networks_do_as_well_is_taken(kvm: KvmGuest, images: dict[str, str]) -> None:
    """Frames are lost and late, completions come twice: TCP gets its bytes, and the driver comes up again."""
    seen = kvm.run(PAYLOAD, "mild", PATIENCE, **images)
    assert seen["ping"] == seen["again"] == 50
    assert {"fault_delay_packets_to_host", "fault_delay_interrupts"} <= set(seen["hits"])
    assert seen["warnings"] == []


def test_a_lost_completion_is_waited_for_without_end(kvm: KvmGuest, images: dict[str, str]) -> None:
    seen = kvm.run(PAYLOAD, "lost_completion", PATIENCE, **images)
    assert seen["ping"] == 50
    assert seen["rmmod"].startswith("D")


def test_a_lost_interrupt_makes_it_deaf(kvm: KvmGuest, images: dict[str, str]) -> None:
    assert kvm.run(PAYLOAD, "lost_interrupt", PATIENCE, **images) == {"ping": 0}


@pytest.mark.parametrize("lies", [["ranges", "nvsp", "rndis"], ["indices"]], ids="+".join)
def test_lies_that_it_outlives(kvm: KvmGuest, images: dict[str, str], lies: list[str]) -> None:
    orders = [f"hostile:{lie}:1/6:after=40:times=40" for lie in lies]
    seen = kvm.run(PAYLOAD, "lies", PATIENCE, **images, orders=orders, seed=1, hits=40 * len(lies))
    assert seen["ping"] == 50
    assert seen["warnings"] == []
    assert seen["said"] > 10


@pytest.mark.parametrize(("lie", "hits"), [("transactions", 100), ("oversize", 1)])
def test_one_that_a_lie_may_bring_down_harms_nobody_else(kvm: KvmGuest, images: dict[str, str], lie: str, hits: int) -> None:
    """Linux 6.12 panics on the first, and goes round its ring for ever on the second; another one may live. Its card
    is free afterwards, and the next guest of that host works."""
    seen = kvm.run(PAYLOAD, "next_guest", PATIENCE, **images, order=f"hostile:{lie}:1/2:after=100:times={hits}", hits=hits)
    print(f"after {seen['told']} lies about {lie} the guest: {seen['fate']}")
    assert (seen["ping"], seen["lies"], seen["warnings"]) == (10, {}, [])
