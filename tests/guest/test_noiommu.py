"""KernelDevice without an IOMMU against a real kernel's VFIO, built with that mode, and QEMU's edu."""

from __future__ import annotations

from typing import Any

import pytest

from vfio_vmbus.testing.conformance import DeviceConformance
from vfio_vmbus.wire.vfio import IRQ_MSI

from .bare import ADDRESS, BareGuest
from .conftest import PAYLOADS

EDU = PAYLOADS / "noiommu_edu.py"
MAPPING = {
    "test_memory_is_mapped_and_taken_back",
    "test_many_maps_come_and_go",
    "test_maps_do_not_overlap",
    "test_an_unmap_does_not_split_a_map",
    "test_what_is_no_sealed_memory_is_refused",
    "test_closing_twice_does_no_harm_and_the_device_can_be_opened_again",
}
"""They map any memory anywhere, which takes an IOMMU."""
CONFORMANCE = [name for name in dir(DeviceConformance) if name.startswith("test_") and name not in MAPPING]
MAPS = {
    "twice": "DmaError: [FIRST, ",
    "another's frame": "DmaError: nothing translates for this device: byte 0 of this memory is at FIRST, not at SECOND",
    "elsewhere": "DmaError: nothing translates for this device: byte 0 of this memory is at FIRST, not at 0x100000000",
    "half of it": "DmaError: 2048 bytes at IOVA FIRST: take whole pages",
}
"""What is said of memory that is mapped where it is not, by the name of the question."""


def test_nobody_gets_it_who_does_not_ask_for_it(unlocked: BareGuest) -> None:
    """Neither of both switches is enough, nor are both without CAP_SYS_RAWIO. The taint goes up when the device is bound: the kernel
    does that."""
    found = unlocked.run(EDU, "refusals", timeout=120, address=ADDRESS)
    expected = {
        "bind, kernel's switch off": f"UnsafeError: {ADDRESS} has no IOMMU, and the kernel does not allow it without: ",
        "bind without ours": f"UnavailableError: {ADDRESS} is in no IOMMU group: turn the IOMMU on",
        "as isolated": f"UnavailableError: {ADDRESS} ",
        "without ours": f"UnsafeError: VFIO without an IOMMU of {ADDRESS} is unsafe, as nothing keeps the device within this "
        "process's memory: only with --enable-unsafe-noiommu-mode",
        "without CAP_SYS_RAWIO": f"UnsafeError: VFIO without an IOMMU of {ADDRESS} is unsafe and needs CAP_SYS_RAWIO",
        "nor by the kernel": "UnavailableError: IOMMU group ",
        "switched off since": "UnavailableError: the kernel does not allow VFIO without an IOMMU: modprobe vfio",
    }
    for what, text in expected.items():
        assert found[what].startswith(text), what
    assert "a group without an IOMMU is for CAP_SYS_RAWIO only" in found["nor by the kernel"]
    assert (found["tainted"], found["kernel's switch"], found["driver"]) == (False, "N", None)
    assert found["nodes"] == ["noiommu-0", "vfio"]
    tainted, lines = found["bound"]
    assert (found["no traces"], tainted, found["no more traces"]) == (True, True, True)
    assert any("Adding kernel taint for vfio-noiommu group" in line for line in lines)


def test_it_reaches_all_memory_and_leaves_traces(unlocked: BareGuest) -> None:
    found = unlocked.run(EDU, "unsafe", timeout=120, address=ADDRESS)
    assert found.pop("elsewhere").startswith("DmaError: nothing translates for this device: byte 0 of this memory is at 0x")
    assert found.pop("twice").startswith("UnavailableError: IOMMU group ")
    assert found.pop("unbind in use").startswith(f"UnavailableError: {ADDRESS} is in use")
    log = " | ".join(found.pop("log"))
    assert f"vfio-vmbus: VFIO without an IOMMU of {ADDRESS} opened by user " in log
    assert "vfio-noiommu device opened by user" in log
    assert found == {
        "isolation": "",
        "interrupt": IRQ_MSI,
        "factorial": 3628800,
        "dma": "all of memory",
        "tainted": True,
        "marks": [f"VFIO without an IOMMU of {ADDRESS}"] * 2,  # asked for again while it was in use
        "driver": None,
    }


def test_only_memory_that_is_there_is_mapped(unlocked: BareGuest) -> None:
    found = unlocked.run(EDU, "maps", timeout=120, address=ADDRESS)
    assert {name: found[name].startswith(text) for name, text in MAPS.items()} == dict.fromkeys(MAPS, True), found


@pytest.fixture(scope="module")
def suite() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("name", CONFORMANCE)
def test_conformance(unlocked: BareGuest, suite: dict[str, Any], name: str) -> None:
    if not suite:
        suite.update(unlocked.run(EDU, "conformance", timeout=300, address=ADDRESS, names=CONFORMANCE))
    assert suite[name] == ""
