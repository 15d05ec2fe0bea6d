"""The network card behind QEMU's vfio-user-pci, driven by netvsc over the kernel's vfio-pci."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vfio_vmbus.apps.lab import Lab, NamespaceSpec
from vfio_vmbus.apps.tap import TapBridge
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


def bridged(report: Callable[[Any], None], address: str, inside: str, size: int) -> dict[str, Any]:
    """Bind the card, give it to a TAP with the IPv4 address `inside`, serve `size` bytes there over HTTP until stopped.

    Reports what it does: the card, then the body that is served.
    """
    times = {"start": time.monotonic()}

    def reached(what: str) -> None:
        times[what] = time.monotonic() - times["start"]

    bind(address)
    reached("bound")
    try:
        with open_device(KernelDevice(address)) as device, Netvsc(device) as nic:
            reached("driven")
            report({"isolation": device.isolation, **asdict(nic.info)})
            with Lab(NamespaceSpec("guest", inside, mac=nic.mac, mtu=nic.info.mtu)) as lab:
                (namespace,) = lab.namespaces
                body = namespace.http_serve(size, seed=7)
                reached("serving")
                with TapBridge(nic, namespace.tap) as bridge:
                    report({"url": namespace.http_url(body), "sha256": body.sha256, "times": times})
                    try:
                        while True:
                            time.sleep(0.2)
                            bridge.check()
                    except SystemExit:  # stopped by the test
                        return {**asdict(bridge.counters()), **{f"nic_{k}": v for k, v in asdict(nic.counters()).items()}}
    finally:
        unbind(address)


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
