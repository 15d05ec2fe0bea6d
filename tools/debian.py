"""Debian packages unpacked into a folder: programs to test with and compare with, nothing installed, no root needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vfio_vmbus.errors import UnavailableError

_MINUTES = 5 * 60.0
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def kept(folder: Path, what: str, fetch: Callable[[Path], None], build: Callable[[Path], None] | None = None) -> Path:
    """`folder`/root with packages unpacked in it, made once and kept: later runs need no network.

    fetch: puts .deb files into the folder that it is called with. build: makes of the unpacked packages what is to be kept. Raises
    `UnavailableError` with the reason, here or from `fetch`, what `build` raises, and leaves nothing half made.
    """
    root = folder / "root"
    if root.is_dir():
        return root
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} is not here: this needs Debian or one of its kin")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {what} and what it needs into {folder} (once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        fetch(Path(work))
        made = Path(work) / "root"
        made.mkdir()
        packages = sorted(Path(work).rglob("*.deb"))
        for package in packages:
            run(["dpkg", "-x", str(package), str(made)])
        (made / "packages.txt").write_text("".join(f"{package.stem}\n" for package in packages))
        if build is not None:
            build(made)
        made.rename(root)  # whole or not at all
    return root


class Apt:
    """apt's commands with options of our own. Raises `UnavailableError` with apt's reason."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._options = list(options)

    @classmethod
    def own_lists(cls, folder: Path, settings: dict[str, str] | None = None) -> Apt:
        """apt with package lists in `folder`, fetched now, and further settings: the system's own lists stay as they are."""
        (folder / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        all_settings = {
            "Dir::State": str(folder / "state"),
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": str(folder / "cache"),
            "APT::Sandbox::User": "",  # the folder need not be readable to apt's own user
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "1",
            "Acquire::http::Timeout": "20",
            **(settings or {}),
        }
        apt = cls([word for key, value in all_settings.items() for word in ("-o", f"{key}={value}")])
        apt.get("update")
        return apt

    @classmethod
    def release(cls, folder: Path, suites: Iterable[str]) -> Apt:
        """apt that knows these suites of Debian alone, from the mirror that this machine uses, and takes nothing for installed.

        What it is asked to install comes with all that it depends on, so that it runs by its own libraries on any release.
        """
        if not _KEYRING.is_file():
            raise UnavailableError(f"{_KEYRING} is not here: packages could not be trusted (package debian-archive-keyring)")
        where = mirror()
        folder.mkdir(parents=True, exist_ok=True)
        sources = folder / "sources.list"
        sources.write_text("".join(f"deb [signed-by={_KEYRING}] {where} {suite} main\n" for suite in suites))
        status = folder / "status"
        status.touch()
        settings = {"Dir::State::status": str(status), "Dir::Etc::SourceList": str(sources), "Dir::Etc::SourceParts": "/dev/null"}
        return cls.own_lists(folder, settings)

    def get(self, *words: str, cwd: Path | None = None) -> str:
        return run(["apt-get", *self._options, *words], cwd)

    def cache(self, *words: str) -> str:
        return run(["apt-cache", *self._options, *words])

    def matching(self, patterns: Iterable[str]) -> set[str]:
        """The names of packages that these regular expressions match as a whole, at least one each."""
        names: set[str] = set()
        known = self.cache("pkgnames").split()
        for pattern in patterns:
            found = {name for name in known if re.fullmatch(pattern, name)}
            if not found:
                raise UnavailableError(f"apt has no package {pattern}: not in its sources, or these are out of reach")
            names |= found
        return names


def mirror() -> str:
    """The address of the Debian archive in this machine's apt sources. Raises `UnavailableError` where there is none."""
    release = _os_release()
    if release.get("ID") != "debian" or "VERSION_CODENAME" not in release:
        raise UnavailableError(f"this is {release.get('PRETTY_NAME', 'no Debian')}: the packages come from Debian's own mirror")
    for address, suites in _sources(Path("/etc/apt")):
        if release["VERSION_CODENAME"] in suites:
            return address
    raise UnavailableError(f"apt's sources name no mirror of {release['VERSION_CODENAME']}")


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip('"') for key, equals, value in (line.partition("=") for line in lines) if equals}


def _sources(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, suites) of all binary sources, of both formats of apt's files (sources.list(5))."""
    for path in (folder / "sources.list", *sorted(folder.glob("sources.list.d/*.list"))):
        for line in path.read_text().splitlines() if path.is_file() else ():
            if found := re.match(r"\s*deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)", line):
                yield found[1], [found[2]]
    for path in sorted(folder.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = {key.lower(): value.split() for key, value in re.findall(r"^(\S+):[ \t]*(.*)$", stanza, re.MULTILINE)}
            if "deb" in fields.get("types", ()) and fields.get("enabled") != ["no"]:
                yield from ((address, fields.get("suites", [])) for address in fields.get("uris", ()))


def run(command: Sequence[str], cwd: Path | None = None) -> str:
    """What a command of apt or dpkg prints. Raises `UnavailableError` with its reason when it fails or takes minutes."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=_MINUTES, env={**os.environ, "LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{command[0]} took more than {_MINUTES:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["no reason given"]
        raise UnavailableError(f"{command[0]} failed: {lines[-1]}")
    return done.stdout
