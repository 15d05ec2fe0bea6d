"""A real VMBus device, in a guest that finds itself on Hyper-V: seen, taken from the kernel's driver, driven, and given back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from vfio_vmbus.wire.guids import CLASS_BALLOON

from .conftest import PAYLOADS
from .nested import HyperVGuest
from .process import RigError

HYPERV = PAYLOADS / "hyperv.py"
SLOW = 600.0
"""Seconds that a payload may take: two emulated machines, one in the other, on a loaded one."""


@pytest.fixture(scope="module")
def bound(hyperv: HyperVGuest) -> Iterator[HyperVGuest]:
    """The balloon is uio_hv_generic's, and the kernel's own driver's again at the end."""
    assert ask(hyperv, "rebind", old="hv_balloon", new="uio_hv_generic") == "uio_hv_generic"
    yield hyperv
    assert ask(hyperv, "rebind", old="uio_hv_generic", new="hv_balloon") == "hv_balloon"
    said = ask(hyperv, "kernel_log")
    assert said.count("hv_balloon: Using Dynamic Memory protocol version 2.0") == 2
    for bad in ("WARNING:", "BUG:", "Oops", "general protection"):
        assert bad not in said


def ask(guest: HyperVGuest, function: str, **arguments: Any) -> Any:
    return guest.run(HYPERV, function, SLOW, **arguments)


def balloon(guest: HyperVGuest) -> dict[str, Any]:
    (found,) = [device for device in ask(guest, "look")["devices"] if device["class_guid"] == str(CLASS_BALLOON)]
    return found


def test_the_device_is_seen_as_the_kernels(hyperv: HyperVGuest) -> None:
    found = balloon(hyperv)
    assert (found["kind"], found["driver"], found["isolation"], found["state"]) == ("balloon", "hv_balloon", "kernel", "opened")
    assert found["monitor"] is None
    assert found["problems"] == {}
    assert found["ring_out"] == found["ring_in"] > 0


def test_uio_hv_generic_takes_it(bound: HyperVGuest) -> None:
    found = balloon(bound)
    assert (found["driver"], found["isolation"], found["uio"]) == ("uio_hv_generic", "unsafe", ["uio0"])
    node = ask(bound, "describe")
    assert (node["name"], node["ring"], node["monitor"]) == ("uio0", True, None)
    assert {"txrx_rings", "int_page", "monitor_page"} <= set(node["maps"])


def test_every_way_in_that_is_closed(bound: HyperVGuest) -> None:
    without, missing, wrong, second, again = ask(bound, "refused")
    assert without.startswith("UnsafeError: uio_hv_generic of balloon")
    assert "--enable-unsafe-noiommu-mode" in without
    assert missing.startswith("UnavailableError: no VMBus device uio7")
    assert wrong.startswith("UsageError: '../uio0' is no device")
    assert second.startswith("UnavailableError: /dev/uio0 is in use by another process")
    assert again.startswith("UsageError: vmbus:")
    assert ask(bound, "look")["taint"] & 64


def test_the_host_answers_each_time_the_channel_is_opened(bound: HyperVGuest) -> None:
    for found in ask(bound, "shake_hands", times=3):
        assert (found["version"], found["isolation"]) == ("2.0", "")
        assert found["signals"] > 0


def test_rings_are_found_without_their_file_too(bound: HyperVGuest) -> None:
    """R9: the kernel makes the file late, or never."""
    with_file, without = (ask(bound, "shake_hands", without_ring_file=each)[0] for each in (False, True))
    assert with_file["ring"] == without["ring"]
    assert without["version"] == "2.0"


def test_shared_buffers_and_memory_whose_frames_are_known(bound: HyperVGuest) -> None:
    found = ask(bound, "buffers")
    for name, size in (("receive", 31 << 20), ("send", 16 << 20)):
        handle, has = found[name]
        assert has == size
        assert handle > 0
    assert found["huge"] == [0, 512, 511, True]
    assert found["small"] == [3, True, True]
    assert found["stay"]


def test_a_driver_that_is_killed_is_started_again(bound: HyperVGuest) -> None:
    assert ask(bound, "die", limit=1000) == -9
    assert ask(bound, "shake_hands")[0]["version"] == "2.0"


def test_the_console_shows_the_handshake(bound: HyperVGuest) -> None:
    sent, answered = ask(bound, "console")
    assert (sent["sender"], sent["message"]) == ("guest", "VersionRequest")
    assert (answered["sender"], answered["message"], answered["fields"]["flags"]["is_accepted"]) == ("host", "VersionResponse", 1)


def test_the_host_asks_for_memory_and_gives_it_back(bound: HyperVGuest) -> None:
    """QEMU holds requests back for 50 seconds after the capabilities."""
    driver = bound.start(HYPERV, "drive", 2 * SLOW, limit=20000, seconds=2 * SLOW)
    first = driver.report(SLOW)
    assert (first["version"], first["pages"], first["reports_wanted"]) == ("2.0", 0, True)
    whole = actual(bound)
    target = whole - (40 << 20)
    bound.inner.command("balloon", value=target)
    given = driver.report(SLOW)
    assert given["pages"] == (40 << 20) // 4096
    assert given["requests"] >= 1
    wait(lambda: actual(bound) == target)
    bound.inner.command("balloon", value=whole)
    while (returned := driver.report(SLOW))["pages"]:
        assert returned["pages"] < given["pages"]
    wait(lambda: actual(bound) == whole)
    report = bound.inner.command("query-hv-balloon-status-report")
    assert 0 < report["available"] < whole
    assert report["committed"] > 0
    driver.stop()
    last = driver.result(SLOW)
    assert (last["pages"], last["given"], last["returned"]) == (0, given["pages"], given["pages"])
    assert last["woken"] >= 2
    assert last["reports"] >= 2


def actual(guest: HyperVGuest) -> int:
    """What QEMU says that the guest has, in bytes."""
    return guest.inner.command("query-balloon")["actual"]


def wait(condition: Any) -> None:
    end = time.monotonic() + SLOW
    while not condition():
        if time.monotonic() > end:
            raise RigError("the balloon did not become as it should")
        time.sleep(0.2)
