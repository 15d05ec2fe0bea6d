"""`cli/help`: how long a user waits for `vfio-vmbus --help`; the yardstick is a Python that does nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Bar, Figures, Run, bench


def _seconds(*command: str) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    elapsed = time.perf_counter() - begin
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["no word"]
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {words[-1]}")
    return elapsed


@bench("cli/help", unit="s", bar=Bar("value", at_most=0.3))
def cli_help(run: Run) -> Figures:
    command = str(Path(sys.executable).with_name("vfio-vmbus"))
    _seconds(command, "--help")  # once unmeasured: byte code is compiled and files are in the page cache
    samplers = {
        "ours": lambda: _seconds(command, "--help"),
        "yardstick": lambda: _seconds(sys.executable, "-c", "pass"),
    }
    return run.measure_in_turn(samplers).figures()
