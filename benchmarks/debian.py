"""Debian packages unpacked into a folder: programs to compare with, nothing installed, no root needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from vfio_vmbus.errors import UnavailableError

# What a program needs to run, of all that its packages name: libraries and the providers that those load.
# The C library and the compiler's are the system's, and what is for building or reading stays away.
_WANTED = re.compile(r"^(lib|ibverbs-providers$)")
_LEFT_OUT = re.compile(r"(-dev|-doc|-perl)$|^libc6$|^libgcc-s1$|^libcrypt1$")
_MINUTES = 5 * 60.0


def unpacked(patterns: Sequence[str], folder: Path) -> Path:
    """Packages, and the libraries they depend on, unpacked under `folder`; fetched once and kept there.

    `patterns` are regular expressions of whole package names (a release number is often part of one). The
    packages come from the apt sources of the machine; where apt has no lists yet, or stale ones, lists of
    our own are fetched first. Raises `UnavailableError` with the reason.
    """
    root = folder / "root"
    if root.is_dir():
        return root
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} is not here: this needs Debian or one of its kin")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {patterns[0]} and what it needs into {folder} (once)", file=sys.stderr, flush=True)
    try:
        _unpack(patterns, root, options=[])
    except UnavailableError:
        with tempfile.TemporaryDirectory(dir=folder) as lists:
            _unpack(patterns, root, _own_lists(Path(lists)))
    return root


def _unpack(patterns: Sequence[str], root: Path, options: Sequence[str]) -> None:
    names = _closure(_matching(patterns, options), options)
    with tempfile.TemporaryDirectory(dir=root.parent) as work:
        made = Path(work) / "root"
        made.mkdir()
        _run(["apt-get", *options, "download", *names], cwd=work)
        for package in sorted(Path(work).glob("*.deb")):
            _run(["dpkg", "-x", str(package), str(made)])
        versions = sorted(package.stem for package in Path(work).glob("*.deb"))
        (made / "packages.txt").write_text("\n".join(versions) + "\n")
        made.rename(root)  # whole or not at all


def _own_lists(apt: Path) -> list[str]:
    """Fetch package lists into a folder, and return the apt options that use them."""
    (apt / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (apt / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State": str(apt / "state"),
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": str(apt / "cache"),
        "APT::Sandbox::User": "",  # the folder need not be readable to apt's own user
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "20",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _run(["apt-get", *options, "update"])
    return options


def _matching(patterns: Iterable[str], options: Sequence[str]) -> set[str]:
    names: set[str] = set()
    known = _run(["apt-cache", *options, "pkgnames"]).split()
    for pattern in patterns:
        found = {name for name in known if re.fullmatch(pattern, name)}
        if not found:
            raise UnavailableError(f"apt has no package {pattern}: not in its sources, or these are out of reach")
        names |= found
    return names


def _closure(names: set[str], options: Sequence[str]) -> list[str]:
    found: set[str] = set()
    while names:
        found |= names
        text = _run(["apt-cache", *options, "depends", "--important", *sorted(names)])
        needed = re.findall(r"^ [ |](?:Pre)?Depends: ([a-z0-9][a-z0-9+.-]*)$", text, re.MULTILINE)
        names = {name for name in needed if _WANTED.search(name) and not _LEFT_OUT.search(name)} - found
    return sorted(found)


def _run(command: list[str], cwd: str | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_MINUTES,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{command[0]} took more than {_MINUTES:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["no reason given"]
        raise UnavailableError(f"{command[0]} failed: {lines[-1]}")
    return done.stdout
