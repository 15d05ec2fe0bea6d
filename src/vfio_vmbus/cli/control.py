"""The control socket of a command that runs a host or drives a device; and `vfio-vmbus control`, which talks to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from ..control.messages import Command
    from ..control.server import Subject

app = typer.Typer(help="Change what a running process offers: cables, devices, MTU.", no_args_is_help=True, rich_markup_mode=None)

NameOption = Annotated[
    str | None,
    typer.Option("--name", help="What status and control know this process by; KIND-PID if not given.", metavar="NAME"),
]
NicArgument = Annotated[str, typer.Argument(help="A card, as status shows it.", metavar="NIC")]
DeviceArgument = Annotated[str, typer.Argument(help="A device, as status shows it.", metavar="DEVICE")]


@contextmanager
def controlled(kind: str, subject: Callable[[], Subject], name: str | None = None) -> Iterator[None]:
    """Let this process be seen by `status`, and be told things by `control`. Where that cannot be it is said, and all goes on without.

    Raises UsageError for a name that cannot be, or is taken.
    """
    from ..control.server import ControlServer

    with ExitStack() as stack:
        try:
            stack.enter_context(ControlServer(kind, subject(), name=name))
        except UnavailableError as error:
            print(f"vfio-vmbus: status and control will not find this process: {error}", file=sys.stderr, flush=True)
        yield


@app.callback()
def control(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The process: its name or number (pid), as status shows it.", metavar="NAME")],
) -> None:
    """Change what a running serve or vm offers.

    Its clients see what they would see on Hyper-V: a link that goes, a device that is taken away or comes.

    Example: vfio-vmbus control serve-4711 link nic0 down
    """
    context.obj = name


@app.command()
def link(
    context: typer.Context,
    nic: NicArgument,
    state: Annotated[str, typer.Argument(help="up or down.", metavar="up|down")],
) -> None:
    """Plug a card's virtual cable in or out.

    Example: vfio-vmbus control vm1 link nic0 down
    """
    from ..control.messages import Link

    if state not in ("up", "down"):
        raise UsageError(f"link {state}: take up or down")
    _order(context, Link(nic, state == "up"))


@app.command()
def rescind(
    context: typer.Context,
    device: DeviceArgument,
    at_once: Annotated[
        bool,
        typer.Option("--at-once", help="Without a warning; else a card's link goes down first, and its driver stops sending."),
    ] = False,
) -> None:
    """Take a device away from its client.

    As when it is removed from a running machine.

    Example: vfio-vmbus control vm1 rescind nic0
    """
    from ..control.messages import Rescind

    _order(context, Rescind(device, at_once))


@app.command()
def offer(
    context: typer.Context,
    device: DeviceArgument,
    client: Annotated[
        str | None, typer.Option("--client", help="Who is to have it, if there are several.", metavar="CLIENT")
    ] = None,
) -> None:
    """Give a device back, or add a card.

    A device that was rescinded goes to the client that had it. A name that is new is a new card, on the process's switch.

    Example: vfio-vmbus control vm1 offer nic1
    """
    from ..control.messages import Offer

    _order(context, Offer(device, client))


@app.command()
def mtu(
    context: typer.Context,
    nic: NicArgument,
    size: Annotated[int, typer.Argument(help="Bytes of an Ethernet payload, 68 to 9000.", metavar="BYTES")],
) -> None:
    """Limit a card's MTU.

    VMBus has no message for that: the card is rescinded and offered again, with the same instance and address. The client's driver
    chooses its own MTU, up to this.

    Example: vfio-vmbus control vm1 mtu nic0 1500
    """
    from ..control.messages import Mtu

    _order(context, Mtu(nic, size))


def _order(context: typer.Context, command: Command) -> None:
    from ..control.client import order
    from .output import printable

    print(printable(order(context.obj, command)))
