"""RNDIS: the control messages of a network card, and the header of its frames (the rest: wire/frame.py).

A message begins with its type and length. Offsets in a message count from byte 8, behind these two. Control
messages may carry an information buffer.
Sources: drivers/net/hyperv/hyperv_net.h and rndis_filter.c, include/linux/rndis.h of Linux 6.12.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

from vfio_vmbus.errors import ProtocolError, UsageError
from vfio_vmbus.wire.layout import U32, Buffer, struct
from vfio_vmbus.wire.table import Numbered, Side, Table

MAJOR_VERSION = 1
MINOR_VERSION = 0
OFFSET_BASE = 8  # offsets in a message count from here
COMPLETION = 0x80000000  # in the type of every answer

PACKET = 0x1
INITIALIZE = 0x2
HALT = 0x3
QUERY = 0x4
SET = 0x5
RESET = 0x6
INDICATE_STATUS = 0x7
KEEPALIVE = 0x8
INITIALIZE_COMPLETE = INITIALIZE | COMPLETION
QUERY_COMPLETE = QUERY | COMPLETION
SET_COMPLETE = SET | COMPLETION
RESET_COMPLETE = RESET | COMPLETION
KEEPALIVE_COMPLETE = KEEPALIVE | COMPLETION

TABLE: Table["RndisMessage"] = Table("RNDIS", str)


@struct(size=8)
class RndisMessage(Numbered):
    """The header that every message begins with, and base of them all. `message_length` is in bytes."""

    message_type: U32 = 0
    message_length: U32 = 0

    def __init_subclass__(cls, *, sender: Side) -> None:
        super().__init_subclass__()
        TABLE.add(cls, vars(cls)["message_type"], since=0, sender=sender)


@struct(size=44)
class PacketMessage(RndisMessage, sender=Side.BOTH):
    """A frame: struct rndis_packet behind the header."""

    message_type: U32 = PACKET
    data_offset: U32 = 0
    data_length: U32 = 0
    oob_offset: U32 = 0
    oob_length: U32 = 0
    oob_count: U32 = 0
    ppi_offset: U32 = 0  # 0 when there is none
    ppi_length: U32 = 0
    vc_handle: U32 = 0
    reserved: U32 = 0


@struct(size=24)
class InitializeRequest(RndisMessage, sender=Side.GUEST):
    """Begins the conversation. `max_transfer_size` is the longest message the guest takes, in bytes."""

    message_type: U32 = INITIALIZE
    request_id: U32 = 0
    major_version: U32 = MAJOR_VERSION
    minor_version: U32 = MINOR_VERSION
    max_transfer_size: U32 = 0


@struct(size=52)
class InitializeComplete(RndisMessage, sender=Side.HOST):
    """How many messages the host takes in one packet, how long, aligned to 1 << `alignment_shift` bytes."""

    message_type: U32 = INITIALIZE_COMPLETE
    request_id: U32 = 0
    status: U32 = 0
    major_version: U32 = MAJOR_VERSION
    minor_version: U32 = MINOR_VERSION
    device_flags: U32 = 0
    medium: U32 = 0
    max_packets_per_message: U32 = 0
    max_transfer_size: U32 = 0
    alignment_shift: U32 = 0
    af_list_offset: U32 = 0
    af_list_size: U32 = 0


@struct(size=12)
class HaltRequest(RndisMessage, sender=Side.GUEST):
    """Ends the conversation. Not answered."""

    message_type: U32 = HALT
    request_id: U32 = 0


@struct(size=28)
class QueryRequest(RndisMessage, sender=Side.GUEST):
    """Asks for an object's value."""

    message_type: U32 = QUERY
    request_id: U32 = 0
    oid: U32 = 0
    info_length: U32 = 0
    info_offset: U32 = 0
    vc_handle: U32 = 0


@struct(size=24)
class QueryComplete(RndisMessage, sender=Side.HOST):
    """The object's value is the information buffer."""

    message_type: U32 = QUERY_COMPLETE
    request_id: U32 = 0
    status: U32 = 0
    info_length: U32 = 0
    info_offset: U32 = 0


@struct(size=28)
class SetRequest(RndisMessage, sender=Side.GUEST):
    """Sets an object to the information buffer."""

    message_type: U32 = SET
    request_id: U32 = 0
    oid: U32 = 0
    info_length: U32 = 0
    info_offset: U32 = 0
    vc_handle: U32 = 0


@struct(size=16)
class SetComplete(RndisMessage, sender=Side.HOST):
    """Answers SetRequest."""

    message_type: U32 = SET_COMPLETE
    request_id: U32 = 0
    status: U32 = 0


@struct(size=12)
class ResetRequest(RndisMessage, sender=Side.GUEST):
    """Resets the card."""

    message_type: U32 = RESET
    reserved: U32 = 0


@struct(size=16)
class ResetComplete(RndisMessage, sender=Side.HOST):
    """With `addressing_reset` 1 the guest sets filter and multicast list again."""

    message_type: U32 = RESET_COMPLETE
    status: U32 = 0
    addressing_reset: U32 = 0


@struct(size=20)
class IndicateStatus(RndisMessage, sender=Side.HOST):
    """Something changed: link up, down, speed."""

    message_type: U32 = INDICATE_STATUS
    status: U32 = 0
    info_length: U32 = 0
    info_offset: U32 = 0


@struct(size=12)
class KeepaliveRequest(RndisMessage, sender=Side.BOTH):
    """Asks whether the other end lives."""

    message_type: U32 = KEEPALIVE
    request_id: U32 = 0


@struct(size=16)
class KeepaliveComplete(RndisMessage, sender=Side.BOTH):
    """Answers KeepaliveRequest."""

    message_type: U32 = KEEPALIVE_COMPLETE
    request_id: U32 = 0
    status: U32 = 0


InfoMessage: TypeAlias = QueryRequest | QueryComplete | SetRequest | IndicateStatus


def encode_message(message: RndisMessage, info: bytes = b"") -> bytes:
    """A control message with its information buffer behind it; lengths and offset are filled in here."""
    length = message.SIZE + len(info)
    if isinstance(message, InfoMessage):
        offset = message.SIZE - OFFSET_BASE if info else 0
        message = replace(message, message_length=length, info_length=len(info), info_offset=offset)
    elif info:
        raise UsageError(f"{type(message).__name__} has no information buffer, got {len(info)} bytes")
    else:
        message = replace(message, message_length=length)
    return message.pack() + info


def split_messages(data: Buffer) -> Iterator[memoryview]:
    """The messages that stand one behind the other in `data`. ProtocolError for a length that cannot be."""
    rest = memoryview(data)
    while len(rest):
        length = RndisMessage.unpack(rest).message_length
        if not RndisMessage.SIZE <= length <= len(rest):
            raise ProtocolError(f"RNDIS: message_length {length}, need {RndisMessage.SIZE}..{len(rest)}")
        yield rest[:length]
        rest = rest[length:]


def parse_message(data: Buffer, *, sender: Side) -> tuple[RndisMessage, bytes]:
    """Decode one message of `sender`: the message, and its information buffer (empty where there is none).

    A data message comes without its contents; `parse_packet` gives those. Bytes behind the message's length
    are ignored. Raises ProtocolError.
    """
    head = RndisMessage.unpack(data)
    kind = TABLE.select(head.message_type, sender)
    length = head.message_length
    if not kind.SIZE <= length <= len(data):
        raise ProtocolError(f"{kind.__name__}: message_length {length}, need {kind.SIZE}..{len(data)}")
    message = kind.unpack(data)
    if not isinstance(message, InfoMessage) or message.info_length == 0:
        return message, b""
    return message, bytes_at(data, message, "information", message.info_offset, message.info_length)


def bytes_at(data: Buffer, message: RndisMessage, what: str, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`, which counts from byte 8.

    ProtocolError unless they lie behind the message's fixed part and within its length.
    """
    begin = OFFSET_BASE + offset
    if begin < message.SIZE or begin + length > message.message_length:
        raise ProtocolError(
            f"{type(message).__name__}: {what} at byte {begin} for {length} bytes, need {message.SIZE}..{message.message_length}"
        )
    return bytes(data[begin : begin + length])
