"""Modules that Debian does not build: vfio with its mode without an IOMMU, and igb_uio; and the kernel that they belong to.

The kernel is one of this machine's own Debian, as modules are to be built by the compiler that built their kernel. Only vfio.ko is built
anew: the kernel's other modules of VFIO get along with it, as the mode changes nothing that they share.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tools.debian import Apt, kept
from vfio_vmbus.errors import UnavailableError

from .packages import Tools
from .process import RigError

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "guest-modules"
RELEASE = "6.12"
_FLAVOUR = "cloud-amd64"
_SOURCE = "drivers/vfio"
_MINUTES = 10 * 60.0


def with_modules(tools: Tools) -> Tools:
    """The same programs with a kernel that has those modules; fetched and built where they are not in the cache, which takes 200 MB of
    download and half a minute. Raises UnavailableError with the reason, and RigError where the compiler fails.
    """
    for tool in ("make", "gcc", "tar"):
        if shutil.which(tool) is None and not (CACHE / "root").is_dir():
            raise UnavailableError(f"{tool} is not here, and modules of the kernel are to be built")
    root = kept(CACHE, f"a {RELEASE} kernel, its source and igb_uio's from Debian", _fetch, _build)
    return replace(tools, kernel_root=root)


def _fetch(work: Path) -> None:
    apt = Apt.own_lists(work / "apt")
    kernels = apt.matching([rf"linux-headers-{re.escape(RELEASE)}\.[0-9]+\+deb[0-9]+-{_FLAVOUR}"])
    newest = max(kernels, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    number = newest.removeprefix("linux-headers-").removesuffix(f"-{_FLAVOUR}")
    described = apt.cache("show", "--no-all-versions", newest)
    version, compiler = re.search(r"^Version: (\S+)$", described, re.MULTILINE), re.search(r"\bgcc-\d+\b", described)
    if version is None or compiler is None:
        raise UnavailableError(f"apt does not tell the version of {newest}, or the compiler that it needs")
    if shutil.which(f"x86_64-linux-gnu-{compiler[0]}") is None:
        raise UnavailableError(f"{compiler[0]} is not here, and modules of {newest} are to be built by it")
    kernel = [f"linux-image-{number}-{_FLAVOUR}", newest, f"linux-headers-{number}-common", f"linux-kbuild-{number}"]
    apt.get("download", *kernel, f"linux-source-{RELEASE}={version[1]}", "dpdk-kmods-dkms", cwd=work)


def _build(root: Path) -> None:
    """Out of unpacked packages, a kernel and its modules with ours among them; what they were built from is removed."""
    sources = root / "usr/src"
    _run(["tar", "-xJf", str(sources / f"linux-source-{RELEASE}.tar.xz"), "--wildcards", f"*/{_SOURCE}/*"], sources)
    headers = next(sources.glob(f"linux-headers-*-{_FLAVOUR}"))
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{sources}/"))  # it is not installed
    vfio = next(sources.glob(f"linux-source-*/{_SOURCE}"))
    igb_uio = next(sources.glob("dpdk-kmods-*/igb_uio.c")).parent
    _make(headers, vfio, "vfio.ko", "KCFLAGS=-DCONFIG_VFIO_NOIOMMU=1")
    _make(headers, igb_uio, "igb_uio.ko")
    modules = _modules(root)
    for old in modules.rglob("vfio.ko*"):
        old.unlink()
    for new in (vfio / "vfio.ko", igb_uio / "igb_uio.ko"):
        shutil.copy(new, modules)
    shutil.rmtree(sources)


def _make(headers: Path, folder: Path, module: str, *words: str) -> None:
    """One module, without its types for BPF, for which there would have to be the whole kernel."""
    _run(["make", "-s", "-C", str(headers), f"M={folder}", "CONFIG_DEBUG_INFO_BTF_MODULES=", *words, module], headers)


def _modules(root: Path) -> Path:
    """The folder of the kernel's modules: under /lib up to Debian 12."""
    if not (root / "usr/lib/modules").is_dir():
        (root / "lib/modules").rename(root / "usr/lib/modules")
    return next((root / "usr/lib/modules").iterdir())


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_MINUTES)
    if done.returncode != 0:
        raise RigError(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
