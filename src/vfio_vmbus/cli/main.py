"""`vfio-vmbus`: the commands, and what becomes of errors.

One line on stderr; exit status 2 for wrong use or a machine that cannot, 1 for the rest.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import UnavailableError, UsageError, VfioVmbusError
from . import audit, balloon, binding, console, control, demo, doctor, listing, net, serve, status, vm

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
app.command("serve")(serve.serve)
app.command("vm")(vm.vm)
app.command("status")(status.status)
app.command("console")(console.console)
app.command("balloon")(balloon.balloon)
app.command("bind")(binding.bind)
app.command("unbind")(binding.unbind)
app.command("audit")(audit.audit)
app.command("doctor")(doctor.doctor)
app.add_typer(net.app, name="net")
app.add_typer(control.app, name="control")


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


_WrongUse: Any = typer.BadParameter.__base__
"""click's UsageError, wherever this version of typer keeps it."""


def main() -> None:
    """Run the command line, and exit."""
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except _WrongUse as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help page
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        where = error.ctx.command_path if error.ctx else "vfio-vmbus"
        _complain(f"{' '.join(error.format_message().rstrip('.').split())} (see {where} --help)", 2)
    except VfioVmbusError as error:
        if "--debug" in sys.argv:
            raise
        _complain(str(error), 2 if isinstance(error, UsageError | UnavailableError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted", 130)
    except BrokenPipeError:  # whoever read has had enough: nothing to complain about
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _complain(text: str, status: int) -> None:
    print(f"vfio-vmbus: {text}", file=sys.stderr)
    sys.exit(status)
