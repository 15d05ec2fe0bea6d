"""`vfio-vmbus status`."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .card import JsonOption
from .output import print_json, print_table, printable

if TYPE_CHECKING:
    from ..bus.policy import UnsafeUse
    from ..control.client import Found
    from ..control.messages import Report

_SAMPLE_SECONDS = 0.5
"""Between the two looks that rates are made of."""
_NOBODY = "No process of vfio-vmbus runs here that this user may see."


def status(
    name: Annotated[str | None, typer.Argument(help="One process: its name or number (pid).", metavar="NAME")] = None,
    as_json: JsonOption = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Print counters and gauges in Prometheus' text format.")] = False,
) -> None:
    """Show what running processes of vfio-vmbus do.

    Each one's devices and their isolation, clients and what they hold, faults, and frames with rates; and everybody who was allowed
    something unsafe. Root sees all users' processes.

    Example: vfio-vmbus status --json
    """
    from ..bus.policy import unsafe_uses

    if as_json and metrics:
        raise UsageError("take --json or --metrics")
    found = _look(name)
    pids = {one.pid for one in found}
    uses = [use for use in unsafe_uses() if name is None or use.pid in pids]
    if metrics:
        from ..control.exposition import exposition

        print(exposition(found, uses), end="")
        return
    rates = _rates(found, _again(name, found))
    if as_json:
        print_json(_as_object(found, uses, rates))
    else:
        _print(found, uses, rates)


def _look(name: str | None) -> list[Found]:
    from ..control.client import process, processes

    return processes() if name is None else [process(name)]


def _again(name: str | None, found: list[Found]) -> list[Found]:
    """A moment later, where something is counted. A process that has ended meanwhile has no rates."""
    if not any(one.report and (one.report.devices or one.report.ports) for one in found):
        return []
    time.sleep(_SAMPLE_SECONDS)
    try:
        return _look(name)
    except UsageError:
        return []


Rates = dict[tuple[int, str, str], dict[str, float]]
"""Per second, by counter; of (pid, "device" or "port", its name)."""


def _rates(before: list[Found], after: list[Found]) -> Rates:
    rates: Rates = {}
    later = {one.pid: one.report for one in after if one.report is not None}
    for one in before:
        new = later.get(one.pid)
        if one.report is None or new is None or new.clock <= one.report.clock:
            continue
        seconds = (new.clock - one.report.clock) / 1e9
        now = _counted(new)
        for key, counters in _counted(one.report).items():
            rates[key] = {
                what: (now[key][what] - value) / seconds for what, value in counters.items() if what in now.get(key, {})
            }
    return rates


def _counted(report: Report) -> dict[tuple[int, str, str], dict[str, int]]:
    devices = {(report.pid, "device", device.name): device.counters for device in report.devices}
    return devices | {(report.pid, "port", port.name): port.counters for port in report.ports}


def _as_object(found: list[Found], uses: list[UnsafeUse], rates: Rates) -> dict[str, Any]:
    import msgspec

    processes = []
    for one in found:
        if one.report is None:
            processes.append({"name": one.name, "problem": one.problem})
            continue
        plain = msgspec.to_builtins(one.report)
        del plain["clock"]
        for what, key in (("device", "devices"), ("port", "ports")):
            for item in plain[key]:
                item["per_second"] = {name: round(rate, 1) for name, rate in rates.get((one.pid, what, item["name"]), {}).items()}
        processes.append(plain)
    return {"processes": processes, "unsafe_uses": [msgspec.to_builtins(use) for use in uses]}


def _print(found: list[Found], uses: list[UnsafeUse], rates: Rates) -> None:
    from ..bus.policy import MEANING

    for one in found:
        if one.report is None:
            print(f"{one.name}: {printable(one.problem or '')}")
        else:
            _print_process(one.report, rates)
    if not found:
        print(_NOBODY)
    for use in uses:
        print(f"UNSAFE: since {_when(use.since)} process {use.pid} is allowed {printable(use.what)}: {MEANING} (docs/unsafe.md)")


def _print_process(report: Report, rates: Rates) -> None:
    what = f"vfio-vmbus {printable(report.kind)} {printable(report.release)}"
    print(f"{report.name}: {what}, process {report.pid}, since {_when(report.since)}")
    for use in report.unsafe:
        print(f"UNSAFE: {printable(use.what)}")
    rows: list[tuple[Any, ...]] = [
        (
            printable(device.name),
            printable(device.kind),
            device.isolation.upper() if device.isolation == "unsafe" else device.isolation.value,
            device.mac or "-",
            "-" if device.mtu is None else device.mtu,
            "-" if device.link is None else "up" if device.link else "down",
            printable(device.client or "-"),
        )
        for device in report.devices
    ]
    print_table("", ("device", "class", "isolation", "mac", "mtu", "link", "client"), rows, right=(4,), narrow=6)
    reasons: dict[tuple[str, str], list[str]] = {}
    for device in report.devices:
        reasons.setdefault((device.isolation.value, device.why), []).append(device.name)
    for (level, why), names in reasons.items():
        print(f"{printable(', '.join(names))}: {level}: {printable(why)}")
    if report.clients:
        _print_clients(report)
    _print_frames(report, rates)


def _print_clients(report: Report) -> None:
    rows: list[tuple[Any, ...]] = [
        (
            printable(client.name),
            printable(client.version or "-"),
            client.channels,
            f"{client.gpadls} / {client.gpadl_bytes >> 10} KiB",
            f"{client.maps} / {client.mapped_bytes >> 10} KiB",
            client.faults,
            client.errors,
        )
        for client in report.clients
    ]
    heads = ("client", "VMBus", "channels", "GPADLs", "maps", "faults", "errors")
    print_table("", heads, rows, right=range(2, 7), narrow=0)
    for client in report.clients:
        if client.last_error is not None:
            cut = " (cut off)" if client.failed else ""
            print(f"{printable(client.name)}{cut}: last error: {printable(client.last_error)}")


_FRAMES = (("rx_frames", "tx_frames"), ("sent_frames", "received_frames"))
"""What a port and a card here, or a card that is driven, calls frames that come into the switch and that leave it; the same of bytes."""
_HEADS = ("", "frames in", "/s", "bytes in", "/s", "frames out", "/s", "bytes out", "/s", "lost")


def _print_frames(report: Report, rates: Rates) -> None:
    rows: list[list[Any]] = []
    for (pid, what, name), counters in _counted(report).items():
        way = next((pair for pair in _FRAMES if pair[0] in counters and pair[1] in counters), None)
        if way is None:
            continue
        row: list[Any] = [f"{what} {printable(name)}"]
        per_second = rates.get((pid, what, name), {})
        for counter in (kind.replace("frames", unit) for kind in way for unit in ("frames", "bytes")):
            row += [_rounded(counters.get(counter, 0)), _rounded(per_second[counter]) if counter in per_second else "-"]
        rows.append([*row, _rounded(sum(counters.get(reason, 0) for reason in _LOST))])
    if rows:
        print_table("", _HEADS, rows, right=range(1, len(_HEADS)))


_LOST = ("no_room", "too_long", "too_short", "spoofed", "no_buffer", "unplugged", "tx_failed", "tx_too_long")


def _rounded(value: float) -> str:
    """1830000 is "1.83 M"; --json has all digits."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} P"


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return "?"
