"""`vfio-vmbus demo`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .card import JsonOption, MtuOption
from .output import print_json, print_table, progress

if TYPE_CHECKING:
    from ..demo.run import Result


def demo(
    mtu: MtuOption = 1500,
    replay: Annotated[bool, typer.Option("--replay", help="Replay a capture, as where namespaces are forbidden.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Real traffic through an isolated VMBus card, then attacks.

    Needs no root: two network namespaces with a TAP each, one on the embedded host's switch, the other fed by the user-space
    driver. Ping, an HTTP download and TCP pass through them; then a second driver attacks the same host. Exit status 0 only
    if everything held.

    Example: vfio-vmbus demo --json
    """
    with progress("starting (the first start compiles the data path, some seconds)") as shown:
        from ..demo.run import run

        result = run(mtu, replay=replay, step=shown.step, detail=shown.say)
    if as_json:
        print_json(result.as_object())
    else:
        _print(result)
    if not result.held:
        raise typer.Exit(1)


def _print(result: Result) -> None:
    rows = [(check.name, check.value, "held" if check.held else "FAILED") for check in result.checks]
    print_table("Traffic of the kernel's TCP/IP stack through the card", ("what", "measured", ""), rows)
    attacks = [
        (item.name, item.answer, str(item.bytes_touched), "stopped" if item.stopped else "NOT STOPPED") for item in result.attacks
    ]
    title = "Attacks of a second driver on the same host"
    print_table(title, ("attack", "what the host noticed", "bytes touched", ""), attacks, right=(2,), narrow=1)
    nic = asdict(result.nic)
    print_table("The card", ("property", "value"), [(name.replace("_", " "), nic[name]) for name in nic])
    stopped = sum(item.stopped for item in result.attacks)
    verdict = "Everything held" if result.held else "NOT everything held"
    print(f"{verdict}: {stopped} of {len(result.attacks)} attacks stopped, {result.seconds:.1f} s.")
