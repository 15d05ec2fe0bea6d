"""Our card in a guest without an IOMMU: netvsc tells its host physical addresses of the guest, which reach all of its memory."""

from __future__ import annotations

import json

import pytest

from vfio_vmbus.apps.lab import Namespace

from .bare import BareGuest
from .conftest import PAYLOADS
from .packages import Tools
from .run import USER_ADDRESS

COMMAND = PAYLOADS / "command.py"
UNSAFE = "--enable-unsafe-noiommu-mode"
SIZE = 16 << 10
WAYS = {"vfio-pci": "vfio", "igb_uio": "uio-pci"}


@pytest.mark.parametrize("driver", WAYS)
def test_ping_and_a_download_by_physical_addresses(
    unlocked: BareGuest, beyond: Namespace | str, programs: Tools, driver: str
) -> None:
    if isinstance(beyond, str):
        pytest.skip(f"no network namespaces: {beyond}")
    switched = [UNSAFE] if driver == "vfio-pci" else []
    unlocked.run(PAYLOADS / "noiommu_edu.py", "switch", on=True)
    assert unlocked.run(COMMAND, "run", words=["bind", USER_ADDRESS, "--driver", driver, *switched])["status"] == 0
    name = f"{WAYS[driver]}:{USER_ADDRESS}"
    assert unlocked.run(COMMAND, "run", words=["net", "tap", "no0", "--device", name])["status"] == 2
    tap = unlocked.start(COMMAND, "run", 600, words=["net", "tap", "vm0", "--device", name, "--json", UNSAFE])
    address = {"interface": "vm0", "address": "10.78.0.2/24", "size": SIZE}
    website = unlocked.start(PAYLOADS / "website.py", timeout=600, busybox=str(programs.busybox), **address)
    digest = website.report(300)
    ping = beyond.ping("10.78.0.2", 5, 0.2, 30.0)
    got = beyond.http_get("http://10.78.0.2:8080/file", timeout=120)
    tap.stop()
    ended = tap.result()
    website.stop()
    assert ping.received == ping.sent == 5
    assert (got.bytes, got.sha256) == (SIZE, digest)
    assert ended["status"] == 0
    assert json.loads(ended["printed"])["counters"]["rx_frames"] > 0
    assert unlocked.run(COMMAND, "run", words=["unbind", USER_ADDRESS])["status"] == 0
    unlocked.run(PAYLOADS / "noiommu_edu.py", "switch", on=False)
