"""What the demonstration stands on: two namespaces, a host between them, a card that this process drives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ..apps.lab import Lab, Namespace
from ..apps.tap import TapBridge
from ..channel.offered import OfferedDevice, open_offered
from ..drivers.netvsc.driver import Netvsc
from ..host.embedded import EmbeddedHost


@dataclass(frozen=True)
class Stage:
    """left's TAP is a port of the host's switch; right's is fed by the driver (`bridge`)."""

    left: Namespace
    right: Namespace
    host: EmbeddedHost
    device: OfferedDevice
    nic: Netvsc
    bridge: TapBridge


@contextmanager
def stage(mtu: int) -> Iterator[Stage]:
    """Raises UnavailableError where namespaces or TAPs are not to be had."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab.pair(mtu))
        left, right = lab.namespaces
        host = stack.enter_context(EmbeddedHost())
        host.switch.add_tap(left.tap.fd, "left")
        vsp = host.add_nic("nic0", right.tap.mac)
        device = stack.enter_context(open_offered(host.attach(vsp, name="embedded:nic0")))
        nic = stack.enter_context(Netvsc(device, mtu=mtu))
        bridge = stack.enter_context(TapBridge(nic, right.tap))
        yield Stage(left, right, host, device, nic, bridge)
