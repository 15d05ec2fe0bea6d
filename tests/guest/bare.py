"""`BareGuest`: a guest without an IOMMU, for the ways to a device that need none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .image import initramfs
from .packages import Tools
from .run import EDU_ADDRESS, Guest

ADDRESS = EDU_ADDRESS
_EDU = ("-device", f"edu,addr={ADDRESS[-4:]},dma_mask=0xffffffffffffffff")
_IOMMU = ("-device", "intel-iommu,caching-mode=on")
_MODULES = ("vfio-pci", "uio_pci_generic")


class BareGuest(Guest):
    """One boot, with an edu that reaches all memory at ADDRESS."""

    preload = ("vfio_vmbus.bus.uio_pci", "vfio_vmbus.testing.conformance")
    settings = {"NUMBA_DISABLE_JIT": "1"}
    """No data plane runs here: no kernels to bring along."""

    def __init__(self, tools: Tools, folder: Path) -> None:
        super().__init__(tools, folder, folder / "no-kernels", _EDU)
        (folder / "no-kernels").mkdir()

    def _make_image(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        initramfs(self._tools, self._folder / "init.cpio", command, environment, _MODULES)

    def _command(self) -> list[str]:
        words = super()._command()
        at = words.index(_IOMMU[1])
        return words[: at - 1] + words[at + 1 :]
