"""`vfio-vmbus`: the commands, and what becomes of errors.

One line on stderr; exit status 2 for wrong use or a machine that cannot, 1 for the rest.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer

from .. import __version__
from ..errors import UnavailableError, UsageError, VfioVmbusError
from . import audit, balloon, binding, console, control, demo, doctor, listing, net, serve, status, vm
from .output import printable

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
_LONGEST = 1000
"""Letters of a complaint: what was typed is in it, however long."""


def main() -> None:
    """Run the command line, and exit."""
    _open_what_is_closed()
    warnings.showwarning = _warn
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()  # here, where it can be told that it fails
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
        _print_no_more()
        sys.exit(141)
    except OSError as error:  # as a full disk under stdout
        if "--debug" in sys.argv:
            raise
        _print_no_more()
        _complain(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None), 1)


def _open_what_is_closed() -> None:
    """Started with a standard stream closed, Python has None for it, and the next file that is opened would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (as long as the process)


def _print_no_more() -> None:
    """What is left in the buffer would fail again at the end, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Where in the sources it comes from is nothing to a user."""
    print(f"vfio-vmbus: {printable(str(message))}", file=sys.stderr)


def _complain(text: str, status: int) -> None:
    line = printable(text)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print(f"vfio-vmbus: {line}", file=sys.stderr)
    sys.exit(status)
