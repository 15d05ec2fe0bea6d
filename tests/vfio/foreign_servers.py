"""libvfio-user's sample servers, to be talked to: built here from a copy of its sources, if there is one.

Its sources are no Debian package. Whoever has them puts them (the tree with lib, include and samples) in .cache/libvfio-user of this
project; what is built is kept beside it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from benchmarks.debian import unpacked
from benchmarks.machine import CACHE
from vfio_vmbus.errors import UnavailableError

SOURCES = CACHE / "libvfio-user"
BUILT = CACHE / "libvfio-user-built"
MODULES = ("btree", "dma", "fd_cache", "irq", "libvfio-user", "migration", "pci", "pci_caps", "tran", "tran_sock")

CHANGES = {
    # Its second BAR has a size that the library has refused for some time, so the sample does not even start.
    "server": ("0x3000", "0x4000"),
    # The descriptor of shared memory is only for clients that know a draft of the protocol.
    "shadow_ioeventfd_server": ("bar0_fd, 0);", "-1, 0);"),
    "gpio-pci-idio-16": ("", ""),
}
"""The samples, and what has to be different in them."""

PATIENCE = 30.0


@cache
def reason() -> str:
    """Why the servers are not to be had; "" if they are."""
    try:
        _build()
    except UnavailableError as error:
        return str(error)
    return ""


@contextmanager
def foreign_server(name: str) -> Iterator[Path]:
    """Where a sample listens. It is killed in the end: some do not end otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        with subprocess.Popen([str(BUILT / name), str(path)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + PATIENCE
                while not _listens(path):
                    assert process.poll() is None, f"{name} ended with status {process.returncode}"
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                yield path
            finally:
                process.kill()


def _listens(path: Path) -> bool:
    """A look that is no connection: these servers serve one, and some end with it."""
    listening = "00010000"  # the flag of a listening socket in the kernel's table
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(len(row) > 7 and row[7] == str(path) and row[3] == listening for row in rows)


def _build() -> None:
    if all((BUILT / name).exists() for name in CHANGES):
        return
    if not (SOURCES / "lib" / "libvfio-user.c").exists():
        raise UnavailableError(f"no sources of libvfio-user in {SOURCES.relative_to(CACHE.parent)}")
    if shutil.which("cc") is None:
        raise UnavailableError("no C compiler (cc)")
    json = unpacked(["libjson-c-dev"], CACHE / "json-c")
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT) as work:
        for name, (old, new) in CHANGES.items():
            source = Path(work) / f"{name}.c"
            source.write_text((SOURCES / "samples" / f"{name}.c").read_text().replace(old, new))
            _compile(source, json, Path(work) / name)
            (Path(work) / name).rename(BUILT / name)


def _compile(source: Path, json: Path, program: Path) -> None:
    includes = [SOURCES / "include", SOURCES / "lib", SOURCES / "samples", json / "usr/include", json / "usr/include/json-c"]
    archive = next(iter((json / "usr/lib").glob("*/libjson-c.a")), None)
    if archive is None:
        raise UnavailableError("Debian's libjson-c-dev has no libjson-c.a")
    command = [
        "cc",
        "-O1",
        "-w",
        "-D_GNU_SOURCE",
        "-DNDEBUG",
        *(f"-I{folder}" for folder in includes),
        "-o",
        str(program),
        str(source),
    ]
    modules = [str(SOURCES / "lib" / f"{module}.c") for module in MODULES]
    done = subprocess.run([*command, *modules, str(archive), "-pthread"], capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"{source.name} does not compile here: {(done.stderr.splitlines() or ['no word'])[0]}")
