"""The rig itself: payloads return, fail, die and are stopped, and the guest goes on."""

from __future__ import annotations

import pytest

from .conftest import PAYLOADS
from .process import RigError
from .run import EDU_ADDRESS, Guest

LOOKS = PAYLOADS / "looks.py"


def test_a_payload_reports_and_returns(guest: Guest) -> None:
    payload = guest.start(LOOKS)
    assert payload.report().startswith("6.12.")
    result = payload.result()
    assert result["devices"][EDU_ADDRESS] == "0x1234"
    assert EDU_ADDRESS in result["groups"]
    assert result["container"]
    assert guest.compiled_at_start == 0


def test_a_payload_that_fails_is_told_with_its_traceback(guest: Guest) -> None:
    with pytest.raises(RigError, match="ValueError: as it should"):
        guest.run(LOOKS, "fails")


def test_a_payload_that_dies_is_told_and_the_next_one_runs(guest: Guest) -> None:
    with pytest.raises(RigError, match="ended with -6"):
        guest.run(LOOKS, "dies")
    assert guest.run(LOOKS)["container"]


def test_a_payload_is_stopped_or_killed_when_its_time_is_up(guest: Guest) -> None:
    stopped = guest.start(LOOKS, "sleeps")
    assert stopped.report() == "asleep"
    stopped.stop()
    with pytest.raises(RigError, match="SystemExit"):
        stopped.result()
    late = guest.start(LOOKS, "sleeps", timeout=0.1)
    with pytest.raises(RigError, match="time-out"):
        late.result()
