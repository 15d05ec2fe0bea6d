"""The command line in a guest of a real VMBus host: list, bind, unbind, doctor, audit, and the door to unsafe ways."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import PAYLOADS
from .nested import HyperVGuest

COMMANDS = PAYLOADS / "hyperv_commands.py"
PATIENCE = 600.0
"""Seconds for a payload: two emulations deep, on a loaded machine."""


@pytest.fixture(scope="module")
def commands(hyperv: HyperVGuest) -> dict[str, Any]:
    """What every command said, in one go there and back."""
    return hyperv.run(COMMANDS, "commands", timeout=PATIENCE)


def device(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [row for row in rows if row["device"] == f"vmbus:{name}"]
    return found


def test_there_and_back_by_the_command_line(commands: dict[str, Any]) -> None:
    said = commands
    name = said["name"]
    before, bound = device(said["list"]["said"], name), device(said["list bound"]["said"], name)
    assert (before["class"], before["instance"], before["driver"], before["isolation"]) == (
        "balloon",
        name,
        "hv_balloon",
        "kernel",
    )
    assert (before["state"], before["monitor"], before["problems"]) == ("opened", None, {})
    assert before["ring_out"] == before["ring_in"] > 4096
    assert (bound["driver"], bound["isolation"], bound["shows"], bound["nodes"]) == (
        "uio_hv_generic",
        "unsafe",
        ["uio0"],
        ["/dev/uio0"],
    )
    assert (bound["ring_out"], bound["ring_in"], bound["problems"]) == (0x200000, 0x200000, {})
    assert f"vmbus:{name}: unsafe: VMBus has no IOMMU" in said["table"]["said"]
    assert "driver" in said["doctor before"]["said"]["missing"]
    assert (said["doctor bound"]["said"]["missing"], said["doctor bound"]["status"]) == ([], 0)
    assert (said["bind"]["status"], said["bound"]) == (0, "uio_hv_generic")
    assert "is unsafe with uio_hv_generic" in said["bind"]["complained"]
    assert (said["unbind"]["status"], said["back"], said["override after"]) == (0, "hv_balloon", None)
    assert said["state"] == []


def test_audit_finds_it_and_who_has_it(commands: dict[str, Any]) -> None:
    said = commands
    (found,) = said["audit open"]["said"]["devices"]
    assert (said["audit open"]["status"], found["isolation"]) == (1, "unsafe")
    assert [holder["path"] for holder in found["holders"]] == ["/dev/uio0"]
    assert said["unbind open"]["status"] == 2
    assert "/dev/uio0 is held open by process" in said["unbind open"]["complained"]
    assert said["refused"]["status"] == 2
    assert "vfio-pci drives PCI devices" in said["refused"]["complained"]
    assert said["audit before"]["said"]["devices"] == said["audit after"]["said"]["devices"] == []


def test_a_kernel_without_override_is_served_by_class(hyperv: HyperVGuest) -> None:
    assert hyperv.run(COMMANDS, "by_class", timeout=PATIENCE) == {
        "before": "hv_balloon",
        "bound": "uio_hv_generic",
        "back": "hv_balloon",
        "driver knows the class": False,
    }


def test_another_user_sees_what_is_readable_and_changes_nothing(hyperv: HyperVGuest) -> None:
    said = hyperv.run(COMMANDS, "unprivileged", timeout=PATIENCE)
    assert said["list"]["status"] == 0
    assert [row["problems"] for row in said["list"]["said"]] == [{}] * len(said["list"]["said"])
    assert (said["bind"]["status"], said["driver"]) == (2, "hv_balloon")
    assert "run as root" in said["bind"]["complained"]
    assert said["audit"]["said"]["unseen"]
    assert "needs CAP_SYS_RAWIO" in said["refused"]


def test_the_door_to_unsafe_ways(hyperv: HyperVGuest) -> None:
    """Last, as the taint stays."""
    said = hyperv.run(COMMANDS, "policy", timeout=PATIENCE)
    assert "only with --enable-unsafe-noiommu-mode" in said["refused"]
    before, between, after = said["taint"]
    assert (between, after) == (before, before | 64)
    assert said["use"] == [True, True]
    assert said["uses"] == ["the balloon"]
    assert any("the balloon opened by user" in line for line in said["log"])
    taint = said["audit"]["said"]["taint"]
    assert (said["audit"]["status"], taint["user"]) == (1, True)
    assert "the balloon opened by user" in taint["said"]
    assert any(row["class"] == "unsafe use" for row in said["list"]["said"])
