"""Dynamic memory: the messages of the balloon device, in the payload of in-band packets.

They agree on a version and on capabilities; then the guest reports its memory pressure, the host asks it for pages (balloon), gives
them back (unballoon) and offers it more (hot add). Sources: drivers/hv/hv_balloon.c of Linux 6.12 for all of protocol 0.3 and 1.0;
QEMU's include/hw/hyperv/dynmem-proto.h for the bits that 2.0 added to capabilities. Pages are of 4096 bytes.

Each message says its own size; a request is answered by a message of its own, which Linux numbers anew.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.layout import U16, U32, U64, Buffer, Struct, Tail, struct
from vfio_vmbus.wire.table import Numbered, Side, Table

VERSION_0_3 = 0x00003
VERSION_1 = 0x10000
VERSION_2 = 0x20000
SUPPORTED_VERSIONS = (VERSION_2, VERSION_1, VERSION_0_3)  # newest first; Windows 10, 8 and 7, which Linux calls 3, 2 and 1

ERROR = 0
VERSION_REQUEST = 1
VERSION_RESPONSE = 2
CAPABILITIES_REPORT = 3
CAPABILITIES_RESPONSE = 4
STATUS_REPORT = 5
BALLOON_REQUEST = 6
BALLOON_RESPONSE = 7
UNBALLOON_REQUEST = 8
UNBALLOON_RESPONSE = 9
MEM_HOT_ADD_REQUEST = 10
MEM_HOT_ADD_RESPONSE = 11
INFO_MESSAGE = 12

INFO_TYPE_MAX_PAGE_CNT = 0

MAX_MESSAGE_SIZE = 4096  # bytes; neither side sends longer ones
MAX_RANGES = (MAX_MESSAGE_SIZE - 16) // 8
MAX_RANGE_PAGES = (1 << 24) - 1
MAX_START_PAGE = (1 << 40) - 1


def version_text(version: int) -> str:
    """ "2.0" for 0x20000."""
    return f"{version >> 16}.{version & 0xFFFF}"


TABLE: Table["DmMessage"] = Table("dynamic memory", version_text)


class LastAttempt(BitField, width=32):
    """Of a version request."""

    is_last_attempt = Bits(0)  # the guest has no other version to offer


class Accepted(BitField, width=64):
    """Of the answers about version and capabilities; the host's own capabilities are of 2.0."""

    is_accepted = Bits(0)
    hot_remove = Bits(1)
    suppress_pressure_reports = Bits(2)  # the host does not want status reports


class Capabilities(BitField, width=64):
    """What the guest can do."""

    balloon = Bits(0)
    hot_add = Bits(1)
    hot_add_alignment = Bits(2, 4)  # n: hot-added ranges are aligned to 2^n MiB
    hot_remove = Bits(6)


class PageSpan(BitField, width=64):
    """A range of pages: union dm_mem_page_range."""

    start_page = Bits(0, 40)
    page_count = Bits(40, 24)


class RangesBefore(BitField, width=32):
    """Of a balloon response: how many ranges it has, and whether another response follows."""

    more_pages = Bits(0)
    range_count = Bits(1, 31)


class MorePages(BitField, width=32):
    """Of an unballoon request: whether another one of the same transaction follows."""

    more_pages = Bits(0)


@struct(size=8)
class DmMessage(Numbered):
    """The header that every message begins with, and base of them all. size: bytes of the message, the header included."""

    message_type: U16 = 0
    size: U16 = 0
    transaction_id: U32 = 0

    def __init_subclass__(cls, *, since: int, sender: Side) -> None:
        super().__init_subclass__()
        TABLE.add(cls, vars(cls)["message_type"], since=since, sender=sender)


@struct(size=16)
class VersionRequest(DmMessage, since=VERSION_0_3, sender=Side.GUEST):
    """Asks for one version: major << 16 | minor. The guest tries others until one is taken."""

    message_type: U16 = VERSION_REQUEST
    version: U32 = 0
    flags: LastAttempt = LastAttempt(0)


@struct(size=16)
class VersionResponse(DmMessage, since=VERSION_0_3, sender=Side.HOST):
    """Answers VersionRequest."""

    message_type: U16 = VERSION_RESPONSE
    flags: Accepted = Accepted(0)


@struct(size=32)
class CapabilitiesReport(DmMessage, since=VERSION_0_3, sender=Side.GUEST):
    """What the guest can do, once a version is agreed on."""

    message_type: U16 = CAPABILITIES_REPORT
    capabilities: Capabilities = Capabilities(0)
    min_page_count: U64 = 0
    max_page_number: U64 = 0


@struct(size=16)
class CapabilitiesResponse(DmMessage, since=VERSION_0_3, sender=Side.HOST):
    """Answers CapabilitiesReport; a guest that is not accepted gives up."""

    message_type: U16 = CAPABILITIES_RESPONSE
    flags: Accepted = Accepted(0)


@struct(size=48)
class StatusReport(DmMessage, since=VERSION_0_3, sender=Side.GUEST):
    """Memory pressure, about once a second; not answered. In pages. Hosts look at `committed`, which counts what was ballooned."""

    message_type: U16 = STATUS_REPORT
    available: U64 = 0
    committed: U64 = 0
    page_file_size: U64 = 0
    zero_free: U64 = 0
    page_file_writes: U32 = 0
    io_diff: U32 = 0


@struct(size=16)
class BalloonRequest(DmMessage, since=VERSION_0_3, sender=Side.HOST):
    """Asks for so many pages; the guest may give fewer."""

    message_type: U16 = BALLOON_REQUEST
    page_count: U32 = 0
    reserved: U32 = 0


@struct(size=16)
class BalloonResponse(DmMessage, since=VERSION_0_3, sender=Side.GUEST):
    """The pages that the host gets; none: the guest has no more to give."""

    message_type: U16 = BALLOON_RESPONSE
    reserved: U32 = 0
    flags: RangesBefore = RangesBefore(0)
    ranges: Annotated[tuple[PageSpan, ...], Tail(PageSpan, limit=MAX_RANGES)] = ()

    def check(self) -> None:
        if self.flags.range_count != len(self.ranges):
            raise ProtocolError(f"BalloonResponse: range_count is {self.flags.range_count}, {len(self.ranges)} ranges follow")


@struct(size=16)
class UnballoonRequest(DmMessage, since=VERSION_0_3, sender=Side.HOST):
    """The pages that the guest gets back."""

    message_type: U16 = UNBALLOON_REQUEST
    flags: MorePages = MorePages(0)
    range_count: U32 = 0
    ranges: Annotated[tuple[PageSpan, ...], Tail(PageSpan, limit=MAX_RANGES, count="range_count")] = ()


@struct(size=8)
class UnballoonResponse(DmMessage, since=VERSION_0_3, sender=Side.GUEST):
    """Answers the last UnballoonRequest of a transaction."""

    message_type: U16 = UNBALLOON_RESPONSE


@struct(size=16)
class HotAddRequest(DmMessage, since=VERSION_0_3, sender=Side.HOST):
    """Offers the guest pages that it does not have yet; a second range, if there is one, is the region that they lie in."""

    message_type: U16 = MEM_HOT_ADD_REQUEST
    span: PageSpan = PageSpan(0)
    region: Annotated[tuple[PageSpan, ...], Tail(PageSpan, limit=1)] = ()


@struct(size=16)
class HotAddResponse(DmMessage, since=VERSION_0_3, sender=Side.GUEST):
    """Answers HotAddRequest. result 1 with no pages: the guest never takes any; 0: not now, the host may ask again."""

    message_type: U16 = MEM_HOT_ADD_RESPONSE
    page_count: U32 = 0
    result: U32 = 0


@struct(size=16)
class InfoMessage(DmMessage, since=VERSION_1, sender=Side.HOST):
    """Something worth knowing: `info_size` bytes that begin with an InfoHeader follow."""

    message_type: U16 = INFO_MESSAGE
    reserved: U32 = 0
    info_size: U32 = 0


@struct(size=8)
class InfoHeader(Struct):
    """What an InfoMessage is about. INFO_TYPE_MAX_PAGE_CNT: 64 bits follow, the most pages that the guest may ever get."""

    info_type: U32 = 0
    data_size: U32 = 0


def encode_message(message: DmMessage, info: bytes = b"") -> bytes:
    """The message as it is sent, its size filled in; `info` stands behind an InfoMessage. UsageError when it is too long."""
    packed = bytearray(message.pack() + info)
    if len(packed) > MAX_MESSAGE_SIZE:
        raise UsageError(f"{type(message).__name__} of {len(packed)} bytes, limit {MAX_MESSAGE_SIZE}")
    at = DmMessage.OFFSETS["size"]
    packed[at : at + 2] = len(packed).to_bytes(2, "little")
    return bytes(packed)


def parse_message(data: Buffer, *, sender: Side, version: int | None = None) -> DmMessage:
    """Decode a message of `sender`, which is as long as it says; bytes behind it are ignored. Raises ProtocolError.

    With `version`, the negotiated one, messages that it does not have are refused.
    """
    return _parse(data, sender, version)[0]


def parse_info(data: Buffer) -> tuple[InfoHeader, bytes]:
    """What an InfoMessage, `data` being all of it, says. Raises ProtocolError."""
    message, rest = _parse(data, Side.HOST, None)
    if not isinstance(message, InfoMessage) or message.info_size > len(rest):
        raise ProtocolError(f"{message!r} with {len(rest)} bytes behind it says nothing")
    header = InfoHeader.unpack(rest[: message.info_size])
    value = rest[header.SIZE : message.info_size]
    if header.data_size > len(value):
        raise ProtocolError(f"InfoHeader: data_size is {header.data_size} bytes, have {len(value)}")
    return header, bytes(value[: header.data_size])


def _parse(data: Buffer, sender: Side, version: int | None) -> tuple[DmMessage, Buffer]:
    header = DmMessage.unpack(data)
    kind = TABLE.select(header.message_type, sender, version)
    if not kind.SIZE <= header.size <= min(len(data), MAX_MESSAGE_SIZE):
        limit = min(len(data), MAX_MESSAGE_SIZE)
        raise ProtocolError(f"{kind.__name__}: size is {header.size} bytes, need {kind.SIZE} to {limit}")
    message = kind.unpack(data[: header.size])
    message.check()
    return message, data[message.nbytes : header.size]


def spans(pages: Iterable[int]) -> Iterator[PageSpan]:
    """Page numbers, in order, as ranges of neighbours."""
    start = count = 0
    for page in pages:
        if count and page == start + count and count < MAX_RANGE_PAGES:
            count += 1
            continue
        if count:
            yield PageSpan.of(start_page=start, page_count=count)
        start, count = page, 1
    if count:
        yield PageSpan.of(start_page=start, page_count=count)
