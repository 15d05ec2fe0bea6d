"""`KvmGuest`: a Linux guest with /dev/kvm, for payloads that run a virtual machine of ours in it.

An AMD CPU that QEMU emulates has AMD's virtualization too. One CPU: two nested CPUs on two emulated ones fail now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .packages import Tools
from .run import Guest, Payload


class KvmGuest(Guest):
    """One boot."""

    boot_seconds = 600.0
    preload = ("vfio_vmbus.cli.main", "vfio_vmbus.host.embedded", "vfio_vmbus.apps.lab")
    modules = ("kvm-amd", "tun")
    speed = ("-accel", "tcg,thread=multi")
    processor = "EPYC-Rome,+svm,+npt"
    board = ()
    words = "mitigations=off"

    def __init__(self, tools: Tools, folder: Path, kernels: Path, *, memory: str = "2G") -> None:
        super().__init__(tools, folder, kernels, memory=memory)


def steps_of(payload: Payload, names: Sequence[str], patience: float) -> dict[str, tuple[Any, str]]:
    """Of a payload that reports as `vm.take` does, "boot" first: what each step returned, and why it failed."""
    found = {}
    for _ in ("boot", *names):
        name, result, why, seconds = payload.report(patience)
        print(f"{name}: {result}, {seconds} s")
        found[name] = result, why
    payload.result(patience)
    return found
