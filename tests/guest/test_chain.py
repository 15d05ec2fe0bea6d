"""Python in a guest, our netvsc, the kernel's vfio-pci behind a virtual IOMMU, QEMU's vfio-user-pci, our server, host, switch, TAP."""

from __future__ import annotations

import pytest

from vfio_vmbus.apps.lab import Namespace

from .conftest import PAYLOADS
from .run import USER_ADDRESS, Guest
from .server import Server

SIZE = 2 << 20


def test_ping_and_a_download_go_through_all_of_it(guest: Guest, guest_server: Server, outside: Namespace | None) -> None:
    if outside is None:
        pytest.skip("this machine allows no network namespaces")
    payload = guest.start(PAYLOADS / "card.py", "bridged", 240, address=USER_ADDRESS, inside="10.77.0.2/24", size=SIZE)
    card = payload.report(120)
    print(card)
    served = payload.report(60)
    print(served)
    ping = outside.ping("10.77.0.2", 20, 0.05, 5.0)
    print(ping)
    got = outside.http_get(served["url"], timeout=120)
    print(got)
    status = guest_server.status()
    print({key: value for key, value in status.items() if key != "maps"}, len(status["maps"]))
    payload.stop()
    print(payload.result())
    print(guest.console(10))
    assert ping.received == ping.sent == 20
    assert (got.bytes, got.sha256) == (SIZE, served["sha256"])
    assert status["fault_count"] == 0
    assert payload.compiled == 0
