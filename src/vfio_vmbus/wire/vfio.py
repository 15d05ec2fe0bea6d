"""VFIO: numbers and structures of a vfio-pci device, the same for the kernel's ioctls and for vfio-user.

`argsz` is how many bytes its sender has room for; answers say how many there would be. Capabilities are a chain behind a
structure: each `next` counts from the structure's start, 0 ends it.
Source: include/uapi/linux/vfio.h of Linux 6.12.
"""

from typing import Annotated

from vfio_vmbus.wire.layout import U16, U32, U64, Struct, Tail, struct

# Regions and interrupts of a PCI device, by index.
REGION_BAR0 = 0
REGION_BAR5 = 5
REGION_ROM = 6
REGION_CONFIG = 7
REGION_VGA = 8
PCI_REGIONS = 9

IRQ_INTX = 0
IRQ_MSI = 1
IRQ_MSIX = 2
IRQ_ERR = 3
IRQ_REQ = 4
PCI_IRQS = 5

# DeviceInfo.flags
DEVICE_RESET = 1 << 0
DEVICE_PCI = 1 << 1

# RegionInfo.flags
REGION_READ = 1 << 0
REGION_WRITE = 1 << 1
REGION_MMAP = 1 << 2
REGION_CAPS = 1 << 3

# IrqInfo.flags
IRQ_EVENTFD = 1 << 0
IRQ_MASKABLE = 1 << 1
IRQ_AUTOMASKED = 1 << 2
IRQ_NORESIZE = 1 << 3

# IrqSet.flags: one of the data kinds and one of the actions.
SET_DATA_NONE = 1 << 0
SET_DATA_BOOL = 1 << 1
SET_DATA_EVENTFD = 1 << 2
SET_ACTION_MASK = 1 << 3
SET_ACTION_UNMASK = 1 << 4
SET_ACTION_TRIGGER = 1 << 5
SET_DATA_KINDS = SET_DATA_NONE | SET_DATA_BOOL | SET_DATA_EVENTFD
SET_ACTIONS = SET_ACTION_MASK | SET_ACTION_UNMASK | SET_ACTION_TRIGGER

# Feature.flags: the index in the low 16 bits.
FEATURE_INDEX = 0xFFFF
FEATURE_GET = 1 << 16
FEATURE_SET = 1 << 17
FEATURE_PROBE = 1 << 18
FEATURE_MIGRATION = 1
FEATURE_MIG_DEVICE_STATE = 2
FEATURE_DMA_LOGGING_START = 6
FEATURE_DMA_LOGGING_STOP = 7
FEATURE_DMA_LOGGING_REPORT = 8

# Access of a DMA map, as the device sees it.
DMA_READ = 1 << 0
DMA_WRITE = 1 << 1

# CapabilityHeader.id of a region.
CAPABILITY_SPARSE_MMAP = 1
CAPABILITY_TYPE = 2
CAPABILITY_MSIX_MAPPABLE = 3

MAX_SPARSE_AREAS = 64


@struct(size=32)
class RegionInfo(Struct):
    """A region: `size` in bytes (0 when there is none), `offset` what to give mmap."""

    argsz: U32 = 32
    flags: U32 = 0
    index: U32 = 0
    cap_offset: U32 = 0
    size: U64 = 0
    offset: U64 = 0


@struct(size=8)
class CapabilityHeader(Struct):
    """Begins each capability. The one of MSI-X (a region with the table in it may be mapped) is nothing else."""

    id: U16 = 0
    version: U16 = 1
    next: U32 = 0


@struct(size=16)
class SparseArea(Struct):
    """A part of a region that may be mapped: at the region's mmap offset plus `offset`."""

    offset: U64 = 0
    size: U64 = 0


@struct(size=16)
class SparseMmap(Struct):
    """Only these areas of a region may be mapped."""

    header: CapabilityHeader = CapabilityHeader(id=CAPABILITY_SPARSE_MMAP)
    area_count: U32 = 0
    reserved: U32 = 0
    areas: Annotated[tuple[SparseArea, ...], Tail(SparseArea, count="area_count", limit=MAX_SPARSE_AREAS)] = ()


@struct(size=16)
class RegionType(Struct):
    """What a region beyond those of PCI is for."""

    header: CapabilityHeader = CapabilityHeader(id=CAPABILITY_TYPE)
    type: U32 = 0
    subtype: U32 = 0


@struct(size=16)
class IrqInfo(Struct):
    """A kind of interrupt: `count` vectors, 0 when there is none."""

    argsz: U32 = 16
    flags: U32 = 0
    index: U32 = 0
    count: U32 = 0


@struct(size=20)
class IrqSet(Struct):
    """Acts on `count` vectors from `start` on. Behind it: a byte each for SET_DATA_BOOL; descriptors for SET_DATA_EVENTFD, which
    vfio-user passes beside the message and the kernel takes as 32-bit integers."""

    argsz: U32 = 20
    flags: U32 = 0
    index: U32 = 0
    start: U32 = 0
    count: U32 = 0


@struct(size=8)
class Feature(Struct):
    """Asks for, sets or probes a feature of the device. Its data is behind it."""

    argsz: U32 = 8
    flags: U32 = 0
