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
from vfio_vmbus.vfio.kernel import KernelDevice


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
