"""edu through the kernel's VFIO without an IOMMU: who may, what it leaves behind, DMA and MSI, the suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest.payloads import kernel_edu
from guest.payloads.unsafe_edu import (
    STATE,
    Report,
    both_ways,
    bound,
    edu,
    physical_maps,
    results,
    said,
    traces,
    without_rawio,
)

from vfio_vmbus.bus import binding, pci
from vfio_vmbus.bus.noiommu import open_without_iommu
from vfio_vmbus.vfio.device import Device
from vfio_vmbus.vfio.kernel import KernelDevice

SWITCH = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")


@contextmanager
def allowed() -> Iterator[None]:
    """The kernel's own switch is on."""
    SWITCH.write_text("1")
    try:
        yield
    finally:
        SWITCH.write_text("0")


def switch(report: Report, on: bool) -> None:
    """The kernel's own switch."""
    SWITCH.write_text(str(int(on)))


@contextmanager
def ready(address: str) -> Iterator[None]:
    """The device is vfio-pci's, in a group without an IOMMU."""
    with allowed(), bound(address, "vfio-pci", unsafe=True):
        yield


def unsafe_device(address: str) -> KernelDevice:
    return open_without_iommu(address, unsafe=True)


def refusals(report: Report, address: str) -> dict[str, Any]:
    """Without the kernel's switch, without ours, without CAP_SYS_RAWIO; and what is left behind, which is nothing of ours."""
    before = traces()
    found: dict[str, Any] = {
        "tainted": before.tainted,
        "kernel's switch": SWITCH.read_text().strip(),
        "bind, kernel's switch off": said(lambda: binding.bind(address, "vfio-pci", state=STATE, unsafe=True)),
    }
    with allowed():
        found["bind without ours"] = said(lambda: binding.bind(address, "vfio-pci", state=STATE))
    found["driver"] = pci.look(address).driver
    found["no traces"] = traces() == before
    with ready(address):
        tainted = traces()
        found["bound"] = tainted.tainted, [line for line in tainted.lines if line not in before.lines]
        found["nodes"] = sorted(os.listdir("/dev/vfio"))
        found["as isolated"] = said(lambda: KernelDevice(address))
        found["without ours"] = said(lambda: open_without_iommu(address, unsafe=False))
        found["without CAP_SYS_RAWIO"], found["nor by the kernel"] = without_rawio(
            lambda: unsafe_device(address), lambda: KernelDevice(address, without_iommu=lambda what: None)
        )
        SWITCH.write_text("0")
        found["switched off since"] = said(lambda: KernelDevice(address, without_iommu=lambda what: None))
        found["no more traces"] = traces() == tainted
    return found


def unsafe(report: Report, address: str) -> dict[str, Any]:
    """MSI, DMA both ways by physical addresses, one user at a time; and the traces of it."""
    before = traces()
    found: dict[str, Any] = {}
    with ready(address):
        with unsafe_device(address) as device, edu.Edu(device) as driver:
            found["isolation"] = device.info.isolation
            found["interrupt"] = driver.irq.index
            found["factorial"] = driver.factorial(10)
            found["elsewhere"] = said(driver.buffer)
            found["dma"] = both_ways(device, driver)
            found["twice"] = said(lambda: unsafe_device(address))
            found["unbind in use"] = said(lambda: binding.unbind(address, state=STATE))
        after = traces()
    found["tainted"] = after.tainted
    found["log"] = [line for line in after.lines if line not in before.lines]
    found["marks"] = list(after.marks)
    found["driver"] = pci.look(address).driver
    return found


class NoIommuConformance(kernel_edu.EduConformance):
    def open(self) -> Device:
        return unsafe_device(self.address)


def conformance(report: Report, address: str, names: list[str]) -> dict[str, str]:
    """What went wrong, by the name of the test."""
    with ready(address):
        suite = NoIommuConformance(address)
        suite.open().close()  # what is made once a process, a mark, is made
        return results(suite, names)


def maps(report: Report, address: str) -> dict[str, str]:
    """Maps of physical memory."""
    with ready(address):
        return physical_maps(lambda: unsafe_device(address))
