"""Machines made of files: a /sys, /proc, /dev and /run in a folder, for what reads them with `Machine`."""

from __future__ import annotations

from pathlib import Path

from vfio_vmbus.bus.machine import Machine

ALL_CAPABILITIES = (1 << 41) - 1
RAWIO = 1 << 17
INITIAL = "user:[4026531837]"


def put(path: Path, content: str | bytes = "") -> Path:
    """A file, and the folders to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    return path


def link(path: Path, target: str | Path) -> Path:
    """A symbolic link, as sysfs has them; it may dangle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def machine(root: Path) -> Machine:
    """An empty one. Its files are those of its owner: what root's state folder would be is under it, too."""
    return Machine(
        sysfs=root / "sys", dev=root / "dev", proc=root / "proc", run=root / "run", etc=root / "etc", modules=root / "modules"
    )


def process(where: Machine, capabilities: int = ALL_CAPABILITIES, namespace: str = INITIAL, name: str = "driver") -> None:
    """What /proc/self says of who asks."""
    put(where.proc / "self/status", f"Name:\t{name}\nCapInh:\t0000000000000000\nCapEff:\t{capabilities:016x}\n")
    put(where.proc / "self/comm", f"{name}\n")
    link(where.proc / "self/ns/user", namespace)


NETWORK = "f8615163-df3e-46c5-913f-f2d2f965ed0e"
SCSI = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"
BALLOON = "525074dc-8985-46e2-8057-a307dc18a502"
NIC0 = "ed963694-e847-4b2a-85af-bc9cfc11d6f3"


def vmbus_device(
    where: Machine, instance: str, class_guid: str, *, name: str | None = None, driver: str | None = None, relid: int = 1
) -> Path:
    """A device of a new kernel, its primary channel open with rings of 32 pages where a driver has it."""
    real = where.sysfs / "devices/vmbus" / (name or instance)
    link(where.sysfs / "bus/vmbus/devices" / (name or instance), real)
    link(real / "subsystem", where.sysfs / "bus/vmbus")
    values = {
        "id": relid,
        "state": 3 if driver else 0,
        "class_id": f"{{{class_guid}}}",
        "device_id": f"{{{instance}}}",
        "modalias": f"vmbus:{class_guid.replace('-', '')}",
        "numa_node": 0,
        "channel_vp_mapping": f"{relid}:0",
        "vendor": "0x1414",
        "driver_override": "(null)",
    }
    if driver:
        link(real / "driver", where.sysfs / "bus/vmbus/drivers" / driver)
        values |= {
            f"{way}_{what}_bytes_avail": 8192 if what == "read" else 31 * 4096 - 8192
            for way in ("out", "in")
            for what in ("read", "write")
        }
    for key, value in values.items():
        put(real / key, f"{value}\n")
    vmbus_channel(real, relid, opened=driver is not None)
    return real


def vmbus_channel(device: Path, relid: int, *, index: int = 0, cpu: int = 0, opened: bool = True) -> Path:
    """A channel of it. While it is closed the kernel answers reads of the rings' state with EINVAL; here the files are not there."""
    here = device / "channels" / str(relid)
    values = {"cpu": cpu, "subchannel_id": index, "interrupts": 17, "events": 4}
    if opened:
        values |= {"out_mask": 0, "in_mask": 1, "read_avail": 64, "write_avail": 122880}
    for key, value in values.items():
        put(here / key, f"{value}\n")
    return here


def uio_device(where: Machine, device: Path, number: int = 0, *, name: str = "hv_uio", rings: int = 0x400000) -> Path:
    """/dev/uioN of a device that uio_hv_generic has, or (rings 0) another driver of UIO."""
    here = device / "uio" / f"uio{number}"
    put(here / "name", f"{name}\n")
    put(here / "dev", f"245:{number}\n")
    if rings:
        put(here / "maps/map0/name", "txrx_rings\n")
        put(here / "maps/map0/size", f"{rings:#018x}\n")
    link(where.sysfs / "class/uio" / here.name, here)
    put(where.dev / here.name)
    return here


def pci_device(
    where: Machine,
    address: str,
    *,
    driver: str | None = None,
    group: int | None = None,
    command: int = 0x2,
    ids: str = "1234:11e8",
) -> Path:
    """A PCI device. command: the register in its configuration space."""
    real = where.sysfs / "devices/pci0000:00" / address
    link(where.sysfs / "bus/pci/devices" / address, real)
    link(real / "subsystem", where.sysfs / "bus/pci")
    vendor, _, device = ids.partition(":")
    put(real / "vendor", f"0x{vendor}\n")
    put(real / "device", f"0x{device}\n")
    put(real / "class", "0x00ff00\n")
    put(real / "driver_override", "(null)\n")
    put(real / "config", bytes(4) + command.to_bytes(2, "little") + bytes(58))
    if driver is not None:
        link(real / "driver", where.sysfs / "bus/pci/drivers" / driver)
    if group is not None:
        members = where.sysfs / f"kernel/iommu_groups/{group}/devices"
        link(members / address, real)
        link(real / "iommu_group", members.parent)
    return real
