"""iommufd: numbers and structures of /dev/iommu, as far as IO address spaces go.

All numbers are _IO(';', n). Structures begin with their own `size`: a kernel takes shorter ones, and longer ones whose rest is zero.
Source: include/uapi/linux/iommufd.h of Linux 6.12, and of 7.3 for IOAS_MAP_FILE.
"""

from vfio_vmbus.wire.layout import S32, U16, U32, U64, Struct, struct

DESTROY = 0x3B80
IOAS_ALLOC = 0x3B81
IOAS_ALLOW_IOVAS = 0x3B82
IOAS_COPY = 0x3B83
IOAS_IOVA_RANGES = 0x3B84
IOAS_MAP = 0x3B85
IOAS_UNMAP = 0x3B86
OPTION = 0x3B87
VFIO_IOAS = 0x3B88
HWPT_ALLOC = 0x3B89
GET_HW_INFO = 0x3B8A
HWPT_SET_DIRTY_TRACKING = 0x3B8B
HWPT_GET_DIRTY_BITMAP = 0x3B8C
HWPT_INVALIDATE = 0x3B8D
FAULT_QUEUE_ALLOC = 0x3B8E
IOAS_MAP_FILE = 0x3B8F

# IoasMap.flags, IoasMapFile.flags, IoasCopy.flags
MAP_FIXED_IOVA = 1 << 0
MAP_WRITEABLE = 1 << 1
MAP_READABLE = 1 << 2

# Option.option_id and Option.op
OPTION_RLIMIT_MODE = 0
OPTION_HUGE_PAGES = 1
OPTION_SET = 0
OPTION_GET = 1

# VfioIoas.op
VFIO_IOAS_GET = 0
VFIO_IOAS_SET = 1
VFIO_IOAS_CLEAR = 2


@struct(size=8)
class Destroy(Struct):
    """Ends an object."""

    size: U32 = 8
    id: U32 = 0


@struct(size=12)
class IoasAlloc(Struct):
    """Makes an IO address space."""

    size: U32 = 12
    flags: U32 = 0
    out_ioas_id: U32 = 0


@struct(size=16)
class IommuIovaRange(Struct):
    """IOVAs from `start` to `last`, which is one of them."""

    start: U64 = 0
    last: U64 = 0


@struct(size=32)
class IoasIovaRanges(Struct):
    """The IOVAs that may be mapped go to `allowed_iovas`, an array of `range_count`; EMSGSIZE when there are more, and how many."""

    size: U32 = 32
    ioas_id: U32 = 0
    range_count: U32 = 0
    reserved: U32 = 0
    allowed_iovas: U64 = 0
    out_alignment: U64 = 0


@struct(size=24)
class IoasAllowIovas(Struct):
    """Only these IOVAs may be given to maps without MAP_FIXED_IOVA."""

    size: U32 = 24
    ioas_id: U32 = 0
    range_count: U32 = 0
    reserved: U32 = 0
    allowed_iovas: U64 = 0


@struct(size=40)
class IoasMap(Struct):
    """Maps the caller's memory."""

    size: U32 = 40
    flags: U32 = 0
    ioas_id: U32 = 0
    reserved: U32 = 0
    user_va: U64 = 0
    length: U64 = 0
    iova: U64 = 0


@struct(size=40)
class IoasMapFile(Struct):
    """Maps a memfd from `start` on."""

    size: U32 = 40
    flags: U32 = 0
    ioas_id: U32 = 0
    fd: S32 = -1
    start: U64 = 0
    length: U64 = 0
    iova: U64 = 0


@struct(size=40)
class IoasCopy(Struct):
    """Maps again what another address space maps."""

    size: U32 = 40
    flags: U32 = 0
    dst_ioas_id: U32 = 0
    src_ioas_id: U32 = 0
    length: U64 = 0
    dst_iova: U64 = 0
    src_iova: U64 = 0


@struct(size=24)
class IoasUnmap(Struct):
    """Takes back all maps within; none may be cut. length: of the range, then how many bytes were mapped there."""

    size: U32 = 24
    ioas_id: U32 = 0
    iova: U64 = 0
    length: U64 = 0


@struct(size=24)
class Option(Struct):
    """Reads or sets an option of an object, or (object_id 0) of the descriptor."""

    size: U32 = 24
    option_id: U32 = 0
    op: U16 = 0
    reserved: U16 = 0
    object_id: U32 = 0
    value: U64 = 0


@struct(size=12)
class VfioIoas(Struct):
    """Which address space stands in where the descriptor is used as a VFIO container."""

    size: U32 = 12
    ioas_id: U32 = 0
    op: U16 = 0
    reserved: U16 = 0
