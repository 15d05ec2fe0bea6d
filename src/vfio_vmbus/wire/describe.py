"""Packets in words: what a person who watches a channel wants to see. Nothing here raises for what a peer sent."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire import dm, nvsp, rndis
from vfio_vmbus.wire.bits import BitField
from vfio_vmbus.wire.guids import CLASS_BALLOON, CLASS_NETWORK
from vfio_vmbus.wire.layout import Struct
from vfio_vmbus.wire.ring import (
    PACKET_CANCEL_REQUEST,
    PACKET_COMPLETION,
    PACKET_GPA_DIRECT,
    PACKET_GPADL,
    PACKET_INBAND,
    PACKET_XFER_PAGES,
    Packet,
)
from vfio_vmbus.wire.table import Side

PACKET_KINDS = {
    PACKET_INBAND: "in-band",
    PACKET_XFER_PAGES: "transfer-pages",
    PACKET_GPADL: "GPADL",
    PACKET_GPA_DIRECT: "GPA-direct",
    PACKET_CANCEL_REQUEST: "cancel",
    PACKET_COMPLETION: "completion",
}


@dataclass(frozen=True)
class Described:
    """A packet in words. message, fields: what its payload is, "" where that is not known; payload: its bytes."""

    sender: str
    kind: str
    transaction: int
    completion_requested: bool
    protocol: str
    message: str
    fields: dict[str, Any]
    pages: list[dict[str, Any]] = field(default_factory=list)
    pageset: int = 0
    ranges: list[dict[str, int]] = field(default_factory=list)
    payload: bytes = b""


def describe(packet: Packet, class_guid: UUID, sender: Side) -> Described:
    """A packet that `sender` sent on a channel of a device of this class."""
    protocol, message = _message(packet.payload, class_guid, sender)
    return Described(
        sender=sender.value,
        kind=PACKET_KINDS.get(packet.packet_type, f"type {packet.packet_type}"),
        transaction=packet.transaction_id,
        completion_requested=packet.completion_requested,
        protocol=protocol,
        message=type(message).__name__ if message is not None else "",
        fields=plain(message) if message is not None else {},
        pages=[{"bytes": each.byte_count, "offset": each.byte_offset, "pages": list(each.pfns)} for each in packet.pages],
        pageset=packet.pageset_id,
        ranges=[{"bytes": each.byte_count, "offset": each.byte_offset} for each in packet.ranges],
        payload=packet.payload,
    )


def describe_rndis(data: bytes, sender: Side) -> tuple[str, dict[str, Any]]:
    """The RNDIS message that begins `data`, which lies in a shared buffer or in pages: its name and fields; "" for what is none."""
    try:
        message, _ = rndis.parse_message(data, sender=sender)
    except ProtocolError:
        return "", {}
    return type(message).__name__, plain(message)


def plain(value: Struct) -> dict[str, Any]:
    """A structure as numbers, texts and lists of them; of bit fields their parts. Bytes are hexadecimal."""
    return {row.name: _plain(getattr(value, row.name)) for row in value.FIELDS}


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        return plain(value)
    if isinstance(value, BitField):
        return {name: (int(value) & part.mask) >> part.shift for name, part in value.PARTS.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, UUID) else value


def _message(payload: bytes, class_guid: UUID, sender: Side) -> tuple[str, Struct | None]:
    """The protocol's name and the message, None where the payload is none of it."""
    try:
        if class_guid == CLASS_BALLOON:
            return "dynamic memory", dm.parse_message(payload, sender=sender)
        if class_guid == CLASS_NETWORK:
            return "NVSP", nvsp.parse_message(payload, sender=sender)
    except ProtocolError:
        return "", None
    return "", None
