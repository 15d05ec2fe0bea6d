"""DPDK's testpmd with its netvsc PMD, out of Debian's packages: an ext4 image in which everything is at its own place."""

from __future__ import annotations

import re
from pathlib import Path

from tools.debian import Apt, kept

from .ext4 import pack_ext4

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "guest-dpdk"
_SUITE = "trixie"
_DRIVERS = (r"librte-net-netvsc[0-9]+", r"librte-mempool-ring[0-9]+")
_IMAGE = "image.ext4"


def dpdk_disk() -> Path:
    """The image, made first where it is not in the cache. Raises UnavailableError with the reason."""
    return kept(CACHE, "DPDK's testpmd from Debian", _fetch, _build) / _IMAGE


def _fetch(work: Path) -> None:
    """testpmd's package depends on all that one compiles against DPDK with, too: of that only its libraries are taken."""
    apt = Apt.release(work / "apt", (_SUITE,))
    depends = set(re.findall(r"^  Depends: (lib\S+)$", apt.cache("depends", "dpdk-dev"), re.MULTILINE)) - {"libdpdk-dev"}
    wanted = sorted({"coreutils", *depends, *apt.matching(_DRIVERS)})  # stdbuf is in coreutils
    apt.get("install", "--yes", "--no-install-recommends", "--download-only", *wanted)
    apt.get("download", "dpdk-dev", cwd=work)


def _build(root: Path) -> None:
    for name in ("proc", "sys", "dev", "var/run"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "lib64").symlink_to("usr/lib64")
    image = root.parent / _IMAGE
    pack_ext4(root, image)
    image.rename(root / _IMAGE)
