"""Configuration space and MSI-X table of the PCI personality: registers that only keep what is written to them.

docs/pci-personality.md is their specification. Nothing here delivers interrupts or lets memory be reached: that is done by eventfds and
maps, which a client sets up through VFIO.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final
from uuid import UUID

from ..errors import UsageError
from ..wire import guids, pci
from ..wire.layout import NIL_GUID
from . import registers as reg

DEVICE_ID: Final = 0x4256
"""Of our own choice: no device of Microsoft's is known to have it."""

BAR0_INDEX: Final = 0
MSIX_INDEX: Final = 2
"""BAR and region of the MSI-X table: not BAR 0, so that all of that can be mapped into a guest."""
MSIX_BAR_SIZE: Final = 0x1000
MSIX_PENDING: Final = 0x800
MAX_VECTORS: Final = MSIX_PENDING // pci.MsixEntry.SIZE

MSIX_AT: Final = 0x40
VMBUS_AT: Final = 0x50

_CLASS_CODES = MappingProxyType(
    {
        guids.CLASS_NETWORK: pci.CLASS_NETWORK_ETHERNET,
        guids.CLASS_SCSI: pci.CLASS_STORAGE_SCSI,
    }
)


@dataclass(frozen=True)
class Identity:
    """What VMBus device a function carries: class and instance GUID of the first one, nil if there is none."""

    class_guid: UUID = NIL_GUID
    instance_guid: UUID = NIL_GUID

    @property
    def class_code(self) -> int:
        """Base class, subclass, interface."""
        return _CLASS_CODES.get(self.class_guid, pci.CLASS_OTHER)


NOTHING: Final = Identity()


class Storage:
    """Registers: bits that are set in `writable` are kept as written, the others stay as they are in `initial`.

    widths: the sizes of an access in bytes, which is then aligned to its size; () for any.
    """

    def __init__(self, initial: bytes, writable: bytes, widths: tuple[int, ...] = ()) -> None:
        self.size = len(initial)
        self._initial = initial
        self._writable = writable
        self._widths = widths
        self._values = bytearray(initial)

    def read(self, offset: int, size: int) -> bytes:
        """Raises UsageError outside, or for an access of another width."""
        self._check(offset, size)
        return bytes(self._values[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Raises as `read`."""
        self._check(offset, len(data))
        for at, value in enumerate(data, offset):
            mask = self._writable[at]
            self._values[at] = self._values[at] & ~mask | value & mask

    def reset(self) -> None:
        """Back to `initial`."""
        self._values[:] = self._initial

    def _check(self, offset: int, size: int) -> None:
        if size <= 0 or offset < 0 or offset + size > self.size:
            raise UsageError(f"access of {size} bytes at {offset:#x}: there are {self.size:#x}")
        if self._widths and (size not in self._widths or offset % size):
            raise UsageError(f"access of {size} bytes at {offset:#x}: {' or '.join(map(str, self._widths))} bytes, aligned")


def config_space(identity: Identity, vectors: int) -> Storage:
    """The configuration space of a function with so many MSI-X vectors."""
    initial, writable = bytearray(pci.CONFIG_SIZE), bytearray(pci.CONFIG_SIZE)
    pci.ConfigHeader(
        vendor=pci.VENDOR_MICROSOFT,
        device=DEVICE_ID,
        status=pci.STATUS_CAPABILITIES,
        class_and_revision=identity.class_code << 8 | reg.LAYOUT,
        subsystem_vendor=pci.VENDOR_MICROSOFT,
        capabilities=MSIX_AT,
    ).pack_into(initial)
    pci.MsixCapability(next=VMBUS_AT, control=vectors - 1, table=MSIX_INDEX, pending=MSIX_PENDING | MSIX_INDEX).pack_into(
        initial, MSIX_AT
    )
    pci.VmbusCapability(
        layout=reg.LAYOUT, magic=reg.MAGIC, class_guid=identity.class_guid, instance_guid=identity.instance_guid
    ).pack_into(initial, VMBUS_AT)
    bars = [0] * 6  # a BAR's size is what its writable bits leave out
    bars[BAR0_INDEX] = -reg.BAR0_SIZE & 0xFFFFFFFF
    bars[MSIX_INDEX] = -MSIX_BAR_SIZE & 0xFFFFFFFF
    pci.ConfigHeader(
        command=pci.COMMAND_MEMORY | pci.COMMAND_MASTER | pci.COMMAND_INTX_DISABLE,
        cache_line_size=0xFF,
        bars=tuple(bars),
        interrupt_line=0xFF,
    ).pack_into(writable)
    pci.MsixCapability(id=0, control=pci.MSIX_ENABLE | pci.MSIX_FUNCTION_MASK).pack_into(writable, MSIX_AT)
    return Storage(bytes(initial), bytes(writable))


def msix_bar(vectors: int) -> Storage:
    """The BAR with the MSI-X table, all vectors masked, and the pending bits, which are never set: an eventfd is signalled at once.

    Raises UsageError for more vectors than there is room for.
    """
    if not 0 < vectors <= MAX_VECTORS:
        raise UsageError(f"{vectors} vectors: take 1 to {MAX_VECTORS}")
    entry = pci.MsixEntry().pack()
    writable = pci.MsixEntry(
        address_low=0xFFFFFFFC, address_high=0xFFFFFFFF, data=0xFFFFFFFF, control=pci.MSIX_ENTRY_MASKED
    ).pack()
    return Storage((entry * vectors).ljust(MSIX_BAR_SIZE, b"\0"), (writable * vectors).ljust(MSIX_BAR_SIZE, b"\0"), (4, 8))
