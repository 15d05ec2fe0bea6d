"""`vfio-vmbus serve`: devices for other processes, by vfio-user."""

from __future__ import annotations

import json
import resource
import time
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .card import MtuOption, PollOption, PortOption, SecondsOption, add_port, check_ports
from .control import NameOption, controlled
from .faults import FAULT_HEADS, FaultOption, FaultSeedOption, HostileOption, fault_plan, fault_rows
from .output import print_table, progress
from .stopping import on_stop

if TYPE_CHECKING:
    from ..vfio.user.server import ServerEvent

_STOP = None
"""What signals put into the queue of events."""
_MOST_EVENTS = 1024
"""Events that wait to be printed; whoever reads them too slowly misses some, and holds up no client."""


def serve(
    device: Annotated[
        list[str] | None,
        typer.Argument(help="What to serve: embedded:NAME, a card of a VMBus host in this process.", metavar="DEVICE"),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", "--socket-path", help="Socket for the clients of a device (repeat for more).", metavar="PATH"),
    ] = None,
    fd: Annotated[
        list[int] | None,
        typer.Option("--fd", help="The same: an inherited socket, listening or connected.", metavar="N", min=0),
    ] = None,
    personality: Annotated[
        str,
        typer.Option(help="How a device looks: pci, or vmbus (rings and buffers opened by this process, shown as regions)."),
    ] = "pci",
    port: PortOption = None,
    mtu: MtuOption = 9000,
    poll: PollOption = "adaptive",
    allow_uid: Annotated[
        list[int] | None, typer.Option("--allow-uid", help="A user whose processes may be clients, too.", metavar="UID", min=0)
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="Of the sockets, octal.", metavar="MODE")] = "0600",
    max_maps: Annotated[int, typer.Option("--max-maps", help="DMA maps of a client.", min=1)] = 65535,
    max_bytes: Annotated[int, typer.Option("--max-bytes", help="Bytes that a client may map.", min=4096)] = 1 << 40,
    max_fds: Annotated[int, typer.Option("--max-fds", help="Descriptors in a message.", min=1, max=16)] = 16,
    max_message: Annotated[int, typer.Option("--max-message", help="Bytes of data in a message.", min=4096, max=64 << 20)] = 1
    << 20,
    max_requests: Annotated[float, typer.Option("--max-requests", help="Requests a second of a client.", min=1)] = 100_000,
    fault: FaultOption = None,
    fault_seed: FaultSeedOption = 0,
    hostile: HostileOption = False,
    process_name: NameOption = None,
    seconds: SecondsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a JSON object on a line.")] = False,
) -> None:
    """Serve devices to other processes, by vfio-user.

    The first DEVICE at the first --listen, and so on, then those of --fd; without DEVICE a card each. A device has one client
    at a time, of this user, of root, or of --allow-uid; when it goes the device is reset, and free for the next one.

    Example: vfio-vmbus serve --listen /run/user/1000/nic0.sock --port tap:vm0
    """
    places: list[str | int] = [*(listen or []), *(fd or [])]
    names = _names(device, len(places))
    check_ports(port or [])
    if any(text.startswith("replay:") for text in port or []):
        raise UsageError("--port replay: it would be over before a client is there")
    permissions = _octal(mode)
    _check_personality(personality)
    faults = fault_plan(fault, hostile, fault_seed)
    _raise_descriptor_limit()
    events: SimpleQueue[ServerEvent | None] = SimpleQueue()
    with ExitStack() as stack:
        stack.enter_context(on_stop(lambda: events.put(_STOP)))
        with progress("starting (the first start compiles the data path, some seconds)"):
            from ..control.hosting import HostSubject
            from ..host.embedded import EmbeddedHost
            from ..host.serving import HostServer
            from ..vfio.user.connection import ServerLimits

            host = stack.enter_context(EmbeddedHost(poll=poll, faults=faults))
            cards = {name: host.add_nic(name, max_mtu=mtu) for name in names}
            for text in port or []:
                add_port(host, text, stack, mtu=mtu, mac=cards[names[0]].mac)
            limits = ServerLimits(max_data=max_message, max_fds=max_fds, max_requests=max_requests)
            server = stack.enter_context(
                HostServer(
                    host,
                    limits=limits,
                    allow_uids=allow_uid or [],
                    events=lambda event: events.put(event) if events.qsize() < _MOST_EVENTS else None,
                    max_maps=max_maps,
                    max_bytes=max_bytes,
                )
            )
            for name, place in zip(names, places, strict=True):
                if isinstance(place, int):
                    server.adopt(place, cards[name], personality=personality)
                else:
                    server.listen(place, cards[name], mode=permissions, personality=personality)
            stack.enter_context(controlled("serve", lambda: HostSubject(host, max_mtu=mtu), process_name))
        if not as_json:
            print(_ready(names, places), flush=True)
        _watch(events, seconds, as_json, lambda: server.idle)
        if faults:
            _tell_faults(fault_rows(host), as_json)


def _names(devices: list[str] | None, places: int) -> list[str]:
    """The card for each place."""
    if not places:
        raise UsageError("say where: --listen PATH or --fd N")
    if devices is None or not devices:
        return [f"nic{number}" for number in range(places)]
    if len(devices) != places:
        raise UsageError(f"{len(devices)} devices for {places} sockets: each device needs a --listen or --fd of its own")
    names = []
    for device in devices:
        kind, _, name = device.partition(":")
        if kind != "embedded":
            raise UsageError(f"{device}: take embedded:NAME")
        names.append(name or "nic0")
    if len(set(names)) != len(names):
        raise UsageError("the same device twice: each has one client at a time")
    return names


def _check_personality(personality: str) -> None:
    if personality not in ("pci", "vmbus"):
        raise UsageError(f"--personality {personality}: take pci or vmbus")


def _octal(mode: str) -> int:
    if not mode or set(mode) - set("01234567") or int(mode, 8) > 0o777:
        raise UsageError(f"--mode {mode}: take an octal number up to 777, such as 0660")
    return int(mode, 8)


def _ready(names: list[str], places: list[str | int]) -> str:
    shown = (f"descriptor {place}" if isinstance(place, int) else place for place in places)
    return "serving " + ", ".join(f"embedded:{name} at {place}" for name, place in zip(names, shown, strict=True))


def _raise_descriptor_limit() -> None:
    """A client costs up to some 1400 descriptors: its files, vectors and doorbells."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _watch(events: SimpleQueue[ServerEvent | None], seconds: float | None, as_json: bool, idle: Any) -> None:
    """Until stopped, `seconds` are over, or there is nobody to be served any more."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        try:
            event = events.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except Empty:
            break
        if event is _STOP:
            break
        if as_json:
            print(json.dumps(_as_object(event)), flush=True)
        elif event.kind != "listening":
            print(_as_line(event), flush=True)
        if event.kind == "detached" and idle():
            break


def _tell_faults(faults: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "faults", "faults": faults}), flush=True)
    else:
        print_table("Faults", FAULT_HEADS, [list(row.values()) for row in faults], right=(3, 4))


def _as_line(event: ServerEvent) -> str:
    who = f"process {event.peer.pid} of user {event.peer.uid}" if event.peer else "somebody"
    if event.kind == "attached":
        return f"{event.place}: {who} has the device"
    what = "has gone" if event.kind == "detached" else "was turned away"
    faults = f"; it reached for memory that it had not mapped: {event.faults} times" if event.faults else ""
    return f"{event.place}: {who} {what} ({event.reason}){faults}"


def _as_object(event: ServerEvent) -> dict[str, Any]:
    told: dict[str, Any] = {"event": event.kind, "at": event.place}
    if event.peer is not None:
        told |= {"pid": event.peer.pid, "uid": event.peer.uid}
    if event.reason:
        told["reason"] = event.reason
    if event.kind == "detached":
        told["faults"] = event.faults
    return told
