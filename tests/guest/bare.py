"""`BareGuest`: a guest without an IOMMU, for the ways to a device that need none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .image import initramfs
from .packages import Tools
from .run import EDU_ADDRESS, Guest, user_device

ADDRESS = EDU_ADDRESS
PLUGGED = "plugged"
"""The name of an edu behind a port of its own, which may be unplugged."""
_FAR = "dma_mask=0xffffffffffffffff"
_EDU = ("-device", f"edu,addr={ADDRESS[-4:]},{_FAR}")
_PORT = ("-device", "pcie-root-port,id=hot,addr=9.0,chassis=1")
_IOMMU = ("-device", "intel-iommu,caching-mode=on")
_SUITE = "vfio_vmbus.testing.conformance"
_MODULES = ("vfio-pci", "uio_pci_generic", "igb_uio", "tun")


class BareGuest(Guest):
    """One boot, with an edu that reaches all memory at ADDRESS, and the card that is served at `card` at USER_ADDRESS.

    tools: with the modules of `modules`, or without.
    """

    preload = ("vfio_vmbus.cli.main", "vfio_vmbus.bus.audit", "vfio_vmbus.bus.noiommu", "vfio_vmbus.bus.uio_pci", _SUITE)
    """Nothing that leads to `memory.signal`, whose way never to wait ends with a fork, and the suite looks for it."""
    settings = {"NUMBA_DISABLE_JIT": "1"}
    """A few frames are all that runs here: no kernels to bring along."""

    def __init__(self, tools: Tools, folder: Path, card: Path) -> None:
        super().__init__(tools, folder, folder / "no-kernels", [*_EDU, *_PORT, *user_device(card)])
        (folder / "no-kernels").mkdir()

    def plug(self) -> None:
        """A new edu in the port, which takes the guest a while to see."""
        self.qmp.command("device_add", driver="edu", id=PLUGGED, bus="hot", dma_mask=(1 << 64) - 1)

    def unplug(self) -> None:
        """As `plug`."""
        self.qmp.command("device_del", id=PLUGGED)

    def _make_image(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        initramfs(self._tools, self._folder / "init.cpio", command, environment, _MODULES)

    def _command(self) -> list[str]:
        words = super()._command()
        at = words.index(_IOMMU[1])
        return words[: at - 1] + words[at + 1 :]
