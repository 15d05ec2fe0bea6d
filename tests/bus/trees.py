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
