"""vfio-user 0.0: the header, the structures of all commands, limits. The JSON of VERSION is in `vfio_user_version`.

A message is a header, a structure, and data behind it. Descriptors travel beside the header (SCM_RIGHTS), never within a message.
Integers have the machine's order, which is little-endian wherever this runs. An error reply is a header only, but some servers send more.
Source: QEMU's docs/interop/vfio-user.rst (10.2); what servers and clients do otherwise is said where it matters.

`COMMANDS` is the table: number -> name, sender, request, reply.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.layout import U16, U32, U64, Buffer, Raw, Struct, Tail, struct
from vfio_vmbus.wire.table import Side
from vfio_vmbus.wire.vfio import SET_DATA_BOOL, SET_DATA_KINDS, Feature, IrqInfo, IrqSet, RegionInfo

MAJOR_VERSION = 0
MINOR_VERSION = 0

VERSION = 1
DMA_MAP = 2
DMA_UNMAP = 3
DEVICE_GET_INFO = 4
DEVICE_GET_REGION_INFO = 5
DEVICE_GET_REGION_IO_FDS = 6
DEVICE_GET_IRQ_INFO = 7
DEVICE_SET_IRQS = 8
REGION_READ = 9
REGION_WRITE = 10
DMA_READ = 11
DMA_WRITE = 12
DEVICE_RESET = 13
REGION_WRITE_MULTI = 15  # 14 was DIRTY_PAGES; its number is never used again
DEVICE_FEATURE = 16
MIG_DATA_READ = 17
MIG_DATA_WRITE = 18

# HeaderFlags.kind
KIND_COMMAND = 0
KIND_REPLY = 1

# DmaUnmap.flags: not in the specification, but sent by QEMU and taken by libvfio-user.
UNMAP_DIRTY_BITMAP = 1 << 0
UNMAP_ALL = 1 << 1

# SubRegion.type
IO_FD_IOEVENTFD = 0
IO_FD_IOREGIONFD = 1

MAX_WRITE_MULTI = 256  # entries; QEMU sends up to 200
MAX_WRITE_MULTI_BYTES = 8
MAX_ERRNO = 4095
MAX_VERSION_PAYLOAD = 4096  # the longest JSON seen is under 200 bytes


class HeaderFlags(BitField, width=32):
    """kind: KIND_*. no_reply: of a command. error: of a reply, with an errno in the header."""

    kind = Bits(0, 4)
    no_reply = Bits(4)
    error = Bits(5)


@struct(size=16)
class Header(Struct):
    """Begins every message. message_id: the sender's own, returned in the reply. message_size: bytes, these 16 included."""

    message_id: U16 = 0
    command: U16 = 0
    message_size: U32 = 16
    flags: HeaderFlags = HeaderFlags(0)
    error: U32 = 0


@struct(size=4)
class Version(Struct):
    """What the sender speaks. JSON behind it."""

    major: U16 = MAJOR_VERSION
    minor: U16 = MINOR_VERSION


@struct(size=32)
class DmaMap(Struct):
    """The client's memory: `size` bytes at `iova`. With a descriptor, they are that file's from `offset` on; without, the server asks for
    them by DMA_READ and DMA_WRITE. flags: vfio.DMA_*."""

    argsz: U32 = 32
    flags: U32 = 0
    offset: U64 = 0
    iova: U64 = 0
    size: U64 = 0


@struct(size=24)
class DmaUnmap(Struct):
    """Takes [iova, iova + size) back. A `DirtyBitmap` may follow."""

    argsz: U32 = 24
    flags: U32 = 0
    iova: U64 = 0
    size: U64 = 0


@struct(size=16)
class DirtyBitmap(Struct):
    """What a client wants to know of the pages it unmaps: `size` bytes of bits, one a page of `page_size` bytes."""

    page_size: U64 = 0
    size: U64 = 0


@struct(size=16)
class DeviceInfo(Struct):
    """flags: vfio.DEVICE_*."""

    argsz: U32 = 16
    flags: U32 = 0
    region_count: U32 = 0
    irq_count: U32 = 0


@struct(size=16)
class RegionIoFds(Struct):
    """Asks for, or heads, the sub-regions of region `index` that have descriptors of their own: `count` of SubRegion behind it."""

    argsz: U32 = 16
    flags: U32 = 0
    index: U32 = 0
    count: U32 = 0


@struct(size=40)
class SubRegion(Struct):
    """`size` bytes at `offset` of a region are written by the reply's descriptor number `fd_index`. data: of an ioeventfd what must be
    written for it to count (datamatch), of an ioregionfd the server's own."""

    offset: U64 = 0
    size: U64 = 0
    fd_index: U32 = 0
    type: U32 = IO_FD_IOEVENTFD
    flags: U32 = 0
    padding: U32 = 0
    data: U64 = 0


@struct(size=16)
class RegionAccess(Struct):
    """`count` bytes at `offset` of a region, read or written."""

    offset: U64 = 0
    region: U32 = 0
    count: U32 = 0


@struct(size=24)
class WriteEntry(Struct):
    """One write of up to eight bytes."""

    offset: U64 = 0
    region: U32 = 0
    count: U32 = 0
    data: Annotated[bytes, Raw(MAX_WRITE_MULTI_BYTES)] = bytes(MAX_WRITE_MULTI_BYTES)


@struct(size=8)
class WriteMulti(Struct):
    """Several writes in one message. The reply says how many were done."""

    count: U64 = 0
    writes: Annotated[tuple[WriteEntry, ...], Tail(WriteEntry, count="count", limit=MAX_WRITE_MULTI)] = ()


@struct(size=8)
class WriteMultiReply(Struct):
    """How many were done."""

    count: U64 = 0


@struct(size=16)
class DmaAccess(Struct):
    """`count` bytes of the client's memory. QEMU 10.1 and 10.2 have an OldDmaAccess here."""

    iova: U64 = 0
    count: U64 = 0


@struct(size=12)
class OldDmaAccess(Struct):
    """What QEMU 10.1 and 10.2 take for DmaAccess. The messages are as long, so that four bytes behind the data are unused; the reply to
    DMA_WRITE is a header only."""

    iova: U64 = 0
    count: U32 = 0


@struct(size=8)
class MigrationData(Struct):
    """`size` bytes of a device's state."""

    argsz: U32 = 8
    size: U32 = 0


@dataclass(frozen=True)
class Form:
    """A payload: `kind`, then as many bytes as `behind` makes of it (None: any number)."""

    kind: type[Struct] | None
    behind: Callable[[Any], int | None] = lambda value: 0

    def parse(self, name: str, payload: Buffer) -> tuple[Any, bytes]:
        """The structure (None if there is none) and the data behind it. Raises ProtocolError for a length or argsz that cannot be."""
        value: Any = None
        size = 0
        need: int | None = 0
        if self.kind is not None:
            value = self.kind.unpack(payload)
            size = value.nbytes
            if "argsz" in self.kind.OFFSETS and value.argsz < self.kind.SIZE:
                raise ProtocolError(f"{name}: argsz is {value.argsz} bytes, need {self.kind.SIZE}")
            need = self.behind(value)
        have = len(payload) - size
        if need is not None and have != need:
            raise ProtocolError(f"{name}: {have} bytes behind the first {size}, need {need}")
        return value, bytes(payload[size:])


@dataclass(frozen=True)
class Command:
    """A row of the table. sender: the client is the guest's side, the server the host's."""

    name: str
    request: Form
    reply: Form
    sender: Side = Side.GUEST


def _irq_data(value: IrqSet) -> int:
    return value.count if value.flags & SET_DATA_KINDS == SET_DATA_BOOL else 0


def _any(value: Struct) -> int | None:
    return None


def _count(value: RegionAccess | DmaAccess) -> int:
    return value.count


def _size(value: MigrationData) -> int:
    return value.size


_NOTHING = Form(None)

COMMANDS: Mapping[int, Command] = MappingProxyType(
    {
        VERSION: Command("VERSION", Form(Version, _any), Form(Version, _any)),
        DMA_MAP: Command("DMA_MAP", Form(DmaMap), _NOTHING),
        # A bitmap's header may follow, and bits in the reply; QEMU sends neither.
        DMA_UNMAP: Command("DMA_UNMAP", Form(DmaUnmap, _any), Form(DmaUnmap, _any)),
        # What argsz rules may be longer: SPDK always sends 4064 bytes.
        DEVICE_GET_INFO: Command("DEVICE_GET_INFO", Form(DeviceInfo, _any), Form(DeviceInfo, _any)),
        DEVICE_GET_REGION_INFO: Command("DEVICE_GET_REGION_INFO", Form(RegionInfo, _any), Form(RegionInfo, _any)),
        DEVICE_GET_REGION_IO_FDS: Command("DEVICE_GET_REGION_IO_FDS", Form(RegionIoFds, _any), Form(RegionIoFds, _any)),
        DEVICE_GET_IRQ_INFO: Command("DEVICE_GET_IRQ_INFO", Form(IrqInfo, _any), Form(IrqInfo, _any)),
        DEVICE_SET_IRQS: Command("DEVICE_SET_IRQS", Form(IrqSet, _irq_data), _NOTHING),
        REGION_READ: Command("REGION_READ", Form(RegionAccess), Form(RegionAccess, _count)),
        REGION_WRITE: Command("REGION_WRITE", Form(RegionAccess, _count), Form(RegionAccess)),
        DMA_READ: Command("DMA_READ", Form(DmaAccess), Form(DmaAccess, _count), Side.HOST),
        DMA_WRITE: Command("DMA_WRITE", Form(DmaAccess, _count), Form(DmaAccess), Side.HOST),
        DEVICE_RESET: Command("DEVICE_RESET", _NOTHING, _NOTHING),
        REGION_WRITE_MULTI: Command("REGION_WRITE_MULTI", Form(WriteMulti), Form(WriteMultiReply)),
        DEVICE_FEATURE: Command("DEVICE_FEATURE", Form(Feature, _any), Form(Feature, _any)),
        MIG_DATA_READ: Command("MIG_DATA_READ", Form(MigrationData), Form(MigrationData, _any)),
        MIG_DATA_WRITE: Command("MIG_DATA_WRITE", Form(MigrationData, _size), _NOTHING),
    }
)


def parse_header(data: Buffer, max_size: int) -> Header:
    """A message's header. Raises ProtocolError: fewer than 16 bytes; a size below 16 or above `max_size`; neither command nor reply;
    flags that contradict each other."""
    header = Header.unpack(data)
    check_header(header, max_size)
    return header


def check_header(header: Header, max_size: int) -> None:
    """Raise ProtocolError as `parse_header`."""
    if not Header.SIZE <= header.message_size <= max_size:
        raise ProtocolError(f"message size {header.message_size} bytes, need {Header.SIZE} to {max_size}")
    flags = header.flags
    if flags.kind not in (KIND_COMMAND, KIND_REPLY):
        raise ProtocolError(f"message type {flags.kind}, limit {KIND_REPLY}")
    if flags >> 6:
        raise ProtocolError(f"message flags {int(flags):#x}, limit 0x3f")
    if flags.kind == KIND_COMMAND and flags.error:
        raise ProtocolError(f"message flags {int(flags):#x}: a command cannot be an error")


def command_of(number: int) -> Command:
    """The command's row. Raises ProtocolError for a number without one."""
    command = COMMANDS.get(number)
    if command is None:
        raise ProtocolError(f"unknown command {number}, limit {max(COMMANDS)}")
    return command


def parse_request(number: int, payload: Buffer) -> tuple[Any, bytes]:
    """A command's structure (None for DEVICE_RESET) and the data behind it. Raises ProtocolError."""
    command = command_of(number)
    return command.request.parse(command.name, payload)


def parse_reply(number: int, payload: Buffer) -> tuple[Any, bytes]:
    """The same for a reply without the error flag. Raises ProtocolError."""
    command = command_of(number)
    return command.reply.parse(f"reply to {command.name}", payload)


def encode_request(message_id: int, number: int, payload: bytes = b"", *, no_reply: bool = False) -> bytes:
    """A command. Raises UsageError for a number that does not fit."""
    flags = HeaderFlags.of(kind=KIND_COMMAND, no_reply=no_reply)
    size = Header.SIZE + len(payload)
    return Header(message_id=message_id, command=number, message_size=size, flags=flags).pack() + payload


def encode_reply(request: Header, payload: bytes = b"") -> bytes:
    """The answer to a command."""
    flags = HeaderFlags.of(kind=KIND_REPLY)
    size = Header.SIZE + len(payload)
    return Header(message_id=request.message_id, command=request.command, message_size=size, flags=flags).pack() + payload


def encode_error(request: Header, error: int) -> bytes:
    """The refusal of a command. error: an errno, 1 to 4095; UsageError for others."""
    if not 0 < error <= MAX_ERRNO:
        raise UsageError(f"errno {error}: take 1 to {MAX_ERRNO}")
    flags = HeaderFlags.of(kind=KIND_REPLY, error=1)
    return Header(message_id=request.message_id, command=request.command, flags=flags, error=error).pack()
