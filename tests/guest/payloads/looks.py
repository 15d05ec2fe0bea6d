"""What the guest is made of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(report: Callable[[Any], None]) -> dict[str, Any]:
    report(os.uname().release)
    devices = {path.name: (path / "vendor").read_text().strip() for path in Path("/sys/bus/pci/devices").iterdir()}
    groups = {path.name: path.resolve().parents[1].name for path in Path("/sys/kernel/iommu_groups").glob("*/devices/*")}
    return {"devices": devices, "groups": groups, "container": Path("/dev/vfio/vfio").exists()}


def fails(report: Callable[[Any], None]) -> None:
    raise ValueError("as it should")


def dies(report: Callable[[Any], None]) -> None:
    os.abort()


def sleeps(report: Callable[[Any], None]) -> None:
    report("asleep")
    while True:
        time.sleep(60)
