"""The cache of compiled kernels that the guest takes along: made outside of it, as it would be made inside.

Kernels are compiled for any x86-64 CPU (`CPU`, here and in the guest), as software emulation is slow at compiling and has another
CPU than the machine; sources, Numba and Python are the same on both sides, by which the cache knows its kernels.
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from pathlib import Path

from .process import SOURCES

CPU = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


def compiled(folder: Path) -> Path:
    """`folder` as the XDG_CACHE_HOME of a process that found everything in it; what is not there is compiled now."""
    folder.mkdir(parents=True, exist_ok=True)
    compileall.compile_dir(SOURCES["PYTHONPATH"], quiet=2)  # Python's own compilation, for a guest that cannot write it
    environment = {**os.environ, **SOURCES, "XDG_CACHE_HOME": str(folder), **CPU}
    subprocess.run([sys.executable, str(Path(__file__).with_name("compile_kernels.py"))], check=True, env=environment)
    return folder
