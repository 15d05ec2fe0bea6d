"""The card's objects: what RNDIS queries read and sets change."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Protocol

from ...wire import ndis, oid
from ...wire.ndis import ChecksumIpv4, ChecksumIpv6, ChecksumOffload, ObjectHeader, Offload, RssCapabilities


class Card(Protocol):
    """The card whose objects these are."""

    mac: bytes
    mtu: int
    link: bool
    bits_per_second: int

    def counter(self, name: str) -> int:
        """A counter of the data plane, by its field in the NIC record."""


_VENDOR = b"vfio-vmbus embedded netvsp\0"


def _u32(value: int) -> bytes:
    return struct.pack("<I", min(value, 0xFFFFFFFF))


_OFFLOAD_FORMS = (
    (Offload.SIZE, ndis.OFFLOAD_REVISION_3),
    (ndis.OFFLOAD_SIZE_6_1, ndis.OFFLOAD_REVISION_2),
    (ndis.OFFLOAD_SIZE_6_0, ndis.OFFLOAD_REVISION_1),
)


def _offloads(room: int) -> bytes:
    """What we compute for a guest: IPv4 header, TCP and UDP checksums of frames that it sends; and say of frames it receives.

    In the longest form that has `room`; each is the next one's beginning.
    """
    all_v4 = ChecksumIpv4.of(ip_options=1, tcp_options=1, tcp=1, udp=1, ip=1)
    all_v6 = ChecksumIpv6.of(tcp_options=1, tcp=1, udp=1)
    encapsulation = ndis.ENCAPSULATION_8023
    checksum = ChecksumOffload(
        ipv4_tx_encapsulation=encapsulation,
        ipv4_tx=all_v4,
        ipv4_rx_encapsulation=encapsulation,
        ipv4_rx=all_v4,
        ipv6_tx_encapsulation=encapsulation,
        ipv6_tx=all_v6,
        ipv6_rx_encapsulation=encapsulation,
        ipv6_rx=all_v6,
    )
    size, revision = next((form for form in _OFFLOAD_FORMS if form[0] <= room), _OFFLOAD_FORMS[-1])
    header = ObjectHeader(object_type=ndis.OBJECT_OFFLOAD, revision=revision, size=size)
    return Offload(header=header, checksum=checksum).pack()[:size]


def _receive_scaling() -> bytes:
    """One queue. The table's size, a power of two, is to be said all the same (NDIS_RECEIVE_SCALE_CAPABILITIES, since NDIS 6.30):
    DPDK takes it for a limit on queues (hn_rndis_query_rsscaps in drivers/net/netvsc), and is left with none if it is 0."""
    return RssCapabilities(interrupt_count=1, queue_count=1, table_entries=ndis.RSS_MAX_TABLE_ENTRIES).pack()


@dataclass
class Objects:
    """State behind the objects that a guest may set, and the answers to its queries."""

    card: Card
    packet_filter: int = 0
    multicast: list[bytes] = field(default_factory=list)

    def query(self, number: int, room: int = 0) -> tuple[int, bytes]:
        """Status and value of an object. room: bytes of the buffer that the guest asked with; 0: it names none, and takes what comes."""
        room = room or _NO_LIMIT
        status, value = self._value(number, room)
        return (status, value) if len(value) <= room else (oid.STATUS_BUFFER_TOO_SHORT, b"")

    def _value(self, number: int, room: int) -> tuple[int, bytes]:
        values = {
            oid.OID_GEN_HARDWARE_STATUS: lambda: _u32(0),
            oid.OID_GEN_MEDIA_SUPPORTED: lambda: _u32(oid.MEDIUM_802_3),
            oid.OID_GEN_MEDIA_IN_USE: lambda: _u32(oid.MEDIUM_802_3),
            oid.OID_GEN_MAXIMUM_LOOKAHEAD: lambda: _u32(self.card.mtu),
            oid.OID_GEN_MAXIMUM_FRAME_SIZE: lambda: _u32(self.card.mtu),
            oid.OID_GEN_MAXIMUM_TOTAL_SIZE: lambda: _u32(self.card.mtu + 14),
            oid.OID_GEN_LINK_SPEED: lambda: _u32(self.card.bits_per_second // 100),
            oid.OID_GEN_VENDOR_ID: lambda: _u32(0xFFFFFF),
            oid.OID_GEN_VENDOR_DESCRIPTION: lambda: _VENDOR,
            oid.OID_GEN_CURRENT_PACKET_FILTER: lambda: _u32(self.packet_filter),
            oid.OID_GEN_MEDIA_CONNECT_STATUS: self._media_state,
            oid.OID_GEN_MAXIMUM_SEND_PACKETS: lambda: _u32(1),
            oid.OID_GEN_XMIT_OK: lambda: _u32(self.card.counter("sent_frames")),
            oid.OID_GEN_RCV_OK: lambda: _u32(self.card.counter("received_frames")),
            oid.OID_GEN_XMIT_ERROR: lambda: _u32(self.card.counter("bad_messages") + self.card.counter("faults")),
            oid.OID_GEN_RCV_ERROR: lambda: _u32(0),
            oid.OID_GEN_RCV_NO_BUFFER: lambda: _u32(self.card.counter("no_buffer")),
            oid.OID_802_3_PERMANENT_ADDRESS: lambda: self.card.mac,
            oid.OID_802_3_CURRENT_ADDRESS: lambda: self.card.mac,
            oid.OID_802_3_MULTICAST_LIST: lambda: b"".join(self.multicast),
            oid.OID_802_3_MAXIMUM_LIST_SIZE: lambda: _u32(MAX_MULTICAST),
            oid.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES: lambda: _offloads(room),
            oid.OID_GEN_RECEIVE_SCALE_CAPABILITIES: _receive_scaling,
        }
        if number == oid.OID_GEN_SUPPORTED_LIST:
            return oid.STATUS_SUCCESS, b"".join(_u32(known) for known in sorted([number, *values]))
        value = values.get(number)
        return (oid.STATUS_SUCCESS, value()) if value else (oid.STATUS_NOT_SUPPORTED, b"")

    def set(self, number: int, value: bytes) -> int:
        """Change an object. Returns its status."""
        if number == oid.OID_GEN_CURRENT_PACKET_FILTER:
            if len(value) < 4:
                return oid.STATUS_INVALID_LENGTH
            self.packet_filter = struct.unpack_from("<I", value)[0]
        elif number == oid.OID_802_3_MULTICAST_LIST:
            if len(value) % 6:
                return oid.STATUS_INVALID_LENGTH
            if len(value) > 6 * MAX_MULTICAST:
                return oid.STATUS_MULTICAST_FULL
            self.multicast = [value[at : at + 6] for at in range(0, len(value), 6)]
        elif number not in _ACCEPTED:
            return oid.STATUS_NOT_SUPPORTED
        return oid.STATUS_SUCCESS

    def _media_state(self) -> bytes:
        return _u32(oid.MEDIA_STATE_CONNECTED if self.card.link else oid.MEDIA_STATE_DISCONNECTED)


MAX_MULTICAST = 32
_NO_LIMIT = 1 << 32

_ACCEPTED = frozenset(
    {
        oid.OID_TCP_OFFLOAD_PARAMETERS,  # each frame says itself what is to be computed
        oid.OID_GEN_RECEIVE_SCALE_PARAMETERS,  # there is one queue to spread over
        oid.OID_GEN_RNDIS_CONFIG_PARAMETER,
        oid.OID_GEN_CURRENT_LOOKAHEAD,
    }
)
