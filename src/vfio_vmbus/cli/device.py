"""A VMBus device of any kind by what a user calls it, and the switch for those that nothing isolates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .control import controlled

if TYPE_CHECKING:
    from ..channel.device import VmbusDevice
    from ..host.vsp import Vsp
    from ..vfio.device import Device

SWITCH = "--enable-unsafe-noiommu-mode"
ANY_DEVICE_HELP = (
    "embedded[:nic|:balloon] (of a VMBus host inside this process), unix:PATH (of a vfio-user server), vfio:ADDRESS "
    "(a PCI device bound to vfio-pci), uio-pci:ADDRESS (bound to uio_pci_generic or igb_uio: unsafe), "
    "vmbus:GUID or uioN (a VMBus device bound to uio_hv_generic: unsafe)."
)
AnyDeviceArgument = Annotated[str, typer.Argument(help=ANY_DEVICE_HELP, metavar="DEVICE")]
UnsafeOption = Annotated[
    bool,
    typer.Option(SWITCH, help="Allow a device that nothing keeps within this process's memory. Taints the kernel."),
]
_WAYS = "take embedded[:nic|:balloon], unix:PATH, vfio:ADDRESS, uio-pci:ADDRESS, vmbus:GUID or uioN"


def is_uio(text: str) -> bool:
    """Is it a VMBus device of the kernel's?"""
    return text.startswith("vmbus:") or (text.startswith("uio") and text[3:].isdecimal())


@contextmanager
def opened_device(text: str, *, unsafe: bool, command: str, default: str = "nic") -> Iterator[VmbusDevice]:
    """The device, closed at the end. default: which one of the embedded host's. command: who drives it, for `status`.

    Raises UsageError for words that make no sense.
    """
    from ..control.driving import DriverSubject

    with _opened(text, unsafe, default) as device, controlled(command, lambda: DriverSubject(device)):
        yield device


@contextmanager
def _opened(text: str, unsafe: bool, default: str) -> Iterator[VmbusDevice]:
    kind, separator, rest = text.partition(":")
    with ExitStack() as stack:
        if is_uio(text):
            yield stack.enter_context(uio_device(text, unsafe=unsafe))
            return
        if kind not in ("embedded", "unix", "vfio", "uio-pci") or (separator and not rest) or (kind != "embedded" and not rest):
            raise UsageError(f"{text}: {_WAYS}")
        from ..channel.opening import open_device

        if kind == "embedded":
            from ..host.embedded import EmbeddedHost

            host = stack.enter_context(EmbeddedHost())
            which = rest or default
            if which not in ("nic", "balloon"):
                raise UsageError(f"{text}: {_WAYS}")
            device: Vsp = host.add_nic() if which == "nic" else host.add_balloon()
            yield stack.enter_context(open_device(host.attach(device)))
        else:
            yield stack.enter_context(open_device(elsewhere(text, unsafe=unsafe)))


def elsewhere(text: str, *, unsafe: bool) -> Device:
    """The device of unix:PATH, another process's, or of vfio:ADDRESS or uio-pci:ADDRESS, the kernel's.

    With the switch, vfio: is one without an IOMMU, and none that an IOMMU would keep in bounds. Raises as what implements it.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix":
        from ..vfio.user.client import UserDevice

        return UserDevice(rest)
    if kind == "uio-pci":
        from ..bus.uio_pci import UioPciDevice

        return UioPciDevice(rest, unsafe=unsafe)
    if unsafe:
        from ..bus.noiommu import open_without_iommu

        return open_without_iommu(rest, unsafe=True)
    from ..vfio.kernel import KernelDevice

    return KernelDevice(rest)


def uio_device(text: str, *, unsafe: bool) -> VmbusDevice:
    """A device that uio_hv_generic has. Raises as `bus.uio.find` and UioDevice."""
    from ..bus import uio
    from ..bus.uio_device import UioDevice

    return UioDevice(uio.find(text), unsafe=unsafe)
