"""KernelDevice against the VFIO of a real kernel, with QEMU's edu, an NVMe controller and a network card behind a virtual IOMMU."""

from __future__ import annotations

from typing import Any

import pytest

from vfio_vmbus.testing.conformance import DeviceConformance

from .conftest import PAYLOADS
from .run import BRIDGED_ADDRESSES as BRIDGED
from .run import EDU_ADDRESS, NVME_ADDRESS, NVME_SERIAL, NVME_VECTORS, Guest

EDU = PAYLOADS / "kernel_edu.py"
NVME = PAYLOADS / "kernel_nvme.py"
CONFORMANCE = [name for name in dir(DeviceConformance) if name.startswith("test_")]


def test_the_example_drives_edu(guest: Guest) -> None:
    lines = guest.run(EDU, "example", address=EDU_ADDRESS)
    assert lines[0].startswith("edu 1.0 at 0000:00:05.0, isolated by: IOMMU group ")
    assert lines[2] == "10! = 3628800, and an interrupt came when it was there"
    assert "DMA both ways" in lines[4]
    assert "not mapped any more, was refused" in lines[5]
    assert lines[6] == "so was a DMA read: the device did not see it"


@pytest.fixture(scope="module")
def suite(guest: Guest) -> dict[str, str]:
    found: dict[str, str] = guest.run(EDU, "conformance", timeout=300, address=EDU_ADDRESS)
    return found


@pytest.mark.parametrize("name", CONFORMANCE)
def test_conformance(suite: dict[str, str], name: str) -> None:
    assert suite[name] == ""


def test_a_doorbell_is_written_by_the_kernel(guest: Guest) -> None:
    found = guest.run(EDU, "doorbell", address=EDU_ADDRESS)
    assert found == {"causes": 0, "refused": "no doorbell register at 0x4 of region 7: take a 32-bit one of a BAR"}


def test_a_line_is_masked_when_it_falls(guest: Guest) -> None:
    found = guest.run(EDU, "level", address=EDU_ADDRESS)
    assert found.pop("two kinds").startswith("vectors of INTx are enabled")
    assert found == {
        "flags": 7,
        "came": True,
        "again while masked": False,
        "came again": True,
        "after it was acknowledged": False,
        "masked by hand": False,
        "unmasked by hand": True,
    }


def test_registers_are_mapped_and_bus_master_is_obeyed(guest: Guest) -> None:
    found = guest.run(EDU, "mapped", address=EDU_ADDRESS)
    assert found["areas"] == [[0, 1 << 20]]
    assert found["ids"] == "3412e811"
    assert found["command"] & 6 == 6  # memory and bus master
    assert found["inverted"] == found["read"] == 0xF0F0F0F0
    assert found["wide"] == 0x12345678
    assert found["without bus master"] == "as it was"
    assert found["with bus master"] != "as it was"
    assert "decoding of memory or I/O is off" in found["off"]


def test_what_the_kernel_refuses_is_explained(guest: Guest) -> None:
    found = guest.run(EDU, "refusals", address=EDU_ADDRESS)
    expected = {
        "not bound": "UnavailableError: 0000:00:05.0 has driver none: bind it (vfio-vmbus bind 0000:00:05.0)",
        "not there": "UnavailableError: no PCI device 0000:7f:00.0: there are ",
        "unbind": "UsageError: 0000:00:05.0 was not bound here",
        "no driver": "UnavailableError: the kernel has no PCI driver no_such_driver loaded: modprobe no_such_driver",
        "another driver": "UnavailableError: ",
        "twice": "UnavailableError: IOMMU group ",
        "unbind in use": "UnavailableError: 0000:00:05.0 is in use",
        "bind in use": "UnavailableError: 0000:00:05.0 is in use",
        "no cdev": "UnavailableError: iommufd, /dev/iommu: No such file or directory; this kernel has none",
        "reset": "UnavailableError: 0000:00:05.0 has no reset of its own",
        "reserved": "DmaError: [0xfee00000, 0xfee01000) is outside of what the IOMMU translates: [0x0, 0x",
        "beyond": "DmaError: [0x1000000000000000, 0x1000000000001000) is outside of what the IOMMU translates",
        "hot reset": "UnavailableError: 0000:00:05.0 has no hot reset",
        "locked memory": "DmaError: VFIO_IOMMU_MAP_DMA for 1048576 bytes at IOVA 0x100000000: Cannot allocate memory (ENOMEM); "
        "memory for devices is locked, and RLIMIT_MEMLOCK is 65536 bytes: raise it",
        "no device yet": "UsageError: no device is in this container yet",
    }
    for what, text in expected.items():
        assert found[what].startswith(text), what
    assert "another process, or another KernelDevice of this one, has it" in found["twice"]
    assert found["driver then"] == "None"
    assert found["resettable"] == "False"
    before, after = map(int, found["available"].split())
    assert after == before - 1


def test_devices_of_one_group_share_an_address_space_and_are_reset_together(guest: Guest) -> None:
    found = guest.run(EDU, "groups", first=BRIDGED[0], second=BRIDGED[1], other=BRIDGED[2])
    assert set(found["members"]) > set(BRIDGED)
    assert found["kernel's"] == "virtio-pci"
    assert found["not viable"].startswith("not viable: IOMMU group ")
    assert f"{BRIDGED[2]} (virtio-pci)" in found["not viable"]
    assert found["dependent"] == [[address, True] for address in BRIDGED]
    assert found["shared"] == "both reach it"
    assert (found["before it"], found["after it"]) == (1, 0)
    assert found["closed"] == f"{BRIDGED[0]} is closed"


def test_opening_that_fails_half_way_leaves_nothing(guest: Guest) -> None:
    found = guest.run(EDU, "half_open", timeout=120, address=EDU_ADDRESS)
    assert found["ioctls"] > 20
    assert found["failed"] > 15  # all that are no questions about things that may not be there


def test_the_kernel_asks_for_the_device(guest: Guest) -> None:
    found = guest.run(EDU, "wanted_back", timeout=180, address=EDU_ADDRESS)
    assert found == {"asked": True, "waits": True, "unbound": True, "restored": True}


def test_nothing_is_left_of_many_openings(guest: Guest) -> None:
    guest.run(EDU, "cycles", timeout=300, address=EDU_ADDRESS, count=30)


def test_nvme_interrupts_on_the_last_of_many_vectors_and_goes_back_to_its_driver(guest: Guest) -> None:
    found: dict[str, Any] = guest.run(NVME, timeout=120, address=NVME_ADDRESS)
    areas = found.pop("areas")
    assert areas[0][0] == 0
    assert areas[0][1] > 0
    assert found.pop("flags") & 1
    assert found == {
        "before": "nvme",
        "bound": "vfio-pci",
        "restored": True,
        "vectors": NVME_VECTORS,
        "enabled": [0, (NVME_VECTORS - 1) // 2, NVME_VECTORS - 1],
        "statuses": [0],
        "serial": NVME_SERIAL,
        "looped": True,
        "configuration after reset": 0,
        "kept": True,
        "resettable": True,
    }
