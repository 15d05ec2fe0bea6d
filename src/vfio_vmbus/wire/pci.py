"""PCI: the configuration space of a function of type 0, MSI and MSI-X.

Sources: include/uapi/linux/pci_regs.h and pci_ids.h of Linux 6.12; PCI Local Bus Specification 3.0, 6.1, 6.2.5, 6.8.1 and 6.8.2.
"""

from typing import Annotated

from vfio_vmbus.wire.layout import NIL_GUID, U8, U16, U32, Array, Guid, Struct, struct

CONFIG_SIZE = 256

VENDOR_MICROSOFT = 0x1414

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10
STATUS_CAPABILITIES = 1 << 4

CLASS_STORAGE_SCSI = 0x010000  # base class, subclass, interface
CLASS_NETWORK_ETHERNET = 0x020000
CLASS_OTHER = 0xFF0000

CAPABILITY_MSI = 0x05
CAPABILITY_VENDOR = 0x09
CAPABILITY_MSIX = 0x11

MSI_ENABLE = 1 << 0
MSI_64_BIT = 1 << 7
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENABLE = 1 << 15
MSIX_ENTRY_MASKED = 1 << 0


@struct(size=64)
class ConfigHeader(Struct):
    """The first 64 bytes. class_and_revision: the class code in the upper 24 bits."""

    vendor: U16 = 0
    device: U16 = 0
    command: U16 = 0
    status: U16 = 0
    class_and_revision: U32 = 0
    cache_line_size: U8 = 0
    latency_timer: U8 = 0
    header_type: U8 = 0
    self_test: U8 = 0
    bars: Annotated[tuple[int, ...], Array(U32, 6)] = (0,) * 6
    cardbus: U32 = 0
    subsystem_vendor: U16 = 0
    subsystem: U16 = 0
    rom: U32 = 0
    capabilities: U8 = 0
    reserved: Annotated[tuple[int, ...], Array(U8, 7)] = (0,) * 7
    interrupt_line: U8 = 0
    interrupt_pin: U8 = 0
    min_grant: U8 = 0
    max_latency: U8 = 0


@struct(size=14)
class MsiCapability(Struct):
    """With 64-bit addresses, without masks. control: MSI_*, and the number of vectors as powers of two in bits 1 to 3."""

    id: U8 = CAPABILITY_MSI
    next: U8 = 0
    control: U16 = MSI_64_BIT
    address_low: U32 = 0
    address_high: U32 = 0
    data: U16 = 0


@struct(size=12)
class MsixCapability(Struct):
    """control: vectors less one, and the two bits above. Table and pending bits: an offset with the BAR's number in its low three bits."""

    id: U8 = CAPABILITY_MSIX
    next: U8 = 0
    control: U16 = 0
    table: U32 = 0
    pending: U32 = 0


@struct(size=16)
class MsixEntry(Struct):
    """A row of the MSI-X table."""

    address_low: U32 = 0
    address_high: U32 = 0
    data: U32 = 0
    control: U32 = MSIX_ENTRY_MASKED


@struct(size=40)
class VmbusCapability(Struct):
    """The vendor-specific capability of the PCI personality: which layout BAR 0 has, and what VMBus device is behind it (nil: none)."""

    id: U8 = CAPABILITY_VENDOR
    next: U8 = 0
    length: U8 = 40
    layout: U8 = 0
    magic: U32 = 0
    class_guid: Guid = NIL_GUID
    instance_guid: Guid = NIL_GUID
