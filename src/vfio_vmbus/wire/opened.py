"""The `vmbus` personality: a VMBus device whose channel, rings and buffers its server has opened. docs/vmbus-personality.md.

Regions 0 to 6 are those of Linux's drivers/uio/uio_hv_generic.c and, 5 and 6, of the patch "VFIO/VMBUS: Add VFIO VMBUS driver support"
(2019). Region 7 is our own: it says what the device is, and holds the doorbells.
"""

from vfio_vmbus.wire.layout import NIL_GUID, U32, Guid, Struct, struct

REGION_RINGS = 0
REGION_INTERRUPT_PAGE = 1
REGION_MONITOR_PAGE = 2
REGION_RECEIVE = 3
REGION_SEND = 4
REGION_RECEIVE_GPADL = 5
REGION_SEND_GPADL = 6
REGION_REGISTERS = 7
REGION_SUBCHANNELS = 8
"""Rings of the first further channel; the next one's are in the next region."""

IRQ_CHANNELS = 0
"""The only kind of interrupt: a vector for each channel."""

MAGIC = int.from_bytes(b"VMBO", "little")
LAYOUT = 1

STATUS_AT = 0x0C
CHANNELS_AT = 0x100
DOORBELLS_AT = 0x1000
REGISTERS_SIZE = 0x2000

STATUS_OPEN = 1 << 0
STATUS_FAILED = 1 << 1
STATUS_GONE = 1 << 2

GPADL_SIZE = 4


@struct(size=64)
class OpenedInfo(Struct):
    """The first 64 bytes of the registers. channels: rows of the channel table that hold; max_channels: doorbells and vectors."""

    magic: U32 = 0
    layout: U32 = 0
    features: U32 = 0
    status: U32 = 0
    channels: U32 = 0
    max_channels: U32 = 0
    reserved: U32 = 0
    reserved2: U32 = 0
    class_guid: Guid = NIL_GUID
    instance_guid: Guid = NIL_GUID


@struct(size=16)
class OpenedRings(Struct):
    """A row of the channel table: the region of a channel's rings, and their pages, control page included; host-bound ring first."""

    region: U32 = 0
    upstream: U32 = 0
    downstream: U32 = 0
    reserved: U32 = 0
