"""Debian packages of the machine's own release to compare with: they run on its C library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tools.debian import Apt, kept
from vfio_vmbus.errors import UnavailableError

# What a program needs to run, of all that its packages name: libraries and the providers that those load.
# The C library and the compiler's are the system's, and what is for building or reading stays away.
_WANTED = re.compile(r"^(lib|ibverbs-providers$)")
_LEFT_OUT = re.compile(r"(-dev|-doc|-perl)$|^libc6$|^libgcc-s1$|^libcrypt1$")


def unpacked(patterns: Sequence[str], folder: Path) -> Path:
    """Packages, and the libraries they depend on, unpacked under `folder`; fetched once and kept there.

    `patterns` are regular expressions of whole package names (a release number is often part of one). The
    packages come from the apt sources of the machine; where apt has no lists yet, or stale ones, lists of
    our own are fetched first. Raises `UnavailableError` with the reason.
    """

    def fetch(work: Path) -> None:
        try:
            _download(Apt(), patterns, work)
        except UnavailableError:
            _download(Apt.own_lists(work / "apt"), patterns, work)

    return kept(folder, patterns[0], fetch)


def _download(apt: Apt, patterns: Sequence[str], work: Path) -> None:
    apt.get("download", *_closure(apt, apt.matching(patterns)), cwd=work)


def _closure(apt: Apt, names: set[str]) -> list[str]:
    found: set[str] = set()
    while names:
        found |= names
        text = apt.cache("depends", "--important", *sorted(names))
        needed = re.findall(r"^ [ |](?:Pre)?Depends: ([a-z0-9][a-z0-9+.-]*)$", text, re.MULTILINE)
        names = {name for name in needed if _WANTED.search(name) and not _LEFT_OUT.search(name)} - found
    return sorted(found)
