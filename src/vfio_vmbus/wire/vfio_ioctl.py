"""The kernel's VFIO: numbers of its ioctls, and the structures that `vfio` does not have because vfio-user does not.

All numbers are _IO(';', n), without size bits: what 0x3b70 to 0x3b75 mean depends on the descriptor, a container's or a device's.
`argsz` is how many bytes the caller has room for; answers say how many there would be.
Source: include/uapi/linux/vfio.h of Linux 6.12 and 7.3 (where they differ, the structure says so).
"""

from typing import Annotated

from vfio_vmbus.wire.layout import S32, U8, U16, U32, U64, Struct, Tail, struct
from vfio_vmbus.wire.vfio import CapabilityHeader

API_VERSION = 0

# A container, /dev/vfio/vfio.
GET_API_VERSION = 0x3B64
CHECK_EXTENSION = 0x3B65
SET_IOMMU = 0x3B66
IOMMU_GET_INFO = 0x3B70
IOMMU_MAP_DMA = 0x3B71
IOMMU_UNMAP_DMA = 0x3B72
IOMMU_DIRTY_PAGES = 0x3B75

# A group, /dev/vfio/NUMBER.
GROUP_GET_STATUS = 0x3B67
GROUP_SET_CONTAINER = 0x3B68
GROUP_UNSET_CONTAINER = 0x3B69
GROUP_GET_DEVICE_FD = 0x3B6A

# A device, whichever way it was opened.
DEVICE_GET_INFO = 0x3B6B
DEVICE_GET_REGION_INFO = 0x3B6C
DEVICE_GET_IRQ_INFO = 0x3B6D
DEVICE_SET_IRQS = 0x3B6E
DEVICE_RESET = 0x3B6F
DEVICE_GET_PCI_HOT_RESET_INFO = 0x3B70
DEVICE_PCI_HOT_RESET = 0x3B71
DEVICE_QUERY_GFX_PLANE = 0x3B72
DEVICE_GET_GFX_DMABUF = 0x3B73
DEVICE_IOEVENTFD = 0x3B74
DEVICE_FEATURE = 0x3B75

# A device's own node, /dev/vfio/devices/vfioNUMBER.
DEVICE_BIND_IOMMUFD = 0x3B76
DEVICE_ATTACH_IOMMUFD_PT = 0x3B77
DEVICE_DETACH_IOMMUFD_PT = 0x3B78

# The descriptor of a migration's data.
MIG_GET_PRECOPY_INFO = 0x3B79

# CHECK_EXTENSION and SET_IOMMU
TYPE1_IOMMU = 1
TYPE1V2_IOMMU = 3
DMA_CC_IOMMU = 4
SPAPR_TCE_V2_IOMMU = 7
NOIOMMU_IOMMU = 8
UNMAP_ALL = 9
UPDATE_VADDR = 10

# GroupStatus.flags
GROUP_VIABLE = 1 << 0
GROUP_CONTAINER_SET = 1 << 1

# DeviceInfo.flags, besides those of `vfio`
DEVICE_CAPS = 1 << 7

# HotResetInfo.flags
HOT_RESET_DEV_ID = 1 << 0
HOT_RESET_DEV_ID_OWNED = 1 << 1

# DependentDevice.owner with HOT_RESET_DEV_ID
DEV_ID_OWNED = 0
DEV_ID_NOT_OWNED = 0xFFFFFFFF  # -1 as 32 bits

# Features that vfio-user does not have
FEATURE_VF_TOKEN = 0
FEATURE_LOW_POWER_ENTRY = 3
FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4
FEATURE_LOW_POWER_EXIT = 5
FEATURE_MIG_DATA_SIZE = 9
FEATURE_BUS_MASTER = 10

# BusMaster.op
BUS_MASTER_CLEAR = 0
BUS_MASTER_SET = 1

# Type1Info.flags, and the capabilities behind it
TYPE1_PAGE_SIZES = 1 << 0
TYPE1_CAPS = 1 << 1
CAPABILITY_IOVA_RANGES = 1
CAPABILITY_MIGRATION = 2
CAPABILITY_DMA_AVAILABLE = 3

# Type1Map.flags, besides DMA_READ and DMA_WRITE
MAP_VADDR = 1 << 2

# Type1Unmap.flags
UNMAP_GET_DIRTY_BITMAP = 1 << 0
UNMAP_FLAG_ALL = 1 << 1
UNMAP_VADDR = 1 << 2

# BindIommufd.flags
BIND_TOKEN = 1 << 0
# AttachIommufd.flags, DetachIommufd.flags
ATTACH_PASID = 1 << 0

MAX_IOVA_RANGES = 1024
MAX_HOT_RESET_DEVICES = 4096
MAX_HOT_RESET_GROUPS = 4096


@struct(size=8)
class GroupStatus(Struct):
    """Of a group: may it be used (GROUP_VIABLE), is it in a container?"""

    argsz: U32 = 8
    flags: U32 = 0


@struct(size=24)
class DeviceInfo(Struct):
    """What a device has. The first 16 bytes are vfio-user's."""

    argsz: U32 = 24
    flags: U32 = 0
    region_count: U32 = 0
    irq_count: U32 = 0
    cap_offset: U32 = 0
    padding: U32 = 0


@struct(size=8)
class DependentDevice(Struct):
    """A function that a hot reset would reset as well. owner: its IOMMU group, or its id on the iommufd (HOT_RESET_DEV_ID)."""

    owner: U32 = 0
    segment: U16 = 0
    bus: U8 = 0
    devfn: U8 = 0


@struct(size=12)
class HotResetInfo(Struct):
    """Everything that a hot reset of this device would reset, itself included."""

    argsz: U32 = 12
    flags: U32 = 0
    count: U32 = 0
    devices: Annotated[tuple[DependentDevice, ...], Tail(DependentDevice, count="count", limit=MAX_HOT_RESET_DEVICES)] = ()


@struct(size=12)
class HotReset(Struct):
    """Resets the slot or bus; the groups prove that its caller owns all that is on it. None where the devices are an iommufd's."""

    argsz: U32 = 12
    flags: U32 = 0
    count: U32 = 0
    group_fds: Annotated[tuple[int, ...], Tail(S32, count="count", limit=MAX_HOT_RESET_GROUPS)] = ()


@struct(size=32)
class IoEventFd(Struct):
    """Write `data` to `offset` of the device's file whenever `fd` is signalled. flags: the width in bytes. fd -1: no more."""

    argsz: U32 = 32
    flags: U32 = 0
    offset: U64 = 0
    data: U64 = 0
    fd: S32 = -1
    reserved: U32 = 0


@struct(size=4)
class BusMaster(Struct):
    """The data of FEATURE_BUS_MASTER."""

    op: U32 = 0


@struct(size=24)
class BindIommufd(Struct):
    """Ties a device's node to an iommufd; nothing else works before. Linux 6.12 has the first 16 bytes: enough without a token."""

    argsz: U32 = 16
    flags: U32 = 0
    iommufd: S32 = -1
    out_devid: U32 = 0
    token: U64 = 0


BIND_IOMMUFD_SIZE_6_12 = 16


@struct(size=16)
class AttachIommufd(Struct):
    """Gives the device an IO address space, by its id. Linux 6.12 has the first 12 bytes of it."""

    argsz: U32 = 12
    flags: U32 = 0
    pt_id: U32 = 0
    pasid: U32 = 0


ATTACH_IOMMUFD_SIZE_6_12 = 12


@struct(size=12)
class DetachIommufd(Struct):
    """Takes it away. Linux 6.12 has the first 8 bytes of it."""

    argsz: U32 = 8
    flags: U32 = 0
    pasid: U32 = 0


DETACH_IOMMUFD_SIZE_6_12 = 8


@struct(size=24)
class Type1Info(Struct):
    """What an IOMMU can do. page_sizes: a bit for each."""

    argsz: U32 = 24
    flags: U32 = 0
    page_sizes: U64 = 0
    cap_offset: U32 = 0
    padding: U32 = 0


@struct(size=16)
class IovaRange(Struct):
    """IOVAs from `start` to `last`, which is one of them."""

    start: U64 = 0
    last: U64 = 0


@struct(size=16)
class IovaRanges(Struct):
    """The IOVAs that may be mapped."""

    header: CapabilityHeader = CapabilityHeader(id=CAPABILITY_IOVA_RANGES)
    range_count: U32 = 0
    reserved: U32 = 0
    ranges: Annotated[tuple[IovaRange, ...], Tail(IovaRange, count="range_count", limit=MAX_IOVA_RANGES)] = ()


@struct(size=32)
class Type1Migration(Struct):
    """Dirty pages can be told, in bitmaps of at most so many bytes."""

    header: CapabilityHeader = CapabilityHeader(id=CAPABILITY_MIGRATION)
    flags: U32 = 0
    padding: U32 = 0
    page_sizes: U64 = 0
    max_bitmap_size: U64 = 0


@struct(size=12)
class DmaAvailable(Struct):
    """How many more maps there may be."""

    header: CapabilityHeader = CapabilityHeader(id=CAPABILITY_DMA_AVAILABLE)
    available: U32 = 0


@struct(size=32)
class Type1Map(Struct):
    """Lets devices reach `size` bytes of the caller's memory from `vaddr` on at `iova`."""

    argsz: U32 = 32
    flags: U32 = 0
    vaddr: U64 = 0
    iova: U64 = 0
    size: U64 = 0


@struct(size=24)
class Type1Unmap(Struct):
    """Takes back all maps within; none may be cut. size: of the range, then how many bytes were mapped there."""

    argsz: U32 = 24
    flags: U32 = 0
    iova: U64 = 0
    size: U64 = 0


@struct(size=24)
class Bitmap(Struct):
    """Where to put a bit for each page: `size` bytes at `data`."""

    page_size: U64 = 0
    size: U64 = 0
    data: U64 = 0


@struct(size=24)
class DmaLoggingControl(Struct):
    """The data of FEATURE_DMA_LOGGING_START: an array of DmaLoggingRange at `ranges`."""

    page_size: U64 = 0
    range_count: U32 = 0
    reserved: U32 = 0
    ranges: U64 = 0


@struct(size=16)
class DmaLoggingRange(Struct):
    """IOVAs whose writes are logged."""

    iova: U64 = 0
    length: U64 = 0


@struct(size=32)
class DmaLoggingReport(Struct):
    """The data of FEATURE_DMA_LOGGING_REPORT: a bit for each page goes to `bitmap`."""

    iova: U64 = 0
    length: U64 = 0
    page_size: U64 = 0
    bitmap: U64 = 0
