"""What some OIDs carry in their information buffers: offloads, receive scaling, configuration parameters.

Source: drivers/net/hyperv/hyperv_net.h of Linux 6.12, where these have C's natural alignment unless packed;
here the holes are fields. Every object begins with a header that names its type, revision and size.
"""

from typing import Annotated

from vfio_vmbus.errors import ProtocolError
from vfio_vmbus.wire.bits import BitField, Bits
from vfio_vmbus.wire.layout import U8, U16, U32, Array, Buffer, Raw, Struct, struct

OBJECT_DEFAULT = 0x80
OBJECT_RSS_CAPABILITIES = 0x88
OBJECT_RSS_PARAMETERS = 0x89
OBJECT_OFFLOAD = 0xA7

OFFLOAD_SIZE_6_0 = 112  # NDIS 6.0: without IPsec v2 and what follows it
OFFLOAD_SIZE_6_1 = 144  # NDIS 6.1: without RSC and encapsulation
OFFLOAD_PARAMETERS_SIZE_OLD = 22  # NVSP 4 and older
OFFLOAD_REVISION_1 = 1
OFFLOAD_REVISION_2 = 2
OFFLOAD_REVISION_3 = 3

# Values of the fields of OffloadParameters. 0 leaves a setting as it is.
NO_CHANGE = 0
TX_RX_DISABLED = 1
TX_ENABLED = 2
RX_ENABLED = 3
TX_RX_ENABLED = 4
LSO_V2_DISABLED = 1
LSO_V2_ENABLED = 2
RSC_DISABLED = 1
RSC_ENABLED = 2

ENCAPSULATION_8023 = 0x2  # bit of the `encapsulation` fields: plain Ethernet


class ChecksumIpv4(BitField, width=32):
    """What can be checksummed over IPv4. NDIS gives each two bits, and 1 means supported."""

    ip_options = Bits(0, 2)
    tcp_options = Bits(2, 2)
    tcp = Bits(4, 2)
    udp = Bits(6, 2)
    ip = Bits(8, 2)


class ChecksumIpv6(BitField, width=32):
    """What can be checksummed over IPv6."""

    ip_extensions = Bits(0, 2)
    tcp_options = Bits(2, 2)
    tcp = Bits(4, 2)
    udp = Bits(6, 2)


class LargeSendIpv6(BitField, width=32):
    """What large sends over IPv6 may contain."""

    ip_extensions = Bits(0, 2)
    tcp_options = Bits(2, 2)


@struct(size=4)
class ObjectHeader(Struct):
    """`size` is that of the whole object in bytes."""

    object_type: U8 = OBJECT_DEFAULT
    revision: U8 = 0
    size: U16 = 0


@struct(size=32)
class ChecksumOffload(Struct):
    """For each way and IP version: the encapsulation, and what can be checksummed."""

    ipv4_tx_encapsulation: U32 = 0
    ipv4_tx: ChecksumIpv4 = ChecksumIpv4(0)
    ipv4_rx_encapsulation: U32 = 0
    ipv4_rx: ChecksumIpv4 = ChecksumIpv4(0)
    ipv6_tx_encapsulation: U32 = 0
    ipv6_tx: ChecksumIpv6 = ChecksumIpv6(0)
    ipv6_rx_encapsulation: U32 = 0
    ipv6_rx: ChecksumIpv6 = ChecksumIpv6(0)


@struct(size=28)
class LargeSendOffload(Struct):
    """Large send version 2: sizes in bytes, at least `min_segments` segments."""

    ipv4_encapsulation: U32 = 0
    ipv4_max_size: U32 = 0
    ipv4_min_segments: U32 = 0
    ipv6_encapsulation: U32 = 0
    ipv6_max_size: U32 = 0
    ipv6_min_segments: U32 = 0
    ipv6_options: LargeSendIpv6 = LargeSendIpv6(0)


@struct(size=156)
class Offload(Struct):
    """What the card can offload, for OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES. Old hosts leave the end away."""

    header: ObjectHeader = ObjectHeader(object_type=OBJECT_OFFLOAD)
    checksum: ChecksumOffload = ChecksumOffload()
    large_send_v1: Annotated[tuple[int, ...], Array(U32, 4)] = (0,) * 4
    ipsec_v1: Annotated[tuple[int, ...], Array(U32, 7)] = (0,) * 7
    large_send: LargeSendOffload = LargeSendOffload()
    flags: U32 = 0
    ipsec_v2: Annotated[bytes, Raw(32)] = bytes(32)
    rsc_ipv4: U8 = 0
    rsc_ipv6: U8 = 0
    hole: U16 = 0
    encapsulation_flags: U32 = 0
    encapsulation_max_header: U32 = 0


def parse_offload(data: Buffer) -> Offload:
    """An Offload of any revision, what is missing at its end being zero. Raises ProtocolError."""
    header = ObjectHeader.unpack(data)
    if not OFFLOAD_SIZE_6_0 <= header.size <= len(data):
        raise ProtocolError(f"Offload: size says {header.size} bytes, need at least {OFFLOAD_SIZE_6_0}, have {len(data)}")
    return Offload.unpack(bytes(data[: header.size]).ljust(Offload.SIZE, b"\0"))


@struct(size=28)
class OffloadParameters(Struct):
    """Turns offloads on and off: OID_TCP_OFFLOAD_PARAMETERS. Old hosts are sent the first 22 bytes only."""

    header: ObjectHeader = ObjectHeader(revision=OFFLOAD_REVISION_3, size=28)
    ipv4_checksum: U8 = NO_CHANGE
    tcp_ipv4_checksum: U8 = NO_CHANGE
    udp_ipv4_checksum: U8 = NO_CHANGE
    tcp_ipv6_checksum: U8 = NO_CHANGE
    udp_ipv6_checksum: U8 = NO_CHANGE
    lso_v1: U8 = NO_CHANGE
    ipsec_v1: U8 = NO_CHANGE
    lso_v2_ipv4: U8 = NO_CHANGE
    lso_v2_ipv6: U8 = NO_CHANGE
    tcp_connection_ipv4: U8 = NO_CHANGE
    tcp_connection_ipv6: U8 = NO_CHANGE
    hole: U8 = 0
    flags: U32 = 0
    ipsec_v2: U8 = NO_CHANGE
    ipsec_v2_ipv4: U8 = NO_CHANGE
    rsc_ipv4: U8 = NO_CHANGE
    rsc_ipv6: U8 = NO_CHANGE
    encapsulated_task_offload: U8 = NO_CHANGE
    encapsulation_types: U8 = NO_CHANGE
    hole2: U16 = 0


RSS_REVISION_2 = 2
RSS_FLAG_DISABLE = 0x10
RSS_KEY_SIZE = 40
RSS_MAX_TABLE_ENTRIES = 128


class RssHash(BitField, width=32):
    """Function and inputs of the receive hash."""

    toeplitz = Bits(0)
    ipv4 = Bits(8)
    tcp_ipv4 = Bits(9)
    ipv6 = Bits(10)
    ipv6_extensions = Bits(11)
    tcp_ipv6 = Bits(12)
    tcp_ipv6_extensions = Bits(13)


@struct(size=18)
class RssCapabilities(Struct):
    """Answers OID_GEN_RECEIVE_SCALE_CAPABILITIES."""

    header: ObjectHeader = ObjectHeader(object_type=OBJECT_RSS_CAPABILITIES, revision=RSS_REVISION_2, size=18)
    flags: U32 = 0
    interrupt_count: U32 = 0
    queue_count: U32 = 0
    table_entries: U16 = 0


@struct(size=40)
class RssParameters(Struct):
    """OID_GEN_RECEIVE_SCALE_PARAMETERS: offsets count from this structure's beginning, sizes in bytes."""

    header: ObjectHeader = ObjectHeader(object_type=OBJECT_RSS_PARAMETERS, revision=RSS_REVISION_2, size=40)
    flags: U16 = 0
    base_cpu: U16 = 0
    hash: RssHash = RssHash(0)
    table_size: U16 = 0  # of 32-bit entries
    hole: U16 = 0
    table_offset: U32 = 0
    key_size: U16 = 0
    hole2: U16 = 0
    key_offset: U32 = 0
    processor_masks_offset: U32 = 0
    processor_mask_count: U32 = 0
    processor_mask_size: U32 = 0


CONFIG_TYPE_INTEGER = 0
CONFIG_TYPE_STRING = 2


@struct(size=20)
class ConfigParameter(Struct):
    """OID_GEN_RNDIS_CONFIG_PARAMETER: a name and a value, UTF-16 text; offsets count from here, in bytes."""

    name_offset: U32 = 0
    name_length: U32 = 0
    value_type: U32 = CONFIG_TYPE_STRING
    value_offset: U32 = 0
    value_length: U32 = 0
