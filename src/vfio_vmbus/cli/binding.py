"""`vfio-vmbus bind` and `unbind`: which driver has a PCI device."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .card import JsonOption
from .output import print_json

AddressArgument = Annotated[str, typer.Argument(help="The device: 0000:00:04.0, or 00:04.0.", metavar="ADDRESS")]


def bind(
    address: AddressArgument,
    driver: Annotated[str, typer.Option("--driver", help="Who is to have it.", metavar="NAME")] = "vfio-pci",
    as_json: JsonOption = False,
) -> None:
    """Give a PCI device to vfio-pci.

    Its driver is unbound first. What it had is remembered, for unbind.

    Example: vfio-vmbus bind 0000:00:04.0
    """
    from ..bus import binding

    _say(binding.bind(address, driver), as_json, after=True)


def unbind(address: AddressArgument, as_json: JsonOption = False) -> None:
    """Give a PCI device back to the driver that it had before bind.

    Example: vfio-vmbus unbind 0000:00:04.0
    """
    from ..bus import binding

    _say(binding.unbind(address), as_json, after=False)


def _say(made: Any, as_json: bool, *, after: bool) -> None:
    before, now = made.driver_before, made.driver
    if not after:
        before, now = now, before
    if as_json:
        print_json({"address": made.address, "driver": now, "before": before})
    else:
        print(f"{made.address}: {now or 'no driver'} (before: {before or 'none'})")
