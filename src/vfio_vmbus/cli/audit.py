"""`vfio-vmbus audit`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from .card import JsonOption
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..bus.audit import Audit


def audit(as_json: JsonOption = False) -> None:
    """Say what on this machine is unsafe.

    Every device that user space drives, who has it open, its isolation and why; the kernel's taint; settings that weaken isolation; what
    to do. Exit status 1 if something unsafe was found. Run as root to see all of it: what could not be seen is said.

    Example: vfio-vmbus audit --json
    """
    from ..bus.audit import audit as look

    found = look()
    if as_json:
        print_json(_as_object(found))
    else:
        _print(found)
    if found.unsafe:
        raise typer.Exit(1)


def _as_object(found: Audit) -> dict[str, Any]:
    return {
        "unsafe": found.unsafe,
        "devices": [
            {
                "device": one.item.device,
                "class": one.item.kind,
                "driver": one.item.driver,
                "isolation": one.item.isolation,
                "why": one.item.why,
                "nodes": one.item.nodes,
                "holders": [asdict(holder) for holder in one.holders],
                "advice": one.advice,
            }
            for one in found.findings
        ],
        "unsafe_uses": [{**asdict(use), "command": command} for use, command in found.uses],
        "weaknesses": [asdict(weakness) for weakness in found.weaknesses],
        "taint": asdict(found.taint),
        "unseen": found.unseen,
    }


def _print(found: Audit) -> None:
    rows = [
        (
            one.item.device,
            one.item.kind,
            one.item.driver or "-",
            str(one.item.isolation),
            "; ".join(f"{holder.pid} {holder.user} {holder.command}" for holder in one.holders) or "nobody seen",
        )
        for one in found.findings
    ]
    if rows:
        print_table("Devices that user space drives", ("device", "class", "driver", "isolation", "open in"), rows, narrow=4)
    else:
        print("No device of this machine is driven by user space.")
    for use, command in found.uses:
        print(f"since {_when(use.since)}: process {use.pid} ({command or '?'}) was allowed {use.what}")
    for weakness in found.weaknesses:
        print(
            f"{'UNSAFE' if weakness.unsafe else 'weak'}: {weakness.where}: {weakness.value}: {weakness.why}. To mend: {weakness.advice}"
        )
    taint = found.taint
    since = f"; U since {_when(taint.since)}: {taint.said}" if taint.since is not None else ""
    print(f"Kernel taint: {taint.value}{' ' if taint.bits else ''}{', '.join(taint.bits)}{since}")
    for one in found.findings:
        if one.advice:
            print(f"UNSAFE: {one.item.device}: {one.item.why}. To mend: {one.advice}")
    for what in found.unseen:
        print(f"not seen: {what}")
    print(f"{len(found.unsafe)} unsafe things found (docs/unsafe.md)" if found.unsafe else "Nothing unsafe found.")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
