"""`vfio-vmbus list`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .card import JsonOption
from .output import print_json, print_table

_SYSFS = Path("/sys/bus/vmbus/devices")


def list_devices(as_json: JsonOption = False) -> None:
    """List VMBus devices and their isolation.

    First what --device takes here, then what the kernel has. Isolation says what keeps a driver in user
    space inside its own memory; "none" is unsafe.

    Example: vfio-vmbus list --json
    """
    rows = [_embedded(), *_kernel()]
    if as_json:
        print_json(rows)
        return
    columns = ("device", "class", "instance", "driver", "isolation")
    print_table("", columns, [[str(row[name]) for name in columns] for row in rows])
    if len(rows) == 1:
        print("No VMBus of the kernel's on this machine: the embedded host stands in for it.")


def _embedded() -> dict[str, Any]:
    """A card of the embedded host is made when it is driven, and so has no instance yet."""
    return {
        "device": "embedded:nic0",
        "class": "network",
        "instance": "made on use",
        "driver": "-",
        "isolation": "software IOMMU",
    }


def _kernel() -> list[dict[str, Any]]:
    from ..wire.guids import CLASS_NAMES

    names = {str(guid): name for guid, name in CLASS_NAMES.items()}
    rows = []
    for device in sorted(_SYSFS.iterdir()) if _SYSFS.is_dir() else []:
        class_guid = (device / "class_id").read_text().strip().strip("{}")
        driver = device / "driver"
        bound = driver.resolve().name if driver.exists() else "-"
        isolation = "none" if bound == "uio_hv_generic" else "the kernel drives it"
        rows.append(
            {
                "device": f"vmbus:{device.name}",
                "class": names.get(class_guid, class_guid),
                "instance": (device / "device_id").read_text().strip().strip("{}"),
                "driver": bound,
                "isolation": isolation,
            }
        )
    return rows
