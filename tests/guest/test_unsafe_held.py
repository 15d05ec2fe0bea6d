"""Unsafe devices in use: `audit` and `list` tell who has them, a second process is refused, and nothing is left of one that is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .bare import ADDRESS, BareGuest
from .conftest import PAYLOADS
from .process import RigError
from .run import USER_ADDRESS

HELD = PAYLOADS / "held_edu.py"
COMMAND = PAYLOADS / "command.py"
UNSAFE = "--enable-unsafe-noiommu-mode"
NODES = {"vfio-pci": "/dev/vfio/noiommu-", "uio_pci_generic": "/dev/uio", "igb_uio": "/dev/uio"}
WHATS = {driver: f"{driver} of " for driver in NODES} | {"vfio-pci": "VFIO without an IOMMU of "}


@pytest.fixture(params=NODES)
def driver(request: pytest.FixtureRequest, bare: BareGuest) -> Iterator[str]:
    if request.param == "uio_pci_generic":
        yield request.param
        return
    request.getfixturevalue("unlocked")
    bare.run(PAYLOADS / "noiommu_edu.py", "switch", on=True)
    yield request.param
    bare.run(PAYLOADS / "noiommu_edu.py", "switch", on=False)


def command(guest: BareGuest, *words: str) -> Any:
    """What a command prints. Its exit status is 0, or as `audit` has it."""
    done = guest.run(COMMAND, "run", words=list(words))
    assert done["status"] == (1 if words[0] == "audit" else 0), done
    return json.loads(done["printed"]) if "--json" in words else done["printed"]


def bind(guest: BareGuest, address: str, driver: str) -> dict[str, Any]:
    """It is warned of."""
    switch = [UNSAFE] if driver == "vfio-pci" else []
    done = guest.run(COMMAND, "run", words=["bind", address, "--driver", driver, "--json", *switch])
    bound = json.loads(done["printed"])
    assert (done["status"], bound["driver"]) == (0, driver)
    assert bound["isolation"] == ("no-DMA" if driver == "uio_pci_generic" else "unsafe")
    assert f"WARNING: {address} is {bound['isolation']} with {driver}: {bound['why']}" in done["complained"]
    return bound


def test_ways_that_lead_nowhere_are_one_line(bare: BareGuest) -> None:
    """A card that nobody has, or a driver without the interrupts that it needs."""
    for words, says in (
        (["net", "tap", "no0", "--device", f"uio-pci:{USER_ADDRESS}"], "nobody drives it: vfio-vmbus bind"),
        (["net", "tap", "no0", "--device", f"vfio:{USER_ADDRESS}", UNSAFE], "has no IOMMU and no group without one"),
    ):
        done = bare.run(COMMAND, "run", words=words)
        assert (done["status"], done["printed"]) == (2, "")
        assert says in done["complained"].splitlines()[-1]
    bind(bare, USER_ADDRESS, "uio_pci_generic")
    done = bare.run(COMMAND, "run", words=["net", "tap", "no0", "--device", f"uio-pci:{USER_ADDRESS}", UNSAFE])
    assert done["status"] == 2
    assert "has no MSI-X here, which a VMBus function interrupts by" in done["complained"].splitlines()[-1]
    assert command(bare, "unbind", USER_ADDRESS, "--json")["driver"] is None


def device(found: dict[str, Any], address: str) -> dict[str, Any]:
    (one,) = [one for one in found["devices"] if one["device"] == f"pci:{address}"]
    return one


def test_who_holds_it_is_told_and_a_kill_leaves_nothing(bare: BareGuest, driver: str) -> None:
    bound = bind(bare, ADDRESS, driver)
    holder = bare.start(HELD, "hold", 300, address=ADDRESS, driver=driver)
    pid = holder.report()

    held = command(bare, "audit", "--json")
    one = device(held, ADDRESS)
    assert (one["driver"], one["isolation"]) == (driver, "unsafe")
    assert "it can reach all memory" in one["why"]
    assert [(each["pid"], each["user"]) for each in one["holders"]] == [(pid, "root")]
    assert one["holders"][0]["path"].startswith(NODES[driver])
    assert ADDRESS in one["advice"] or "turn an IOMMU on" in one["advice"]
    assert [(use["pid"], use["what"]) for use in held["unsafe_uses"]] == [(pid, WHATS[driver] + ADDRESS)]
    assert (held["taint"]["user"], held["taint"]["since"] > 0) == (True, True)
    assert any(ADDRESS in text and "it can reach all memory" in text for text in held["unsafe"])
    assert any(f"process {pid} " in text for text in held["unsafe"])
    listed = command(bare, "list", "--json")
    assert [row["isolation"] for row in listed if row["device"] == f"pci:{ADDRESS}"] == ["unsafe"]
    assert [row["class"] for row in listed if row["device"] == f"process:{pid}"] == ["unsafe use"]

    refused = bare.run(HELD, "attempt", address=ADDRESS, driver=driver)
    assert refused.startswith("UnavailableError: ")
    assert "another process" in refused
    for words in (
        ["unbind", ADDRESS],
        ["bind", ADDRESS, "--driver", "uio_pci_generic" if driver == "vfio-pci" else "vfio-pci", UNSAFE],
    ):
        assert bare.run(COMMAND, "run", words=words)["status"] == 2
    assert [each["pid"] for each in device(command(bare, "audit", "--json"), ADDRESS)["holders"]] == [pid]

    bare.run(HELD, "end", pid=pid)
    with pytest.raises(RigError, match="ended with -9"):
        holder.result()
    after = command(bare, "audit", "--json")
    assert (device(after, ADDRESS)["holders"], after["unsafe_uses"]) == ([], [])
    assert after["taint"]["user"]
    assert bare.run(HELD, "works", address=ADDRESS, driver=driver) == {"factorial": 3628800, "driver": driver}
    back = command(bare, "unbind", ADDRESS, "--json")
    assert (back["driver"], back["isolation"]) == (bound["before"], None) == (None, None)
    assert command(bare, "audit", "--json")["devices"] == []


def test_an_unplugged_device_is_gone_and_forgotten(bare: BareGuest, driver: str) -> None:
    """Neither the process that has it nor the kernel waits for the other without an end."""
    bare.plug()
    address = bare.run(HELD, "found", timeout=150, known=ADDRESS)
    bind(bare, address, driver)
    user = bare.start(HELD, "unplugged", 300, address=address, driver=driver)
    assert user.report() == "open"
    bare.unplug()
    seen = user.result(300)
    assert seen.pop("then").startswith(f"UnavailableError: no PCI device {address}: ")
    if driver == "vfio-pci":
        assert seen == {"asked": True, "still there": 0xED}
    else:
        assert "the device is gone" in seen["gone"] or "is gone: it was unplugged" in seen["gone"]
        assert (f"{address} is gone: it was unplugged" in seen["registers"], seen["mapped"]) == (True, "00000000")
    assert command(bare, "audit", "--json")["devices"] == []
    assert bare.run(COMMAND, "run", words=["unbind", address])["status"] == 2
