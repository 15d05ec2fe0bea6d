"""UioPciDevice against a real kernel's uio_pci_generic and igb_uio, with QEMU's edu and no IOMMU."""

from __future__ import annotations

from typing import Any

import pytest

from vfio_vmbus.wire.vfio import IRQ_INTX, IRQ_MSI

from .bare import ADDRESS, BareGuest
from .conftest import PAYLOADS
from .test_noiommu import CONFORMANCE, MAPS

EDU = PAYLOADS / "uio_edu.py"
GENERIC, IGB = "uio_pci_generic", "igb_uio"
INTERRUPTS = {GENERIC: [IRQ_INTX, 7], IGB: [IRQ_MSI, 9]}
"""Kind and flags."""


def test_registers_and_the_line_work_and_dma_is_refused(bare: BareGuest) -> None:
    found = bare.run(EDU, "registers", timeout=120, address=ADDRESS)
    assert found.pop("twice").startswith(f"UnavailableError: {ADDRESS} is in use: another process")
    assert found.pop("dma") == (
        f"UnavailableError: {ADDRESS} has no IOMMU in use and may not reach memory: DMA only with --enable-unsafe-noiommu-mode, "
        "or bind it to vfio-pci"
    )
    for way in ("master", "wide"):
        assert found.pop(way).startswith(f"UnavailableError: {ADDRESS} must not master the bus")
    assert found == {
        "isolation": "no-DMA",
        "ids": "3412e811",
        "areas": [[0, 1 << 20]],
        "alive": True,
        "factorial": 3628800,
        "command": 0,
        "64 bits": 0x12345678,
        "same bell": True,
        "no traces": True,
    }


def test_the_device_reaches_no_memory(bare: BareGuest) -> None:
    assert bare.run(EDU, "confined", timeout=120, address=ADDRESS) == "as it was"


def test_the_line_is_masked_when_it_falls(bare: BareGuest) -> None:
    assert bare.run(EDU, "level", timeout=120, address=ADDRESS) == {
        "flags": 7,
        "before": True,
        "came": True,
        "masked by the kernel": True,
        "came again": True,
        "masked by hand": False,
        "unmasked by hand": True,
        "disabled": True,
    }


def test_what_is_refused_is_explained(bare: BareGuest) -> None:
    found = bare.run(EDU, "refusals", address=ADDRESS)
    assert found.pop("not there").startswith("UnavailableError: no PCI device 0000:7f:00.0: there are ")
    assert found == {
        "not bound": f"UnavailableError: {ADDRESS}: nobody drives it: vfio-vmbus bind {ADDRESS} --driver uio_pci_generic first",
        "no group": f"UnavailableError: {ADDRESS} has no IOMMU and no group without one: modprobe vfio enable_unsafe_noiommu_mode=1 "
        f"(on a kernel with CONFIG_VFIO_NOIOMMU), then bind it (vfio-vmbus bind {ADDRESS} --enable-unsafe-noiommu-mode)",
    }


def test_igb_uio_is_refused_without_the_switch(unlocked: BareGuest) -> None:
    found = unlocked.run(EDU, "refused_without_switch", timeout=120, address=ADDRESS)
    assert found.pop("said").startswith(f"UnsafeError: igb_uio of {ADDRESS} is unsafe, as nothing keeps the device within")
    assert found == {"driver": IGB, "no traces": True}


@pytest.fixture(params=[GENERIC, IGB])
def driver(request: pytest.FixtureRequest) -> str:
    if request.param == IGB:
        request.getfixturevalue("unlocked")
    return request.param


def test_with_the_switch_it_reaches_all_memory_and_leaves_traces(bare: BareGuest, driver: str) -> None:
    found = bare.run(EDU, "unsafe", timeout=120, address=ADDRESS, driver=driver)
    (refused,) = found.pop("without CAP_SYS_RAWIO")
    assert refused.startswith(f"UnsafeError: {driver} of {ADDRESS} is unsafe and needs CAP_SYS_RAWIO")
    assert found.pop("elsewhere").startswith("DmaError: nothing translates for this device: byte 0 of this memory is at 0x")
    assert found.pop("twice").startswith(f"UnavailableError: {ADDRESS} is in use: another process")
    assert f"vfio-vmbus: {driver} of {ADDRESS} opened by user " in " | ".join(found.pop("log"))
    assert not found.pop("master after", False)
    assert found == {
        "no traces before": True,
        "isolation": "",
        "interrupt": INTERRUPTS[driver],
        "factorial": 3628800,
        "dma": "all of memory",
        "master": True,
        "tainted": True,
        "marks": [f"{driver} of {ADDRESS}"] * 4,  # opened twice, and asked for twice while it was in use
    }


def test_only_memory_that_is_there_is_mapped(bare: BareGuest, driver: str) -> None:
    found = bare.run(EDU, "maps", timeout=120, address=ADDRESS, driver=driver)
    assert {name: found[name].startswith(text) for name, text in MAPS.items()} == dict.fromkeys(MAPS, True), found


@pytest.fixture(scope="module")
def suites() -> dict[str, dict[str, Any]]:
    return {}


@pytest.mark.parametrize("name", CONFORMANCE)
def test_conformance(bare: BareGuest, suites: dict[str, dict[str, Any]], driver: str, name: str) -> None:
    if driver not in suites:
        suites[driver] = bare.run(EDU, "conformance", timeout=300, address=ADDRESS, driver=driver, names=CONFORMANCE)
    assert suites[driver][name] == ""
