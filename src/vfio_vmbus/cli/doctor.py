"""`vfio-vmbus doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .card import JsonOption
from .output import print_json


def doctor(
    device: Annotated[
        str | None,
        typer.Argument(
            help="To be driven: GUID, VMBus device, interface, disk, uioN or PCI address; none: the embedded host.",
            metavar="DEVICE",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is missing to drive a device.

    Each line: how it is, what was found, why it matters, and the command that mends it. Exit status 0 if nothing is missing, else 1.

    Example: vfio-vmbus doctor eth1
    """
    from ..bus.doctor import State, examine

    checks = examine(device)
    missing = [check.what for check in checks if check.state is State.MISSING]
    if as_json:
        print_json({"device": device, "missing": missing, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.what) for check in checks)
        for check in checks:
            print(f"{check.state:<7} {check.what:<{width}}  {check.found}: {check.why}")
            if check.mend:
                print(f"{'':<7} {'':<{width}}  -> {check.mend}")
        print(f"Missing: {', '.join(missing)}." if missing else "Nothing is missing.")
    if missing:
        raise typer.Exit(1)
