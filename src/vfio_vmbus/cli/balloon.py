"""`vfio-vmbus balloon`: the balloon driver on a device."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from .card import JsonOption, SecondsOption
from .device import AnyDeviceArgument, UnsafeOption, opened_device
from .output import count, print_json, print_table, progress
from .stopping import stoppable

_PAGES_PER_MIB = 256


def balloon(
    device: AnyDeviceArgument = "embedded:balloon",
    limit: Annotated[int, typer.Option("--limit", help="MiB of this machine's memory that the host may get.", min=0)] = 0,
    unsafe: UnsafeOption = False,
    seconds: SecondsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drive a balloon: report memory pressure, and give the host what it asks for.

    What it gets is allocated for it, up to --limit; nothing else of the system's memory is given away, and memory that the host
    would add is refused. Have the host give everything back before this ends: on a real VMBus the pages that it still has are
    missing from then on.

    Example: vfio-vmbus balloon vmbus:GUID --limit 256 --enable-unsafe-noiommu-mode
    """
    from ..drivers.balloon.driver import Balloon

    with (
        progress("starting") as shown,
        stoppable() as stop,
        opened_device(device, unsafe=unsafe, command="balloon", default="balloon") as opened,
        Balloon(opened, limit=limit * _PAGES_PER_MIB) as driver,
    ):
        end = None if seconds is None else time.monotonic() + seconds
        while not stop.is_set() and (end is None or time.monotonic() < end):
            driver.serve(0.5 if end is None else min(0.5, max(0.0, end - time.monotonic())))
            shown.say(f"the host has {count(driver.info.pages)} pages; Ctrl-C ends")
        result = asdict(driver.info)
    if as_json:
        print_json(result)
    else:
        print_table("The balloon", ("what", "value"), [(name.replace("_", " "), value) for name, value in result.items()])
