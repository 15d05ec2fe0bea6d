"""`--device` and `--port`: which card to drive, and what else is on the embedded host's switch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..drivers.netvsc.driver import Netvsc
    from ..host.embedded import EmbeddedHost
    from ..host.switch.port import Port

DEVICE_HELP = "The card to drive: embedded[:NAME], a card of a VMBus host inside this process."
PORT_HELP = (
    "Something else on the embedded host's switch (repeat for more): tap:NAME, replay:FILE, capture:FILE, generator[:SIZE], sink."
)

DeviceOption = Annotated[str, typer.Option("--device", help=DEVICE_HELP, metavar="DEVICE")]
PortOption = Annotated[list[str] | None, typer.Option("--port", help=PORT_HELP, metavar="KIND[:ARG]")]
MtuOption = Annotated[int, typer.Option("--mtu", help="Bytes of an Ethernet payload, 68 to 9000.", min=68, max=9000)]
PollOption = Annotated[str, typer.Option("--poll", help="How to wait: busy, adaptive or interrupt.", metavar="POLICY")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SecondsOption = Annotated[float | None, typer.Option("--seconds", help="Stop after so long.", min=0.001)]


@dataclass(frozen=True)
class Bench:
    """A card that is driven, and its host."""

    host: EmbeddedHost
    nic: Netvsc
    ports: dict[str, Port]
    """The ports asked for, by what was asked for."""


def _name_of(device: str) -> str:
    kind, _, name = device.partition(":")
    if kind != "embedded":
        raise UsageError(f"--device {device}: take embedded or embedded:NAME")
    return name or "nic0"


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
) -> Iterator[Bench]:
    """Start the embedded host with its ports, attach the card and drive it. Raises UsageError for words that make no sense."""
    name = _name_of(device)
    check_ports(ports or [])
    from ..channel.offered import open_device
    from ..drivers.netvsc.driver import DEFAULT_FILTER, Netvsc
    from ..host.embedded import EmbeddedHost
    from ..wire.oid import PACKET_TYPE_PROMISCUOUS

    with ExitStack() as stack:
        host = stack.enter_context(EmbeddedHost(poll=poll))
        vsp = host.add_nic(name, mac, allow_spoofing=allow_spoofing)
        device_ = stack.enter_context(open_device(host.attach(vsp)))
        accept = PACKET_TYPE_PROMISCUOUS if promiscuous else DEFAULT_FILTER
        nic = stack.enter_context(Netvsc(device_, mtu=mtu, packet_filter=accept))
        yield Bench(host, nic, {text: add_port(host, text, stack, mtu=nic.info.mtu, mac=nic.mac) for text in ports or []})


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


def add_port(host: EmbeddedHost, text: str, stack: ExitStack, *, mtu: int, mac: bytes) -> Port:
    """Put a port on the host's switch. mtu: of a TAP. mac: of the card that a generator sends to."""
    from ..host.embedded import random_mac

    kind, _, argument = text.partition(":")
    switch: Any = host.switch
    match kind:
        case "tap":
            from ..apps.lab.tap import open_tap

            return switch.add_tap(stack.enter_context(open_tap(argument, mtu=mtu)).fd, argument)
        case "replay":
            return switch.add_replay(argument)
        case "capture":
            return switch.add_capture(argument)
        case "generator":
            return switch.add_generator(random_mac(), mac, size=int(argument or 60))
        case _:
            return switch.add_sink()
