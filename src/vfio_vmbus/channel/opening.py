"""`open_device`: a VmbusDevice over whatever a VFIO device turns out to be."""

from __future__ import annotations

from contextlib import ExitStack
from uuid import UUID

from ..errors import RefusedError
from ..vfio.device import Device
from ..wire.guids import CLASS_NAMES
from .device import VmbusDevice
from .offered import open_offered
from .opened import OpenedDevice


def open_device(device: Device, class_guid: UUID | None = None) -> VmbusDevice:
    """The VMBus device behind `device`: the first one offered over a PCI function, or the one that its server has opened; of the
    class, if one is given. Closing it closes all of that.

    `device` is closed at once when this raises: UnavailableError for a device that is neither, RefusedError when there is nothing of the
    class, and as `open_offered` and `OpenedDevice`.
    """
    if device.info.pci:
        return open_offered(device, class_guid)
    with ExitStack() as stack:
        stack.enter_context(device)
        opened = OpenedDevice(device, device.close)
        if class_guid not in (None, opened.class_guid):
            raise RefusedError(f"{device.info.name} is no device of class {CLASS_NAMES.get(class_guid, class_guid)}")
        stack.pop_all()
        return opened
