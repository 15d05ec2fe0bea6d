"""`vfio-vmbus list`."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .card import JsonOption, SecondsOption
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..bus.inventory import Item

_LOOK_AGAIN = 1.0
"""Seconds: some changes (a process that opens a device) have no uevent."""
_NO_VMBUS = "No VMBus on this machine (it is no Hyper-V guest, or has no hv_vmbus): the embedded host stands in for it."
_COUNTERS = ("interrupts", "signals", "read_bytes", "write_bytes", "out_masked", "in_masked")
"""Of a channel: they change all the time, and are no change of the device."""


def list_devices(
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and show every change; with --json a line for each.")] = False,
    seconds: SecondsOption = None,
) -> None:
    """List VMBus devices and their isolation.

    First what --device takes here, then VMBus devices, PCI devices in the hands of user space, served ones, and processes that
    use something unsafe. Isolation: isolated (by an IOMMU, the machine's or ours), no-DMA, unsafe (see docs/unsafe.md), or
    kernel (the kernel drives it).

    Example: vfio-vmbus list --watch
    """
    if watch or seconds is not None:
        _watch(as_json, seconds)
    elif as_json:
        print_json([_row(item) for item in _items()])
    else:
        _print(_items())


def _items() -> list[Item]:
    from ..bus.inventory import items

    return [_embedded(), *items()]


def _embedded() -> Item:
    """A card of the embedded host is made when it is driven, and so has no instance yet."""
    from ..bus.inventory import Item
    from ..bus.policy import Isolation

    why = "software IOMMU: it is made when it is driven, in the same process"
    return Item("embedded:nic0", "network", None, None, (), Isolation.ISOLATED, why)


def _row(item: Item) -> dict[str, Any]:
    row: dict[str, Any] = {
        "device": item.device,
        "class": item.kind,
        "instance": item.instance,
        "driver": item.driver,
        "shows": item.shows,
        "isolation": item.isolation,
        "why": item.why,
        "nodes": item.nodes,
        "problems": item.problems,
    }
    return row | {name: value for name, value in item.details.items() if name not in row}


def _print(found: list[Item]) -> None:
    from ..bus import vmbus
    from ..bus.machine import Machine
    from ..bus.policy import Isolation

    columns = ("device", "class", "driver", "shows", "chan", "rings KiB", "monitor", "isolation")
    rows = [_cells(item) for item in found]
    said = [index for index, cells in enumerate(zip(*rows, strict=True)) if set(cells) != {"-"}]
    print_table("", [columns[index] for index in said], [[row[index] for index in said] for row in rows])
    for item in found:
        if item.isolation not in (None, Isolation.KERNEL):
            print(f"{item.device}: {item.isolation}: {item.why}")
        for name, problem in item.problems.items():
            print(f"{item.device}: {name}: {problem}")
    if not vmbus.present(Machine()):
        print(_NO_VMBUS)


def _cells(item: Item) -> list[str]:
    details = item.details
    channels = details.get("channels")
    rings = (details.get("ring_out"), details.get("ring_in"))
    monitor = details.get("monitor")
    return [
        item.device.removeprefix("vmbus:").removeprefix("pci:"),
        item.kind,
        item.driver or "-",
        " ".join(item.shows) or "-",
        "-" if channels is None else str(len(channels) or "-"),
        "/".join("-" if size is None else str(size // 1024) for size in rings) if any(rings) else "-",
        "-" if channels is None else "no" if monitor is None else str(monitor),
        item.isolation or "-",
    ]


def _watch(as_json: bool, seconds: float | None) -> None:
    shown: dict[str, Any] = {}
    first = True
    for found in _changing(seconds):
        rows = {item.device: _steady(_row(item)) for item in found}
        if rows == shown and not first:
            continue
        if as_json:
            _print_changes(shown, rows, first)
        else:
            if sys.stdout.isatty():
                print("\x1b[H\x1b[J", end="")
            _print(found)
        sys.stdout.flush()
        shown, first = rows, False


def _changing(seconds: float | None) -> Iterator[list[Item]]:
    """What is there, again and again, until `seconds` are over."""
    from ..bus.uevents import Uevents

    end = None if seconds is None else time.monotonic() + seconds
    with Uevents() as uevents:
        while True:
            yield _items()
            left = _LOOK_AGAIN if end is None else min(_LOOK_AGAIN, end - time.monotonic())
            if left <= 0 or _nobody_reads():
                return
            uevents.wait(left)


def _nobody_reads() -> bool:
    """Has the other end of the pipe or terminal gone? Without a change nothing is printed, which would tell."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return bool(poller.poll(0))


def _steady(row: dict[str, Any]) -> dict[str, Any]:
    channels = row.get("channels")
    if channels is None:
        return row
    return row | {"channels": [{name: value for name, value in one.items() if name not in _COUNTERS} for one in channels]}


def _print_changes(before: dict[str, Any], after: dict[str, Any], first: bool) -> None:
    import msgspec

    for device in [*after, *(name for name in before if name not in after)]:
        if device not in after:
            change = {"event": "removed", **before[device]}
        elif device not in before:
            change = {"event": "present" if first else "added", **after[device]}
        elif before[device] != after[device]:
            change = {"event": "changed", **after[device]}
        else:
            continue
        print(msgspec.json.encode({"time": round(time.time(), 3), **change}).decode())
