"""`vfio-vmbus`: the commands, and what becomes of errors.

One line on stderr; exit status 2 for wrong use or a machine that cannot, 1 for the rest.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import UnavailableError, UsageError, VfioVmbusError
from . import demo, listing, net

app = typer.Typer(
    name="vfio-vmbus",
    help="VMBus devices in user space through the VFIO API, isolated; with an embedded VMBus host.",
    epilog="Try first: vfio-vmbus demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("demo")(demo.demo)
app.command("list")(listing.list_devices)
app.add_typer(net.app, name="net")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vfio-vmbus {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Log what happens, and show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Say the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("vfio_vmbus").setLevel(logging.DEBUG if debug else logging.ERROR)


def main() -> None:
    """Run the command line, and exit."""
    try:
        app()
    except VfioVmbusError as error:
        if "--debug" in sys.argv:
            raise
        print(f"vfio-vmbus: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError | UnavailableError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has had enough: nothing to complain about
        sys.exit(141)
