"""`KvmGuest`: a Linux guest with /dev/kvm, for payloads that run a virtual machine of ours in it.

An AMD CPU that QEMU emulates has AMD's virtualization too. One CPU: two nested CPUs on two emulated ones fail now and then.
"""

from __future__ import annotations

from pathlib import Path

from .packages import Tools
from .run import Guest


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
