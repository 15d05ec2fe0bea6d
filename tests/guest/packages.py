"""QEMU with vfio-user-pci, a kernel for its guest and what else the rig needs, out of Debian's packages."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from tools.debian import Apt, kept
from vfio_vmbus.errors import UnavailableError

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "guest"

_SUITE = "trixie"
_QEMU_SUITE = "trixie-backports"  # vfio-user-pci is in QEMU 10.1 and later, with few quirks from 11.1 on
_PROGRAMS = ("qemu-system-x86", "virtiofsd")
_ALONE = (r"linux-image-6\.12\.[0-9]+\+deb13-cloud-amd64", r"busybox-static")
"""Packages that are taken without what they depend on, which is there for installing them."""


@dataclass(frozen=True)
class Tools:
    """What is in the folder of unpacked packages. kernel_root: where the guest's kernel is, if not there."""

    root: Path
    kernel_root: Path | None = None

    def program(self, path: str) -> list[str]:
        """The command that runs a program of the packages by the loader and the libraries of the packages."""
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(self.root / path)]

    @property
    def qemu(self) -> list[str]:
        share = self.root / "usr/share"
        return [*self.program("usr/bin/qemu-system-x86_64"), "-L", str(share / "qemu"), "-L", str(share / "seabios")]

    @property
    def qemu_environment(self) -> dict[str, str]:
        return {"QEMU_MODULE_DIR": str(self.root / "usr/lib/x86_64-linux-gnu/qemu")}

    @property
    def virtiofsd(self) -> list[str]:
        return self.program("usr/libexec/virtiofsd")

    @property
    def busybox(self) -> Path:
        return self.root / "usr/bin/busybox"

    @property
    def kernel(self) -> Path:
        return next((self.kernel_root or self.root).glob("boot/vmlinuz-*"))

    @property
    def modules(self) -> Path:
        """The folder of the kernel's modules."""
        return next((self.kernel_root or self.root).glob("usr/lib/modules/*"))

    @property
    def versions(self) -> str:
        """QEMU's and the kernel's, for people."""
        packages = (self.root / "packages.txt").read_text()
        qemu = re.search(r"qemu-system-x86_(?:\d+%3a)?([^_]+)", packages)
        return f"QEMU {qemu[1] if qemu else '?'}, Linux {self.modules.name}"


def tools() -> Tools:
    """The unpacked packages, fetched first where they are not in the cache. Raises `UnavailableError` with the reason."""
    if platform.machine() != "x86_64":
        raise UnavailableError(f"the guest's programs are for x86-64, this is {platform.machine()}")
    return Tools(kept(CACHE, "QEMU 11.1 and a 6.12 kernel from Debian", _fetch))


def _fetch(work: Path) -> None:
    apt = Apt.release(work / "apt", (_SUITE, _QEMU_SUITE))
    apt.get("install", "--yes", "--no-install-recommends", "--download-only", "-t", _QEMU_SUITE, *_PROGRAMS)
    for pattern in _ALONE:
        newest = max(apt.matching([pattern]), key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        apt.get("download", newest, cwd=work)
