"""NVSP, the network card's own messages: in the payload of VMBus packets, 40 bytes each.

They agree on a version, hand over the shared buffers, and announce RNDIS messages (wire/rndis.py), which
carry everything else. Versions 1 to 6.1. Source: drivers/net/hyperv/hyperv_net.h and netvsc.c of Linux 6.12.

A request that wants an answer is an in-band packet (or GPA-direct, for RNDIS) with the completion flag, and
the answer is the payload of the completion packet with the same transaction id.
"""

from collections.abc import Sequence
from typing import Annotated

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.layout import U8, U16, U32, Buffer, Int, Raw, Struct, Tail, get_many, put_many, struct
from vfio_vmbus.wire.table import Numbered, Side, Table

VERSION_1 = 0x00002
VERSION_2 = 0x30002
VERSION_4 = 0x40000
VERSION_5 = 0x50000
VERSION_6 = 0x60000
VERSION_6_1 = 0x60001
INVALID_VERSION = 0xFFFFFFFF
SUPPORTED_VERSIONS = (VERSION_6_1, VERSION_6, VERSION_5, VERSION_4, VERSION_2, VERSION_1)  # newest first

MESSAGE_SIZE = 40  # what Linux and Windows send, whatever the message needs
RECEIVE_BUFFER_ID = 0xCAFE
SEND_BUFFER_ID = 0
NO_SECTION = 0xFFFFFFFF  # SendRndisPacket.section_index: the data is not in the send buffer
CHANNEL_DATA = 0  # SendRndisPacket.channel_type
CHANNEL_CONTROL = 1

MAX_RECEIVE_BUFFER_SIZE = 31 << 20  # bytes that a host takes
MAX_RECEIVE_BUFFER_SIZE_LEGACY = 15 << 20  # NVSP 2 and older
MAX_SEND_BUFFER_SIZE = 15 << 20
DEFAULT_RECEIVE_SECTION_SIZE = 1728
DEFAULT_SEND_SECTION_SIZE = 6144
MAX_RECEIVE_SECTIONS = 16  # groups of equal sections in an answer; hosts give one, Linux takes only one
MAX_TRANSFER_RANGES = 562  # ranges a host puts into one transfer-page packet
SEND_TABLE_SIZE = 16  # entries of the indirection table
MAX_CHANNELS = 64

STATUS_NONE = 0
STATUS_SUCCESS = 1
STATUS_FAIL = 2
STATUS_PROTOCOL_TOO_NEW = 3
STATUS_PROTOCOL_TOO_OLD = 4
STATUS_INVALID_RNDIS_PACKET = 5
STATUS_BUSY = 6
STATUS_PROTOCOL_UNSUPPORTED = 7

INIT = 1
INIT_COMPLETE = 2
SEND_NDIS_VERSION = 100
SEND_RECEIVE_BUFFER = 101
SEND_RECEIVE_BUFFER_COMPLETE = 102
REVOKE_RECEIVE_BUFFER = 103
SEND_SEND_BUFFER = 104
SEND_SEND_BUFFER_COMPLETE = 105
REVOKE_SEND_BUFFER = 106
SEND_RNDIS_PACKET = 107
SEND_RNDIS_PACKET_COMPLETE = 108
SEND_NDIS_CONFIG = 125
SEND_VF_ASSOCIATION = 128
SWITCH_DATA_PATH = 129
SUBCHANNEL = 133
SEND_INDIRECTION_TABLE = 134
PD_API = 135

DATA_PATH_SYNTHETIC = 0
DATA_PATH_VF = 1
SUBCHANNEL_ALLOCATE = 1
PD_API_CONFIG = 1


def version_text(version: int) -> str:
    """ "6.1" for 0x60001; versions 1 and 2 are numbered otherwise."""
    return {VERSION_1: "1", VERSION_2: "2"}.get(version, f"{version >> 16}.{version & 0xFFFF}")


TABLE: Table["NvspMessage"] = Table("NVSP", version_text)


@struct(size=4)
class NvspMessage(Numbered):
    """The header that every message begins with, and base of them all."""

    message_type: U32 = 0

    def __init_subclass__(cls, *, since: int, sender: Side) -> None:
        super().__init_subclass__()
        TABLE.add(cls, vars(cls)["message_type"], since=since, sender=sender)


@struct(size=12)
class Init(NvspMessage, since=VERSION_1, sender=Side.GUEST):
    """Asks for a version between two, both included. Linux asks for one at a time."""

    message_type: U32 = INIT
    min_version: U32 = 0
    max_version: U32 = 0


@struct(size=16)
class InitComplete(NvspMessage, since=VERSION_1, sender=Side.HOST):
    """Answers Init."""

    message_type: U32 = INIT_COMPLETE
    negotiated_version: U32 = 0
    max_mdl_chain_length: U32 = 0  # page ranges that a GPA-direct packet may have
    status: U32 = STATUS_NONE


@struct(size=12)
class SendNdisVersion(NvspMessage, since=VERSION_1, sender=Side.GUEST):
    """6.1 up to NVSP 4, 6.30 from NVSP 5 on. Not answered."""

    message_type: U32 = SEND_NDIS_VERSION
    major: U32 = 0
    minor: U32 = 0


@struct(size=10)
class SendReceiveBuffer(NvspMessage, since=VERSION_1, sender=Side.GUEST):
    """Hands over the buffer into which the host writes received frames."""

    message_type: U32 = SEND_RECEIVE_BUFFER
    gpadl: U32 = 0
    buffer_id: U16 = 0


@struct(size=16)
class ReceiveSection(Struct):
    """How the host divides a part of the receive buffer; all in bytes but the count."""

    offset: U32 = 0
    sub_allocation_size: U32 = 0
    sub_allocation_count: U32 = 0
    end_offset: U32 = 0


@struct(size=12)
class SendReceiveBufferComplete(NvspMessage, since=VERSION_1, sender=Side.HOST):
    """Answers SendReceiveBuffer."""

    message_type: U32 = SEND_RECEIVE_BUFFER_COMPLETE
    status: U32 = STATUS_NONE
    section_count: U32 = 0
    sections: Annotated[tuple[ReceiveSection, ...], Tail(ReceiveSection, count="section_count", limit=MAX_RECEIVE_SECTIONS)] = ()


@struct(size=6)
class RevokeReceiveBuffer(NvspMessage, since=VERSION_1, sender=Side.GUEST):
    """Takes the receive buffer back. Not answered with a message; its GPADL is torn down next."""

    message_type: U32 = REVOKE_RECEIVE_BUFFER
    buffer_id: U16 = 0


@struct(size=10)
class SendSendBuffer(NvspMessage, since=VERSION_1, sender=Side.GUEST):
    """Hands over the buffer from whose sections the host reads small frames."""

    message_type: U32 = SEND_SEND_BUFFER
    gpadl: U32 = 0
    buffer_id: U16 = 0


@struct(size=12)
class SendSendBufferComplete(NvspMessage, since=VERSION_1, sender=Side.HOST):
    """Answers SendSendBuffer. The host chooses the size of a section, in bytes."""

    message_type: U32 = SEND_SEND_BUFFER_COMPLETE
    status: U32 = STATUS_NONE
    section_size: U32 = 0


@struct(size=6)
class RevokeSendBuffer(NvspMessage, since=VERSION_1, sender=Side.GUEST):
    """Takes the send buffer back."""

    message_type: U32 = REVOKE_SEND_BUFFER
    buffer_id: U16 = 0


@struct(size=16)
class SendRndisPacket(NvspMessage, since=VERSION_1, sender=Side.BOTH):
    """Announces RNDIS messages, in a send buffer section, the packet's pages or its transfer ranges."""

    message_type: U32 = SEND_RNDIS_PACKET
    channel_type: U32 = CHANNEL_DATA
    section_index: U32 = NO_SECTION
    section_size: U32 = 0  # bytes used in the section


@struct(size=8)
class SendRndisPacketComplete(NvspMessage, since=VERSION_1, sender=Side.BOTH):
    """Answers SendRndisPacket: section, pages or ranges belong to the sender again."""

    message_type: U32 = SEND_RNDIS_PACKET_COMPLETE
    status: U32 = STATUS_SUCCESS


class Capabilities(BitField, width=64):
    """What the guest's end can do: nvsp_2_vsc_capability."""

    vmq = Bits(0)
    chimney = Bits(1)
    sriov = Bits(2)
    ieee8021q = Bits(3)
    correlation_id = Bits(4)
    teaming = Bits(5)  # needed to be told of changes of the link's speed
    virtual_subnet_id = Bits(6)
    rsc = Bits(7)  # received frames may be coalesced; since 6.1


@struct(size=20)
class SendNdisConfig(NvspMessage, since=VERSION_2, sender=Side.GUEST):
    """Tells the MTU, Ethernet header included, in bytes, and the capabilities. Not answered."""

    message_type: U32 = SEND_NDIS_CONFIG
    mtu: U32 = 0
    reserved: U32 = 0
    capabilities: Capabilities = Capabilities(0)


@struct(size=12)
class SendVfAssociation(NvspMessage, since=VERSION_4, sender=Side.HOST):
    """A virtual function that belongs to this card came or went."""

    message_type: U32 = SEND_VF_ASSOCIATION
    allocated: U32 = 0  # 1: `serial` is valid
    serial: U32 = 0


@struct(size=8)
class SwitchDataPath(NvspMessage, since=VERSION_4, sender=Side.GUEST):
    """Frames go through the card or its virtual function from now on. Completed without payload."""

    message_type: U32 = SWITCH_DATA_PATH
    active: U32 = DATA_PATH_SYNTHETIC


@struct(size=12)
class SubchannelRequest(NvspMessage, since=VERSION_5, sender=Side.GUEST):
    """Asks for more channels. They come as offers after the answer."""

    message_type: U32 = SUBCHANNEL
    operation: U32 = SUBCHANNEL_ALLOCATE
    count: U32 = 0


@struct(size=12)
class SubchannelComplete(NvspMessage, since=VERSION_5, sender=Side.HOST):
    """Answers SubchannelRequest with how many there will be."""

    message_type: U32 = SUBCHANNEL
    status: U32 = STATUS_NONE
    count: U32 = 0


@struct(size=12)
class SendIndirectionTable(NvspMessage, since=VERSION_5, sender=Side.HOST):
    """The channel to send on, by hash: `count` 32-bit indices, `offset` bytes from the message's start."""

    message_type: U32 = SEND_INDIRECTION_TABLE
    count: U32 = 0
    offset: U32 = 0


@struct(size=38)
class PdApiRequest(NvspMessage, since=VERSION_6, sender=Side.GUEST):
    """PacketDirect: an operation and its parameters, whose form depends on it. Linux sends none."""

    message_type: U32 = PD_API
    operation: U32 = PD_API_CONFIG
    parameters: Annotated[bytes, Raw(30)] = bytes(30)


@struct(size=12)
class PdApiComplete(NvspMessage, since=VERSION_6, sender=Side.HOST):
    """Answers PdApiRequest; all that a host without PacketDirect has to say."""

    message_type: U32 = PD_API
    operation: U32 = PD_API_CONFIG
    status: U32 = STATUS_NONE


@struct(size=5)
class PdConfigResult(Struct):
    """Behind PdApiComplete when the operation is PD_API_CONFIG."""

    queue_count: U16 = 0
    rss_queue_count: U8 = 0
    supported: U8 = 0
    enabled: U8 = 0


def encode_message(message: NvspMessage) -> bytes:
    """The message as it is sent: at least 40 bytes."""
    return message.pack().ljust(MESSAGE_SIZE, b"\0")


def parse_message(data: Buffer, *, sender: Side, version: int | None = None) -> NvspMessage:
    """Decode a message of `sender`; bytes behind it are ignored. Raises ProtocolError.

    With `version`, the negotiated one, messages that it does not have are refused.
    """
    message = TABLE.select(NvspMessage.unpack(data).message_type, sender, version).unpack(data)
    message.check()
    return message


_ENTRY = Int("I")


def encode_indirection_table(channels: Sequence[int]) -> bytes:
    """A SendIndirectionTable message with its entries behind it. UsageError unless there are 16."""
    if len(channels) != SEND_TABLE_SIZE:
        raise UsageError(f"indirection table of {len(channels)} entries, need {SEND_TABLE_SIZE}")
    out = bytearray(encode_message(SendIndirectionTable(count=len(channels), offset=MESSAGE_SIZE)))
    out += bytes(_ENTRY.size * len(channels))
    put_many(_ENTRY, out, MESSAGE_SIZE, tuple(channels))
    return bytes(out)


def decode_indirection_table(data: Buffer, version: int) -> tuple[int, ...]:
    """The entries of a SendIndirectionTable message, `data` being all of it. Raises ProtocolError.

    Hosts up to NVSP 6.0 give a wrong offset: there the entries stand behind the 40 bytes where there is room.
    """
    message = SendIndirectionTable.unpack(data)
    if message.count != SEND_TABLE_SIZE:
        raise ProtocolError(f"SendIndirectionTable: {message.count} entries, need {SEND_TABLE_SIZE}")
    size = message.count * _ENTRY.size
    offset = message.offset
    if version <= VERSION_6 and len(data) >= MESSAGE_SIZE + size:
        offset = MESSAGE_SIZE
    if offset < SendIndirectionTable.SIZE or offset + size > len(data):
        raise ProtocolError(
            f"SendIndirectionTable: {size} bytes at {offset}, need {SendIndirectionTable.SIZE} or more, "
            f"and an end within {len(data)}"
        )
    return get_many(_ENTRY, data, offset, message.count)
