"""VMBus control messages: connection, offers, GPADLs, channels. Versions 2.4 to 5.3.

Sources: include/linux/hyperv.h and drivers/hv/channel_mgmt.c of Linux 6.12; OpenVMM's vmbus_core (names of
the fields that Linux calls reserved, least versions). Every message begins with the 8-byte header.

`MESSAGES` is the table: number -> class; the class has NUMBER, SINCE (least connection version) and SENDER.
Messages that need a feature flag exist only from version 6.0 on and are not here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.layout import NIL_GUID, U8, U16, U32, U64, Buffer, Guid, Raw, Struct, Tail, struct
from vfio_vmbus.wire.table import Numbered, Table
from vfio_vmbus.wire.table import Side as Side

# Connection versions: major << 16 | minor.
VERSION_WS2008 = 0 << 16 | 13
VERSION_WIN7 = 1 << 16 | 1
VERSION_WIN8 = 2 << 16 | 4
VERSION_WIN8_1 = 3 << 16 | 0
VERSION_WIN10 = 4 << 16 | 0
VERSION_WIN10_V4_1 = 4 << 16 | 1
VERSION_WIN10_V5 = 5 << 16 | 0
VERSION_WIN10_V5_1 = 5 << 16 | 1
VERSION_WIN10_V5_2 = 5 << 16 | 2
VERSION_WIN10_V5_3 = 5 << 16 | 3

SUPPORTED_VERSIONS = (  # newest first, the order in which a guest asks
    VERSION_WIN10_V5_3,
    VERSION_WIN10_V5_2,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V4_1,
    VERSION_WIN10,
    VERSION_WIN8_1,
    VERSION_WIN8,
)

MAX_MESSAGE_SIZE = 240  # payload of a SynIC message, the header included
MAX_USER_DATA = 120
MAX_PIPE_USER_DATA = 116
MAX_RELID = 2047  # Hyper-V has 2048 channels, and numbers begin at 1
INVALID_RELID = 0xFFFFFFFF

# Where a guest posts its messages: until version 5.0 always 1; from then on contact goes to 4, and the rest
# to the connection that the version response names.
MESSAGE_CONNECTION_ID = 1
MESSAGE_CONNECTION_ID_4 = 4
MESSAGE_CONNECTION_ID_REDIRECT = 0x800074
MESSAGE_SINT = 2  # VMBUS_MESSAGE_SINT, the interrupt source of messages and events

CONNECTION_SUCCESSFUL = 0  # VersionResponse.connection_state
CONNECTION_FAILED_LOW_RESOURCES = 1
CONNECTION_FAILED_UNKNOWN = 2

VP_INDEX_DISABLE_INTERRUPT = 0xFFFFFFFF  # target_vp: no interrupts for this channel

# NTSTATUS values (MS-ERREF) that answers carry; anything but 0 is a failure.
STATUS_SUCCESS = 0
STATUS_UNSUCCESSFUL = 0xC0000001
STATUS_INVALID_PARAMETER = 0xC000000D
STATUS_INSUFFICIENT_RESOURCES = 0xC000009A

PIPE_MODE_BYTE = 0  # first 4 bytes of an offer's user data when it is a named pipe
PIPE_MODE_MESSAGE = 4

OFFERCHANNEL = 1
RESCIND_CHANNELOFFER = 2
REQUESTOFFERS = 3
ALLOFFERS_DELIVERED = 4
OPENCHANNEL = 5
OPENCHANNEL_RESULT = 6
CLOSECHANNEL = 7
GPADL_HEADER = 8
GPADL_BODY = 9
GPADL_CREATED = 10
GPADL_TEARDOWN = 11
GPADL_TORNDOWN = 12
RELID_RELEASED = 13
INITIATE_CONTACT = 14
VERSION_RESPONSE = 15
UNLOAD = 16
UNLOAD_RESPONSE = 17
TL_CONNECT_REQUEST = 21
MODIFYCHANNEL = 22
MODIFYCHANNEL_RESPONSE = 24


def version_text(version: int) -> str:
    """ "5.3" for 0x50003."""
    return f"{version >> 16}.{version & 0xFFFF}"


class FeatureFlags(BitField, width=32):
    """What both ends can do beyond their version. A host answers them from version 6.0 on only."""

    guest_specified_signal_parameters = Bits(0)
    channel_interrupt_redirection = Bits(1)
    modify_connection = Bits(2)
    client_id = Bits(3)
    confidential_channels = Bits(4)
    pause_resume = Bits(5)


class TargetInfo(BitField, width=64):
    """Where the host sends its messages, from version 5.0 on: in place of the interrupt page's address."""

    sint = Bits(0, 8)
    vtl = Bits(8, 8)
    feature_flags = Bits(32, 32)


class OfferFlags(BitField, width=16):
    """vmbus_channel_offer.chn_flags."""

    enumerate_device_interface = Bits(0)
    supports_transfer_pages = Bits(1)
    supports_gpadls = Bits(2)
    named_pipe_mode = Bits(4)
    loopback = Bits(8)
    parent = Bits(9)
    request_monitored_notification = Bits(10)
    tlnpi_provider = Bits(13)


class MonitorFlags(BitField, width=8):
    """Of an offer: whether `monitor_id` means something."""

    allocated = Bits(0)


class InterruptFlags(BitField, width=16):
    """Of an offer: with `dedicated`, the guest signals without the channel's bit in the interrupt page."""

    dedicated = Bits(0)


TABLE: Table["Message"] = Table("VMBus", version_text)


@struct(size=8)
class Message(Numbered):
    """The header that every message begins with, and base of them all."""

    message_type: U32 = 0
    padding: U32 = 0

    def __init_subclass__(cls, *, since: int, sender: Side) -> None:
        super().__init_subclass__()
        TABLE.add(cls, vars(cls)["message_type"], since=since, sender=sender)


@struct(size=40)
class InitiateContact(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Asks for a connection of one version. Before 5.0 `target_info` is the interrupt page's address."""

    message_type: U32 = INITIATE_CONTACT
    version_requested: U32 = 0
    target_vcpu: U32 = 0
    target_info: TargetInfo = TargetInfo(0)
    monitor_page1: U64 = 0  # host to guest, address in bytes
    monitor_page2: U64 = 0  # guest to host

    @property
    def interrupt_page(self) -> int:
        """Address in bytes; meaningful before version 5.0."""
        return int(self.target_info)


@struct(size=16)
class VersionResponse(Message, since=VERSION_WS2008, sender=Side.HOST):
    """Answers InitiateContact. With `version_supported` 0 the guest asks for an older one."""

    message_type: U32 = VERSION_RESPONSE
    version_supported: U8 = 0
    connection_state: U8 = CONNECTION_SUCCESSFUL
    padding2: U16 = 0
    message_connection_id: U32 = 0  # from 5.0 on


@struct(size=8)
class RequestOffers(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Asks for all offers."""

    message_type: U32 = REQUESTOFFERS


@struct(size=176)
class ChannelOffer(Struct):
    """What is offered: struct vmbus_channel_offer."""

    class_guid: Guid = NIL_GUID
    instance_guid: Guid = NIL_GUID
    interrupt_latency: U64 = 0  # in 100 ns; Linux calls it reserved1
    interface_revision: U32 = 0
    server_context_size: U32 = 0  # bytes
    flags: OfferFlags = OfferFlags(0)
    mmio_megabytes: U16 = 0
    user_defined: Annotated[bytes, Raw(MAX_USER_DATA)] = bytes(MAX_USER_DATA)
    sub_channel_index: U16 = 0  # 0 for the primary channel; since 2.4
    mmio_megabytes_optional: U16 = 0


@struct(size=196)
class OfferChannel(Message, since=VERSION_WS2008, sender=Side.HOST):
    """Offers a channel, numbered `child_relid`. `interrupt` and `connection_id` are valid from 1.1 on."""

    message_type: U32 = OFFERCHANNEL
    offer: ChannelOffer = ChannelOffer()
    child_relid: U32 = 0
    monitor_id: U8 = 0
    monitor: MonitorFlags = MonitorFlags(0)
    interrupt: InterruptFlags = InterruptFlags(0)
    connection_id: U32 = 0


@struct(size=8)
class AllOffersDelivered(Message, since=VERSION_WS2008, sender=Side.HOST):
    """Ends the answer to RequestOffers. Later offers are hot-plugged devices and subchannels."""

    message_type: U32 = ALLOFFERS_DELIVERED


@struct(size=12)
class RescindChannelOffer(Message, since=VERSION_WS2008, sender=Side.HOST):
    """Takes an offer back. The guest closes, tears down and answers with RelidReleased."""

    message_type: U32 = RESCIND_CHANNELOFFER
    child_relid: U32 = 0


@struct(size=12)
class RelidReleased(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """The guest has forgotten a rescinded channel: the number may be used again."""

    message_type: U32 = RELID_RELEASED
    child_relid: U32 = 0


@struct(size=148)
class OpenChannel(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Opens a channel over the rings in a GPADL: upstream at its beginning, downstream at the given page."""

    message_type: U32 = OPENCHANNEL
    child_relid: U32 = 0
    open_id: U32 = 0
    ring_gpadl: U32 = 0
    target_vp: U32 = 0  # since 2.4
    downstream_page_offset: U32 = 0  # in 4096-byte pages
    user_data: Annotated[bytes, Raw(MAX_USER_DATA)] = bytes(MAX_USER_DATA)


@struct(size=20)
class OpenChannelResult(Message, since=VERSION_WS2008, sender=Side.HOST):
    """Answers OpenChannel."""

    message_type: U32 = OPENCHANNEL_RESULT
    child_relid: U32 = 0
    open_id: U32 = 0
    status: U32 = STATUS_SUCCESS


@struct(size=12)
class CloseChannel(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Closes a channel. There is no answer."""

    message_type: U32 = CLOSECHANNEL
    child_relid: U32 = 0


MAX_GPADL_HEADER_WORDS = (MAX_MESSAGE_SIZE - 20) // 8
MAX_GPADL_BODY_WORDS = (MAX_MESSAGE_SIZE - 16) // 8
MAX_GPADL_RANGE_BYTES = 0xFFF8  # range_bytes is 16 bits and counts whole words: 8190 pages in one range


@struct(size=20)
class GpadlHeader(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Begins a GPADL. `words` begins its page list (wire/gpa.py), all of which takes `range_bytes`."""

    message_type: U32 = GPADL_HEADER
    child_relid: U32 = 0
    gpadl: U32 = 0
    range_bytes: U16 = 0
    range_count: U16 = 0
    words: Annotated[tuple[int, ...], Tail(U64, limit=MAX_GPADL_HEADER_WORDS)] = ()

    def check(self) -> None:
        if self.range_bytes % 8 or self.range_bytes < 16 * self.range_count or self.range_count == 0:
            raise ProtocolError(
                f"GpadlHeader: {self.range_count} ranges in {self.range_bytes} bytes; "
                f"need at least one, 16 bytes each, in whole 8-byte words"
            )
        if len(self.words) * 8 > self.range_bytes:
            raise ProtocolError(f"GpadlHeader: {len(self.words)} words, range_bytes is {self.range_bytes}")


@struct(size=16)
class GpadlBody(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Goes on with a GPADL's page list where header or previous body ended."""

    message_type: U32 = GPADL_BODY
    message_number: U32 = 0  # Linux leaves it 0: the order of arrival counts
    gpadl: U32 = 0
    words: Annotated[tuple[int, ...], Tail(U64, limit=MAX_GPADL_BODY_WORDS)] = ()

    def check(self) -> None:
        if not self.words:
            raise ProtocolError("GpadlBody: no words, need 1 or more")


@struct(size=20)
class GpadlCreated(Message, since=VERSION_WS2008, sender=Side.HOST):
    """Answers a complete GPADL."""

    message_type: U32 = GPADL_CREATED
    child_relid: U32 = 0
    gpadl: U32 = 0
    status: U32 = STATUS_SUCCESS


@struct(size=16)
class GpadlTeardown(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Asks the host to forget a GPADL."""

    message_type: U32 = GPADL_TEARDOWN
    child_relid: U32 = 0
    gpadl: U32 = 0


@struct(size=12)
class GpadlTorndown(Message, since=VERSION_WS2008, sender=Side.HOST):
    """The host no longer uses the GPADL's memory."""

    message_type: U32 = GPADL_TORNDOWN
    gpadl: U32 = 0


@struct(size=8)
class Unload(Message, since=VERSION_WS2008, sender=Side.GUEST):
    """Ends the connection."""

    message_type: U32 = UNLOAD


@struct(size=8)
class UnloadResponse(Message, since=VERSION_WIN7, sender=Side.HOST):
    """The connection has ended; the host uses none of the guest's memory."""

    message_type: U32 = UNLOAD_RESPONSE


@struct(size=40)
class TlConnectRequest(Message, since=VERSION_WIN10, sender=Side.GUEST):
    """A Hyper-V socket's connect() towards the host; the host answers with an offer."""

    message_type: U32 = TL_CONNECT_REQUEST
    guest_endpoint: Guid = NIL_GUID
    host_service: Guid = NIL_GUID


@struct(size=16)
class ModifyChannel(Message, since=VERSION_WIN10_V4_1, sender=Side.GUEST):
    """Moves a channel's interrupts to another processor. Answered from 5.3 on only."""

    message_type: U32 = MODIFYCHANNEL
    child_relid: U32 = 0
    target_vp: U32 = 0


@struct(size=16)
class ModifyChannelResponse(Message, since=VERSION_WIN10_V5_3, sender=Side.HOST):
    """Answers ModifyChannel."""

    message_type: U32 = MODIFYCHANNEL_RESPONSE
    child_relid: U32 = 0
    status: U32 = STATUS_SUCCESS


MESSAGES: Mapping[int, type[Message]] = MappingProxyType({kind.NUMBER: kind for kind in TABLE})


def parse_message(data: Buffer, *, sender: Side = Side.BOTH, version: int | None = None) -> Message:
    """Decode one message. Bytes behind it are ignored up to the 240 that a message can have.

    With `sender` and `version` (the negotiated one) a message that this side must not send, or that this
    version does not have, is refused too. Raises ProtocolError.
    """
    if len(data) > MAX_MESSAGE_SIZE:
        raise ProtocolError(f"message of {len(data)} bytes, limit {MAX_MESSAGE_SIZE}")
    message = TABLE.select(Message.unpack(data).message_type, sender, version).unpack(data)
    message.check()
    return message
