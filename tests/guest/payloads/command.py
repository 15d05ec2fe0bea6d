"""The command line, in the guest."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from vfio_vmbus.cli.main import main


def run(report: Callable[[Any], None], words: list[str]) -> dict[str, Any]:
    """Run `vfio-vmbus` with these words; its exit status, what it printed, and what it complained of (which goes to the console, too)."""
    sys.argv = ["vfio-vmbus", *words]
    console = os.dup(sys.stderr.fileno())
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complained:
        os.dup2(printed.fileno(), sys.stdout.fileno())
        os.dup2(complained.fileno(), sys.stderr.fileno())
        try:
            main()
        except SystemExit as end:
            texts = []
            for stream, file in ((sys.stdout, printed), (sys.stderr, complained)):
                stream.flush()
                file.seek(0)
                texts.append(file.read().decode())
            os.write(console, texts[1].encode())
            return {"status": end.code or 0, "printed": texts[0], "complained": texts[1]}
    raise AssertionError("the command line did not exit")
