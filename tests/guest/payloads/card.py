"""A driver of the network card behind QEMU's vfio-user-pci, over the kernel's vfio-pci, that does not behave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vfio_vmbus.bus.binding import bind, unbind
from vfio_vmbus.channel.opening import open_device
from vfio_vmbus.drivers.netvsc.driver import Netvsc
from vfio_vmbus.errors import VfioVmbusError
from vfio_vmbus.memory.mapping import PAGE
from vfio_vmbus.testing.attacker import Attacker
from vfio_vmbus.testing.hostile import ATTACKS
from vfio_vmbus.vfio.kernel import KernelDevice

NOWHERE = 3 << 36
"""An IOVA that no driver maps here."""


def trespasses(report: Callable[[Any], None], address: str, attacks: list[str]) -> dict[str, Any]:
    """The card's driver turns on its host: what comes of each attack, and of a GPADL over memory that is not mapped."""
    outcomes: dict[str, Any] = {"gpadl_iova": NOWHERE}
    bind(address)
    try:
        for attack in ATTACKS:
            if attack.name in attacks:
                with open_device(KernelDevice(address)) as device:
                    outcomes[attack.name] = asdict(attack.run(Attacker(device, patience=2.0)))
        with open_device(KernelDevice(address)) as device:
            (relid,) = device.connection.offers
            try:
                device.connection.create_gpadl(relid, range(NOWHERE // PAGE, NOWHERE // PAGE + 4))
            except VfioVmbusError as error:
                outcomes["gpadl"] = f"{type(error).__name__}: {error}"
            with Netvsc(device) as nic:  # the device still serves a driver that behaves
                outcomes["mac"] = nic.mac
    finally:
        unbind(address)
    return outcomes
