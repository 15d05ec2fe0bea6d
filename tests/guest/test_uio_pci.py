"""UioPciDevice against a real kernel's uio_pci_generic, with QEMU's edu and no IOMMU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfio_vmbus.testing.conformance import DeviceConformance

from .bare import ADDRESS, BareGuest
from .conftest import PAYLOADS
from .packages import Tools

EDU = PAYLOADS / "uio_edu.py"
MAPPING = {
    "test_memory_is_mapped_and_taken_back",
    "test_many_maps_come_and_go",
    "test_maps_do_not_overlap",
    "test_an_unmap_does_not_split_a_map",
    "test_what_is_no_sealed_memory_is_refused",
    "test_closing_twice_does_no_harm_and_the_device_can_be_opened_again",
}
"""They map where nothing can be mapped without an IOMMU."""
CONFORMANCE = [name for name in dir(DeviceConformance) if name.startswith("test_") and name not in MAPPING]


@pytest.fixture(scope="module")
def bare(programs: Tools) -> Iterator[BareGuest]:
    with tempfile.TemporaryDirectory(prefix="rig-") as folder, BareGuest(programs, Path(folder)) as guest:
        print(guest.hello)
        yield guest


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
        "tainted": False,
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


@pytest.fixture(scope="module")
def suite(bare: BareGuest) -> dict[str, str]:
    found: dict[str, str] = bare.run(EDU, "conformance", timeout=300, address=ADDRESS, names=CONFORMANCE)
    return found


@pytest.mark.parametrize("name", CONFORMANCE)
def test_conformance(suite: dict[str, str], name: str) -> None:
    assert suite[name] == ""


def test_with_the_switch_it_reaches_all_memory_and_leaves_traces(bare: BareGuest) -> None:
    """The last one: a taint stays."""
    found = bare.run(EDU, "unsafe", timeout=120, address=ADDRESS)
    assert found.pop("elsewhere").startswith("DmaError: nothing translates for this device: byte 0 of this memory is at 0x")
    assert found == {
        "tainted before": False,
        "isolation": "",
        "dma": "all of memory",
        "tainted": True,
        "marks": [f"uio_pci_generic of {ADDRESS}"],
        "log": True,
        "master after": 0,
    }
