"""Python in a guest, our netvsc, the kernel's vfio-pci behind a virtual IOMMU, QEMU's vfio-user-pci, our server, host, switch, TAP."""

from __future__ import annotations

import json

import pytest

from vfio_vmbus.apps.lab import Namespace

from .conftest import PAYLOADS
from .packages import Tools
from .run import EDU_ADDRESS, USER_ADDRESS, USER_EDU_ADDRESS, Guest
from .server import Server
from .server_program import MAC

COMMAND = PAYLOADS / "command.py"

SIZE = 2 << 20
ATTACKS = ("pages/unmapped", "pages/over-end", "pages/half")
"""Not pages/direction: QEMU maps what its guest's IOMMU lets a device write for reading, too."""


def test_ping_and_a_download_go_through_all_of_it(
    guest: Guest, guest_server: Server, outside: Namespace | str, programs: Tools
) -> None:
    if isinstance(outside, str):
        pytest.skip(f"no network namespaces: {outside}")
    assert guest.run(COMMAND, "run", words=["bind", USER_ADDRESS])["status"] == 0
    tap = guest.start(COMMAND, "run", 600, words=["net", "tap", "vm0", "--device", f"vfio:{USER_ADDRESS}", "--json"])
    website = guest.start(
        PAYLOADS / "website.py", timeout=600, busybox=str(programs.busybox), interface="vm0", address="10.77.0.2/24", size=SIZE
    )
    digest = website.report(300)
    ping = outside.ping("10.77.0.2", 20, 0.05, 5.0)
    got = outside.http_get("http://10.77.0.2:8080/file", timeout=120)
    status = guest_server.status()
    tap.stop()
    ended = tap.result()
    website.stop()
    print(f"median echo {ping.rtt_ms_median} ms, {SIZE >> 20} MiB in {got.seconds:.2f} s, {len(status['maps'])} maps")
    assert ping.received == ping.sent == 20
    assert (got.bytes, got.sha256) == (SIZE, digest)
    assert status["fault_count"] == 0
    assert len(status["maps"]) > 1000  # the virtual IOMMU's, page by page
    assert ended["status"] == 0
    told = json.loads(ended["printed"])
    assert told["nic"]["mac"] == MAC.hex(":")
    assert told["from_tap"] == told["counters"]["tx_frames"] >= SIZE // 1500
    assert told["to_tap"] == told["counters"]["rx_frames"] > 0
    assert tap.compiled == 0
    assert guest.run(COMMAND, "run", words=["unbind", USER_ADDRESS])["status"] == 0


def test_a_driver_that_turns_on_the_host_reaches_nothing(guest: Guest, guest_server: Server) -> None:
    """What its packets name is not mapped by the virtual IOMMU, so QEMU never told us of it: our own domain refuses it, and counts."""
    before = guest_server.status()
    found = guest.run(PAYLOADS / "card.py", "trespasses", 300, address=USER_ADDRESS, attacks=list(ATTACKS))
    for name in ATTACKS:
        outcome = found[name]
        assert outcome["tried"] > 0, name
        assert outcome["succeeded"] == 0, name
        assert outcome["failed"] == outcome["tried"], name
    assert found["gpadl"].startswith("RefusedError")
    after = guest_server.status()
    assert after["client"]
    assert after["fault_count"] - before["fault_count"] >= sum(found[name]["tried"] for name in ATTACKS)
    assert {"not mapped"} <= {fault["reason"] for fault in after["faults"]}
    mapped = range(found["gpadl_iova"], found["gpadl_iova"] + 1)
    assert not any(iova < mapped.stop and mapped.start < iova + size for iova, size, *_ in after["maps"])


def test_a_devices_dma_outside_of_the_maps_is_refused_by_the_virtual_iommu(guest: Guest) -> None:
    """QEMU's own edu has no other guard."""
    guest.run(PAYLOADS / "kernel_edu.py", "example", address=EDU_ADDRESS)
    faults = [line for line in guest.run(PAYLOADS / "log.py", "lines", word="DMAR:") if "fault addr" in line]
    assert any("[00:05.0]" in line and "Write" in line for line in faults), faults
    assert any("[00:05.0]" in line and "Read" in line for line in faults), faults


def test_an_edu_of_ours_is_driven_as_qemus_is(guest: Guest, guest_server: Server) -> None:
    lines = guest.run(PAYLOADS / "kernel_edu.py", "example", address=USER_EDU_ADDRESS)
    assert "DMA both ways" in lines[4]
    assert "not mapped any more, was refused" in lines[5]
    assert lines[6].startswith("so was a DMA read")
    assert guest_server.status()["edu_faults"] == 2


def test_a_device_of_ours_conforms_through_the_kernel(guest: Guest) -> None:
    """The suite that every way to a device passes, over vfio-pci, the virtual IOMMU, QEMU and our server."""
    found = guest.run(PAYLOADS / "kernel_edu.py", "conformance", 300, address=USER_EDU_ADDRESS)
    assert len(found) > 10
    assert {name: said for name, said in found.items() if said} == {}
