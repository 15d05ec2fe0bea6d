"""The machine a run takes place on: its two cores, what it is made of, where build results go."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
CACHE = ROOT / ".cache"


def two_cores() -> tuple[int, int]:
    """The numbers of the first two CPUs this process may use; the same one twice where there is but one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[min(1, len(allowed) - 1)]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep the calling thread, and what it starts, on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@cache
def cpu_model() -> str:
    """The CPU's name as the kernel tells it; arm64 kernels name none, the architecture stands in."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def describe() -> dict[str, str | float]:
    """What figures of this machine depend on, for conditions.json; `load` is that of the minute before."""
    facts: dict[str, str | float] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("numba", "numpy", "vfio-vmbus"):
        facts[package] = _version(package)
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
