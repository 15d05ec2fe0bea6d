"""What a machine would lose with a device: its default route, the remote login, what is mounted or swapped to, whoever has it open.

Source: Documentation/filesystems/proc.rst (net/route, net/ipv6_route, net/if_inet6, mountinfo, swaps),
Documentation/ABI/testing/sysfs-class-net and sysfs-block of Linux 6.12.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import holders
from .machine import Machine, number
from .names import Target, real

_ESCAPE = re.compile(r"\\([0-7]{3})")
_GENERATIONS = 64
"""Parents of a process that are asked for a remote login."""
_UP, _REJECT = 0x1, 0x200
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Route:
    """A route: to where, by which interface."""

    to: _Network
    interface: str
    metric: int


def reasons(target: Target, machine: Machine = Machine(), environment: Mapping[str, str] | None = None) -> list[str]:  # noqa: B008
    """Why this device should stay with its driver; each names what would be lost. environment: of this process."""
    here = target.folder(machine)
    found = [*_networks(here, machine, environment or {}), *_disks(here, machine)]
    for holder in holders.of_nodes(holders.nodes_of(here, machine), machine).holders:
        found.append(f"{holder.path} is held open by process {holder.pid} ({holder.command or '?'}, {holder.user})")
    return found


def interfaces_below(here: Path, kind: str, machine: Machine) -> list[str]:
    """Names in /sys/class/net or /sys/class/block that lie below a device's folder."""
    folder = machine.sysfs / "class" / kind
    return [name for name in machine.names(folder) if here in real(folder / name).parents]


def _networks(here: Path, machine: Machine, environment: Mapping[str, str]) -> Iterator[str]:
    mine = interfaces_below(here, "net", machine)
    table = routes(machine)
    default = {route.interface for route in table if route.to.prefixlen == 0}
    logins = {interface: address for address in _logins(machine, environment) for interface in _towards(address, table, machine)}
    for name in mine:
        carriers = _with_uppers(name, machine)
        if carriers & default:
            yield f"{name} carries the default route{_by(name, carriers & default)}"
        for carrier in sorted(carriers & set(logins)):
            yield f"{name} carries the remote login from {logins[carrier]}{_by(name, {carrier})}"


def _by(name: str, carriers: set[str]) -> str:
    return "" if name in carriers else f" (by {', '.join(sorted(carriers))})"


def _with_uppers(name: str, machine: Machine) -> set[str]:
    """The interface and those built on it: bonds, bridges, VLANs, the synthetic card of a virtual function."""
    found: set[str] = set()
    ahead = [name]
    while ahead:
        one = ahead.pop()
        if one not in found:
            found.add(one)
            entries = machine.names(machine.sysfs / "class/net" / one)
            ahead += [entry.removeprefix("upper_") for entry in entries if entry.startswith("upper_")]
    return found


def routes(machine: Machine) -> list[Route]:
    """The main table, IPv4 and IPv6, as far as it can be understood."""
    found: list[Route] = []
    for line in machine.text(machine.proc / "net/route").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and (number(fields[3], 16) or 0) & (_UP | _REJECT) == _UP:
            destination, mask = _reversed(fields[1]), _reversed(fields[7])
            if destination is not None and mask is not None:
                found += _route(f"{destination}/{mask}", fields[0], fields[6], 10)
    for line in machine.text(machine.proc / "net/ipv6_route").splitlines():
        fields = line.split()
        if len(fields) >= 10 and fields[9] != "lo" and (number(fields[8], 16) or 0) & (_UP | _REJECT) == _UP:
            length = number(fields[1], 16)
            found += _route(f"{_colons(fields[0])}/{length}", fields[9], fields[5], 16)
    return found


def _route(to: str, interface: str, metric: str, base: int) -> list[Route]:
    try:
        return [Route(ipaddress.ip_network(to, strict=False), interface, number(metric, base) or 0)]
    except ValueError:
        return []


def _reversed(text: str) -> str | None:
    """An address as /proc/net/route has it: the bytes of a word, in this machine's order (little-endian)."""
    value = number(text, 16)
    return None if value is None or not 0 <= value < 1 << 32 else str(ipaddress.IPv4Address(value.to_bytes(4, "little")))


def _colons(text: str) -> str:
    return ":".join(text[at : at + 4] for at in range(0, 32, 4))


def _towards(address: str, table: list[Route], machine: Machine) -> set[str]:
    """The interfaces that an address is reached by, or that have it."""
    text, _, scope = address.partition("%")
    try:
        parsed: _Address = ipaddress.ip_address(text)
    except ValueError:
        return set()
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    found = {scope} if scope else set()
    if isinstance(parsed, ipaddress.IPv6Address):
        for line in machine.text(machine.proc / "net/if_inet6").splitlines():
            fields = line.split()
            if len(fields) == 6 and fields[0] == parsed.exploded.replace(":", ""):
                found.add(fields[5])
    ways = [route for route in table if parsed.version == route.to.version and parsed in route.to]
    if ways:
        longest = max(route.to.prefixlen for route in ways)
        ways = [route for route in ways if route.to.prefixlen == longest]
        least = min(route.metric for route in ways)
        found |= {route.interface for route in ways if route.metric == least}
    return found


def _logins(machine: Machine, environment: Mapping[str, str]) -> Iterator[str]:
    """The two addresses of SSH_CONNECTION, from this process's environment or, as sudo takes it away, from that of the processes
    above it."""
    for value in (environment.get("SSH_CONNECTION", ""), *_inherited(machine)):
        fields = value.split()
        if len(fields) == 4:
            yield fields[0]
            yield fields[2]


def _inherited(machine: Machine) -> Iterator[str]:
    pid = "self"
    for _ in range(_GENERATIONS):
        for entry in machine.text(machine.proc / pid / "environ").split("\0"):
            name, _, value = entry.partition("=")
            if name == "SSH_CONNECTION":
                yield value
        parents = [
            line.split()[1:2] for line in machine.text(machine.proc / pid / "status").splitlines() if line.startswith("PPid:")
        ]
        if not parents or not parents[0] or not parents[0][0].isdecimal() or parents[0][0] == "0":
            return
        pid = parents[0][0]


def _disks(here: Path, machine: Machine) -> Iterator[str]:
    mine = {*interfaces_below(here, "block", machine), *_multipath(here, machine)}
    if not mine:
        return
    stacked = _with_holders(mine, machine)
    numbers = {machine.find(machine.sysfs / "class/block" / name / "dev").text: name for name in stacked}
    for device, source, point in mounts(machine):
        name = numbers.get(device) or (source if source in stacked else None)
        if name is not None:
            yield f"{name} is mounted at {point}"
    for line in machine.text(machine.proc / "swaps").splitlines()[1:]:
        name = _block_name(_plain(line.split(" ")[0].split("\t")[0]), machine)
        if name in stacked:
            yield f"{name} is swapped to"


def mounts(machine: Machine) -> Iterator[tuple[str, str, str]]:
    """Of each mount: "major:minor", the block device's name or what is mounted instead, where."""
    for line in machine.text(machine.proc / "self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        mount, source = fields.split(" "), rest.split(" ")
        if len(mount) >= 5 and len(source) >= 2:
            yield mount[2], _block_name(_plain(source[1]), machine), _plain(mount[4])


def _plain(text: str) -> str:
    """Blanks and backslashes are written in octal there."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), text)


def _block_name(source: str, machine: Machine) -> str:
    """ "sda1" of "/dev/sda1", "dm-0" of "/dev/mapper/root"."""
    if not source.startswith("/dev/") or "\0" in source:
        return source
    return real(machine.dev / source.removeprefix("/dev/")).name


def _with_holders(names: Iterable[str], machine: Machine) -> set[str]:
    """The disks and what is built on them: device-mapper, RAID."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        one = ahead.pop()
        if one not in found:
            found.add(one)
            ahead += machine.names(machine.sysfs / "class/block" / one / "holders")
    return found


def _multipath(here: Path, machine: Machine) -> set[str]:
    """NVMe disks of several paths lie below no device; their subsystem has a link to each controller."""
    found: set[str] = set()
    folder = machine.sysfs / "class/nvme-subsystem"
    for subsystem in machine.names(folder):
        entries = machine.names(folder / subsystem)
        if any(here in real(folder / subsystem / entry).parents for entry in entries):
            disks = {entry for entry in entries if re.fullmatch(r"nvme\d+n\d+", entry)}
            found |= disks | {
                part for disk in disks for part in machine.names(folder / subsystem / disk) if part.startswith(f"{disk}p")
            }
    return found
