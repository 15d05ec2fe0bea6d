"""What a process that drives a device tells; it is nobody's host, so that there is nothing to command."""

from __future__ import annotations

from dataclasses import asdict

from ..bus.policy import MEANING, Isolation
from ..channel.device import VmbusDevice
from ..drivers.netvsc.driver import Netvsc
from ..errors import UsageError
from ..wire.guids import class_name
from .messages import Client, Command, Device, Port


class DriverSubject:
    """device: which one, nic: its driver if it is a network card's."""

    def __init__(self, device: VmbusDevice, nic: Netvsc | None = None) -> None:
        self._device = device
        self._nic = nic

    def devices(self) -> tuple[Device, ...]:
        device, nic = self._device, self._nic
        return (
            Device(
                name=device.name,
                kind=class_name(device.class_guid),
                isolation=Isolation.ISOLATED if device.isolation else Isolation.UNSAFE,
                why=device.isolation or MEANING,
                instance=str(device.instance_guid),
                mac=nic.mac.hex(":") if nic else None,
                mtu=nic.info.mtu if nic else None,
                link=nic.link if nic else None,
                counters=asdict(nic.counters()) if nic else {},
            ),
        )

    def clients(self) -> tuple[Client, ...]:
        return ()

    def ports(self) -> tuple[Port, ...]:
        return ()

    def carry_out(self, command: Command) -> str:
        raise UsageError("this process drives a device of a host elsewhere: have the host's process do that")
