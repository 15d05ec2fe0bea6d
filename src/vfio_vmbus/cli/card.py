"""`--device` and `--port`: which card to drive, and, on an embedded host, what else is on its switch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .control import controlled
from .device import elsewhere, is_uio, uio_device

if TYPE_CHECKING:
    from ..drivers.netvsc.driver import Netvsc
    from ..host.embedded import EmbeddedHost
    from ..host.faults.plan import FaultPlan
    from ..vfio.device import Device

DEVICE_HELP = (
    "The card to drive: embedded[:NAME] (of a VMBus host inside this process), "
    "unix:PATH (of a vfio-user server), vfio:ADDRESS (a PCI device bound to vfio-pci), "
    "uio-pci:ADDRESS (bound to uio_pci_generic or igb_uio: unsafe), "
    "vmbus:GUID or uioN (a VMBus card bound to uio_hv_generic: unsafe)."
)
PORT_HELP = (
    "Something else on the embedded host's switch (repeat for more): tap:NAME, replay:FILE, capture:FILE, generator[:SIZE], sink."
)

DeviceOption = Annotated[str, typer.Option("--device", help=DEVICE_HELP, metavar="DEVICE")]
PortOption = Annotated[list[str] | None, typer.Option("--port", help=PORT_HELP, metavar="KIND[:ARG]")]
MtuOption = Annotated[int, typer.Option("--mtu", help="Bytes of an Ethernet payload, 68 to 9000.", min=68, max=9000)]
PollOption = Annotated[str, typer.Option("--poll", help="How to wait: busy, adaptive or interrupt.", metavar="POLICY")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SecondsOption = Annotated[float | None, typer.Option("--seconds", help="Stop after so long.", min=0.001)]


_WAYS = "take embedded[:NAME], unix:PATH, vfio:ADDRESS, uio-pci:ADDRESS, vmbus:GUID or uioN"


@dataclass(frozen=True)
class Card:
    """A card that is driven. host: where it is one of this process's."""

    nic: Netvsc
    host: EmbeddedHost | None = None


def is_embedded(device: str) -> bool:
    """Is it a card of this process's host? Raises UsageError for what names no card."""
    if is_uio(device):
        return False
    kind, separator, rest = device.partition(":")
    if kind not in ("embedded", "unix", "vfio", "uio-pci"):
        raise UsageError(f"--device {device}: {_WAYS}")
    if kind == "embedded" and separator and not rest:
        raise UsageError(f"--device {device}: a name is missing; {_WAYS}")
    if kind != "embedded" and not rest:
        raise UsageError(f"--device {device}: {'a path' if kind == 'unix' else 'an address'} is missing; {_WAYS}")
    return kind == "embedded"


@contextmanager
def driven_card(
    device: str,
    ports: list[str] | None,
    *,
    mtu: int = 1500,
    poll: str = "adaptive",
    mac: bytes | None = None,
    promiscuous: bool = False,
    allow_spoofing: bool = False,
    unsafe: bool = False,
    faults: FaultPlan | None = None,
    command: str,
) -> Iterator[Card]:
    """Attach a card and drive it; start its host with these ports first, if it is embedded. Raises UsageError for words that make no sense.

    mac, allow_spoofing: of an embedded card. poll: how its host waits. unsafe: was the switch for such devices given? faults: of the
    host. command: who does it, for `status`.
    """
    embedded = is_embedded(device)
    check_ports(ports or [])
    if ports and not embedded:
        raise UsageError(f"--port {ports[0]}: the switch of {device} is in another process; give ports to vfio-vmbus serve")
    if faults and not embedded:
        raise UsageError(
            f"--fault {faults.faults[0]}: the host of {device} is not in this process; give faults to vfio-vmbus serve"
        )
    from ..channel.opening import open_device
    from ..control.driving import DriverSubject
    from ..control.hosting import HostSubject
    from ..drivers.netvsc.driver import DEFAULT_FILTER, Netvsc
    from ..wire.guids import CLASS_NETWORK
    from ..wire.oid import PACKET_TYPE_PROMISCUOUS

    with ExitStack() as stack:
        host = _host(stack, poll, faults) if embedded else None
        if is_uio(device):
            opened = stack.enter_context(uio_device(device, unsafe=unsafe))
            if opened.class_guid != CLASS_NETWORK:
                raise UsageError(f"--device {device}: {opened.name} is no network card")
        elif host is not None:
            attached: Device = host.attach(host.add_nic(_rest(device) or "nic0", mac, allow_spoofing=allow_spoofing))
            opened = stack.enter_context(open_device(attached, CLASS_NETWORK))
        else:
            opened = stack.enter_context(open_device(elsewhere(device, unsafe=unsafe), CLASS_NETWORK))
        accept = PACKET_TYPE_PROMISCUOUS if promiscuous else DEFAULT_FILTER
        nic = stack.enter_context(Netvsc(opened, mtu=mtu, packet_filter=accept))
        for text in ports or []:
            if host is not None:
                add_port(host, text, stack, mtu=nic.info.mtu, mac=nic.mac)
        stack.enter_context(controlled(command, lambda: HostSubject(host) if host else DriverSubject(opened, nic)))
        yield Card(nic, host)


def _rest(device: str) -> str:
    return device.partition(":")[2]


def _host(stack: ExitStack, poll: str, faults: FaultPlan | None) -> EmbeddedHost:
    from ..host.embedded import EmbeddedHost

    return stack.enter_context(EmbeddedHost(poll=poll, faults=faults))


_KINDS = {"tap": True, "replay": True, "capture": True, "generator": None, "sink": False}
"""Kinds of ports, and whether they take an argument (None: may)."""


def check_ports(ports: list[str]) -> None:
    """Raise UsageError for words that make no sense."""
    for text in ports:
        kind, _, argument = text.partition(":")
        if kind not in _KINDS:
            raise UsageError(f"--port {text}: take one of tap:NAME, replay:FILE, capture:FILE, generator[:SIZE], sink")
        if (_KINDS[kind] is True and not argument) or (_KINDS[kind] is False and argument):
            raise UsageError(f"--port {text}: {kind} takes {'an' if _KINDS[kind] else 'no'} argument")
        if kind == "generator" and argument and not argument.isdecimal():
            raise UsageError(f"--port {text}: the size of frames is a number of bytes")
    if len(set(ports)) != len(ports):
        raise UsageError("--port: the same port twice")


def add_port(host: EmbeddedHost, text: str, stack: ExitStack, *, mtu: int, mac: bytes) -> None:
    """Put a port on the host's switch. mtu: of a TAP. mac: of the card that a generator sends to."""
    from ..host.embedded import random_mac

    kind, _, argument = text.partition(":")
    switch: Any = host.switch
    match kind:
        case "tap":
            from ..apps.lab.tap import open_tap

            switch.add_tap(stack.enter_context(open_tap(argument, mtu=mtu)).fd, argument)
        case "replay":
            switch.add_replay(argument)
        case "capture":
            switch.add_capture(argument)
        case "generator":
            switch.add_generator(random_mac(), mac, size=int(argument or 60))
        case _:
            switch.add_sink()
