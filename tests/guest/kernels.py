"""The cache of compiled kernels that the guest takes along: made outside of it, for any x86-64 CPU, as it would be made inside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .run import environment

_EVERYTHING = """
import threading
from vfio_vmbus.apps.measure import measure
"""


def compiled(folder: Path) -> Path:
    """The folder (for XDG_CACHE_HOME) with the kernels that netvsc and the applications compile, compiled if they are not."""
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("compile_kernels.py")
    subprocess.run([sys.executable, str(script)], check=True, env={**environment(), "XDG_CACHE_HOME": str(folder)})
    return folder
