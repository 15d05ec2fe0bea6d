"""What a process with an embedded host tells, and can do."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Final

from ..bus.policy import Isolation
from ..errors import UsageError
from ..host.connection import Connection
from ..host.embedded import EmbeddedHost, HostEnd
from ..host.netvsp.vsp import Netvsp
from ..host.vsp import Vsp
from ..wire.vmbus import version_text
from .messages import Client, Command, Device, Link, Mtu, Offer, Port, Rescind

SOFTWARE_IOMMU = "software IOMMU: a client's device reaches only what it mapped"


_QUIET: Final = 0.3
"""Seconds without a frame, after which a driver has seen that its link is down."""
_PATIENCE: Final = 3.0
"""Seconds that a driver may take to see it: Linux tells two changes of a link no closer than 2 s."""


class HostSubject:
    """why: what keeps the clients' devices in bounds, for people. max_mtu: of cards that are added."""

    def __init__(self, host: EmbeddedHost, *, why: str = SOFTWARE_IOMMU, max_mtu: int = 9000) -> None:
        self._host = host
        self._why = why
        self._max_mtu = max_mtu
        self._taken: dict[str, HostEnd] = {}
        """The client that a device was taken from, for when it is to have it back."""

    def devices(self) -> tuple[Device, ...]:
        return self._host.run(lambda: tuple(self._device(name, device) for name, device in self._all().items()))

    def clients(self) -> tuple[Client, ...]:
        return self._host.run(lambda: tuple(self._client(end) for end in self._host.clients()))

    def ports(self) -> tuple[Port, ...]:
        ports = self._host.run(lambda: self._host.switch.ports)
        return tuple(Port(port.name, port.kind, port.enabled, asdict(port.counters())) for port in ports)

    def carry_out(self, command: Command) -> str:
        match command:
            case Link(nic=name, up=up):
                self._host.set_link(self._nic(name), up)
                return f"{name}: link {'up' if up else 'down'}"
            case Rescind(device=name, at_once=at_once):
                return f"{name}: taken away from {self._rescind(name, at_once=at_once).name}"
            case Offer(device=name, client=client):
                return f"{name}: offered to {self._offer(name, client).name}"
            case Mtu(nic=name, size=size):
                return self._set_mtu(name, size)

    def _all(self) -> dict[str, Vsp]:
        return {**self._host.nics, **self._host.balloons}

    def _named(self, name: str) -> Vsp:
        device = self._all().get(name)
        if device is None:
            raise UsageError(f"no device {name}: there are {', '.join(self._all()) or 'none'}")
        return device

    def _nic(self, name: str) -> Netvsp:
        device = self._named(name)
        if not isinstance(device, Netvsp):
            raise UsageError(f"{name} is no network card")
        return device

    def _holder(self, device: Vsp) -> HostEnd | None:
        return next((end for end in self._host.clients() if end.has(device)), None)

    def _rescind(self, name: str, *, at_once: bool) -> HostEnd:
        device = self._named(name)
        holder = self._host.run(lambda: self._holder(device))
        if holder is None:
            raise UsageError(f"{name}: no client has it")
        if at_once or not isinstance(device, Netvsp):
            self._host.rescind(device)
        else:
            self._unplug(device)
        self._taken[name] = holder
        return holder

    def _unplug(self, nic: Netvsp) -> None:
        """Pull a card's cable, wait until its driver sends no more, and take it away then: Linux's hv_netvsc waits for ever for completions
        of frames that are on their way when its channel goes (rndis_filter_halt_device), and holds the lock of all its network meanwhile.
        """
        link = nic.link
        self._host.set_link(nic, False)
        try:
            _until_quiet(nic)
            self._host.rescind(nic)
        finally:
            self._host.set_link(nic, link)  # of whoever has it next

    def _offer(self, name: str, client: str | None) -> HostEnd:
        """To the client that it was taken from, or the one that is named, or the only one."""
        clients = {end.name: end for end in self._host.clients()}
        before = self._taken.get(name)
        if client is None and before in clients.values():
            end = before
        elif client is None and len(clients) == 1:
            (end,) = clients.values()
        else:
            end = clients.get(client or "")
        if end is None:
            names = ", ".join(clients)
            raise UsageError(
                f"{name}: offer it to whom? Clients: {names}" if clients else f"{name}: no client is there to be offered it"
            )
        if not isinstance(end, Connection):
            raise UsageError(f"{end.name} has its device ready-made (personality vmbus): it gets it by connecting again")
        device = self._all().get(name)
        if device is None:
            device = self._add(name)
        self._host.offer(end, device)
        self._taken.pop(name, None)
        return end

    def _add(self, name: str) -> Vsp:
        if not name or len(name) > 32 or not name.isascii() or not name.isprintable():
            raise UsageError(f"{name[:40]!r} is no name for a card: take up to 32 printable characters")
        return self._host.add_nic(name, max_mtu=self._max_mtu)

    def _set_mtu(self, name: str, size: int) -> str:
        """VMBus has no message for it: the card goes and comes again. A driver that has not let go of it yet gets it when it has."""
        nic = self._nic(name)
        if not 68 <= size <= 9000:
            raise UsageError(f"MTU {size}: take 68 to 9000 bytes")
        holder = self._host.run(lambda: self._holder(nic))
        if holder is not None:
            self._unplug(nic)
        self._host.run(lambda: nic.set_mtu(size))
        if isinstance(holder, Connection):
            self._host.offer(holder, nic)
            return f"{name}: MTU {size}; taken away from {holder.name} and offered again"
        return f"{name}: MTU {size} for its next client" + (f"; taken away from {holder.name}" if holder else "")

    def _device(self, name: str, device: Vsp) -> Device:
        holder = self._holder(device)
        nic = device if isinstance(device, Netvsp) else None
        return Device(
            name=name,
            kind="network" if nic else "balloon",
            isolation=Isolation.ISOLATED,
            why=self._why,
            instance=str(device.offer.instance_guid),
            mac=nic.mac.hex(":") if nic else None,
            mtu=nic.mtu if nic else None,
            link=nic.link if nic else None,
            client=holder.name if holder else None,
            counters=(nic.counters() if nic else {}) | self._host.fault_counters(name),
        )

    def _client(self, end: HostEnd) -> Client:
        maps = end.domain.maps
        return Client(
            name=end.name,
            devices=tuple(name for name, device in self._all().items() if end.has(device)),
            version=version_text(end.version) if end.version is not None else None,
            failed=end.failed,
            channels=end.open_channels,
            gpadls=len(end.gpadl_sizes),
            gpadl_bytes=sum(end.gpadl_sizes),
            maps=len(maps),
            mapped_bytes=sum(item.size for item in maps),
            faults=end.domain.fault_count,
            errors=end.error_count,
            last_error=str(end.errors[-1]) if end.errors else None,
        )


def _until_quiet(nic: Netvsp) -> None:
    """Until the client sends no more, or takes no notice."""
    now = quiet_since = time.monotonic()
    end, sent = now + _PATIENCE, nic.counter("sent_frames")
    while now < end and now - quiet_since < _QUIET:
        time.sleep(0.02)
        now = time.monotonic()
        if (count := nic.counter("sent_frames")) != sent:
            sent, quiet_since = count, now
