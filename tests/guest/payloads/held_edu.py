"""An edu in the hands of user space: who holds it, what is left when that one is killed, and when the device is unplugged."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest.payloads.unsafe_edu import Report, edu, said

from vfio_vmbus.bus import pci
from vfio_vmbus.bus.noiommu import open_without_iommu
from vfio_vmbus.bus.uio_pci import UioPciDevice
from vfio_vmbus.errors import RescindedError
from vfio_vmbus.vfio import eventfd
from vfio_vmbus.vfio.device import BAR0_REGION, CONFIG_REGION, Device
from vfio_vmbus.wire.vfio import IRQ_REQ

EDU_IDS = (0x1234, 0x11E8)
PATIENCE = 100.0
"""Seconds that anything may take on a loaded machine."""


def opened(address: str, driver: str) -> Device:
    """Through whatever driver has it, with the switch."""
    return open_without_iommu(address, unsafe=True) if driver == "vfio-pci" else UioPciDevice(address, unsafe=True)


def hold(report: Report, address: str, driver: str) -> None:
    """Until it is killed, with DMA on and an interrupt enabled."""
    with opened(address, driver) as device, edu.Edu(device) as card:
        card.factorial(3)
        report(os.getpid())
        signal.pause()


def end(report: Report, pid: int) -> None:
    """Kill a process, and see to it that it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}/fd").exists() or not os.listdir(f"/proc/{pid}/fd"), "its end")


def attempt(report: Report, address: str, driver: str) -> str:
    """What another process is told."""
    return said(lambda: opened(address, driver).close())


def works(report: Report, address: str, driver: str) -> dict[str, Any]:
    """What the device does for the next one."""
    with opened(address, driver) as device, edu.Edu(device) as card:
        return {"factorial": card.factorial(10), "driver": pci.look(address).driver}


def found(report: Report, known: str) -> str:
    """The address of another edu than `known`, once the kernel has found it."""

    def others() -> list[str]:
        return [each.address for each in pci.devices() if (each.vendor, each.device) == EDU_IDS and each.address != known]

    return until(others, "an edu to be plugged")[0]


def unplugged(report: Report, address: str, driver: str) -> dict[str, Any]:
    """Work with the device until the kernel takes it; what is seen of that."""
    device = opened(address, driver)
    bar, space = device.region(BAR0_REGION), device.region(CONFIG_REGION)
    asked = eventfd.make()
    if driver == "vfio-pci":
        device.irq(IRQ_REQ).enable(0, asked)
    with bar.map(0, 4096) as mapping:
        report("open")
        seen: dict[str, Any] = {}
        if driver == "vfio-pci":
            seen["asked"] = bool(select.select([asked], [], [], PATIENCE)[0]) and eventfd.take(asked)
            seen["still there"] = bar.read32(edu.IDENTIFICATION) & 0xFF
        else:
            seen["gone"] = until(lambda: _rescinded(lambda: space.read(0, 4)), "the device to be gone")
            seen["registers"] = _rescinded(lambda: bar.read32(edu.IDENTIFICATION))
            seen["mapped"] = mapping.read(0, 4).hex()
    device.close()
    until(lambda: not Path(f"/sys/bus/pci/devices/{address}").exists(), "the kernel to forget it")
    seen["then"] = said(lambda: opened(address, driver))
    os.close(asked)
    return seen


def _rescinded(use: Callable[[], object]) -> str:
    """The device's last word; "" as long as it works."""
    try:
        use()
    except RescindedError as error:
        return str(error)
    return ""


def until(true: Callable[[], Any], what: str) -> Any:
    """What it returns, once that is something."""
    deadline = time.monotonic() + PATIENCE
    while not (value := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{PATIENCE:.0f} s for {what}")
        time.sleep(0.05)
    return value
