"""What the demonstration stands on: two namespaces, a host in a process of its own between them, a card that this process drives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ..apps.lab import Lab, Namespace
from ..apps.tap import TapBridge
from ..channel.device import VmbusDevice
from ..drivers.netvsc.driver import Netvsc
from .hostprocess import HostProcess, host_process


@dataclass(frozen=True)
class Stage:
    """left's TAP is a port of the host's switch; right's is fed by the driver (`bridge`)."""

    left: Namespace
    right: Namespace
    host: HostProcess
    device: VmbusDevice
    nic: Netvsc
    bridge: TapBridge


@contextmanager
def stage(mtu: int) -> Iterator[Stage]:
    """Raises UnavailableError where namespaces or TAPs are not to be had."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab.pair(mtu))
        left, right = lab.namespaces
        host = stack.enter_context(host_process(right.tap.mac, left.tap.fd))
        device = stack.enter_context(host.attach())
        nic = stack.enter_context(Netvsc(device, mtu=mtu))
        bridge = stack.enter_context(TapBridge(nic, right.tap))
        yield Stage(left, right, host, device, nic, bridge)
