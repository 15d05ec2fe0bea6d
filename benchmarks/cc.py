"""Compiles the C yardsticks of this folder, once for each content and machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.machine import BUILD, cpu_model
from vfio_vmbus.errors import UnavailableError

FLAGS = ("-O3", "-march=native", "-pthread", "-Wall", "-Wextra")


def compile_c(file: str) -> Path:
    """Compile a self-contained C file of benchmarks/ (`ring_lean.c`) and return the path of the program.

    Raises `UnavailableError` where the machine has no C compiler, and `RuntimeError` with the compiler's words
    where the file does not compile.
    """
    source = Path(__file__).with_name(file)
    cc = os.environ.get("CC", "cc")
    try:
        version = subprocess.run([cc, "--version"], capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"no C compiler ({cc}): install gcc or clang, or set CC ({error})") from error
    # -march=native makes the program this machine's, so the CPU belongs to the key of the cache too.
    key = hashlib.sha256(b"\0".join([source.read_bytes(), version, cpu_model().encode(), repr(FLAGS).encode()]))
    program = BUILD / f"{source.stem}-{key.hexdigest()[:16]}"
    if not program.exists():
        _compile([cc, *FLAGS], source, program)
    return program


def _compile(cc: list[str], source: Path, program: Path) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        made = Path(folder) / source.stem
        done = subprocess.run([*cc, "-o", str(made), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
        made.rename(program)  # whole or not at all, whoever else compiles it now
