"""The command line, in the guest."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from vfio_vmbus.cli.main import main


def run(report: Callable[[Any], None], words: list[str]) -> dict[str, Any]:
    """Run `vfio-vmbus` with these words; its exit status and what it printed. What it says besides goes to the console."""
    sys.argv = ["vfio-vmbus", *words]
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), sys.stdout.fileno())
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush()
            printed.seek(0)
            return {"status": end.code or 0, "printed": printed.read().decode()}
    raise AssertionError("the command line did not exit")
