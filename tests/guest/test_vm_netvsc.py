"""Linux's hv_netvsc over our host, in a guest of our virtual machine: one boot, in which every step is told apart."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import PAYLOADS
from .kvm import KvmGuest, steps_of
from .payloads.vm_netvsc import STEPS

PAYLOAD = PAYLOADS / "vm_netvsc.py"
PATIENCE = 1800.0
"""Seconds for all steps on a loaded machine."""


@pytest.fixture(scope="module")
def steps(kvm: KvmGuest, images: dict[str, str]) -> dict[str, tuple[Any, str]]:
    return steps_of(kvm.start(PAYLOAD, "cards", PATIENCE, **images), STEPS, PATIENCE)


@pytest.mark.parametrize("name", STEPS)
def test_step(steps: dict[str, tuple[Any, str]], name: str) -> None:
    why = steps[name][1]
    if why:
        pytest.fail(why, pytrace=False)


def test_what_the_steps_found(steps: dict[str, tuple[Any, str]]) -> None:
    assert steps["found"][0] == ["hv_vmbus: Vmbus version:5.3"]
    assert steps["versions"][0] == [0x50002, 0x40000, 0x20004, 0x50003]
    assert steps["power_off"][0] == "power-off"


def test_two_guests_on_one_switch(kvm: KvmGuest, images: dict[str, str]) -> None:
    """They ping each other and a namespace. One has two processors, the other's host knows no VMBus but the oldest."""
    found = kvm.run(PAYLOAD, "two_guests", PATIENCE, **images)
    assert found["versions"] == [0x50003, 0x20004]
    assert found["processors"] == ["2", "1"]
    assert found["received"] == [10, 10]
    assert found["each other"] == [True, True]
