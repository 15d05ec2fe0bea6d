"""The netvsc driver: from an offered network card to bursts of frames, and back.

Steps and their order as Linux takes them (drivers/net/hyperv/netvsc.c, rndis_filter.c): NVSP version, MTU and NDIS version, receive
buffer, send buffer, RNDIS initialisation, objects, packet filter. Falls back to what older hosts speak.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from types import TracebackType

from ...channel.device import READ, WRITE, DmaBuffer, SharedBuffer, VmbusDevice
from ...errors import ClosedError, PeerError, ProtocolError, RefusedError, RescindedError, UsageError
from ...wire import ndis, nvsp, oid, rndis
from ...wire.guids import CLASS_NETWORK
from ...wire.ring import PACKET_INBAND, Packet
from ...wire.table import Side
from .queue import Counters, Queue
from .rpc import Rpc
from .state import CHECKSUM_IP_HEADER, CHECKSUM_IPV4, CHECKSUM_IPV6, CHECKSUM_TCP, CHECKSUM_UDP

log = logging.getLogger("vfio_vmbus.netvsc")

RING_PAGES = 128
RECEIVE_BUFFER = 16 << 20
SEND_BUFFER = 4 << 20
POOL_SLOT = 16384
POOL_SLOTS = 128
DEFAULT_FILTER = oid.PACKET_TYPE_DIRECTED | oid.PACKET_TYPE_BROADCAST | oid.PACKET_TYPE_ALL_MULTICAST
MAX_MTU = 9000


@dataclass(frozen=True)
class NicInfo:
    """What handshake and objects said. mtu: bytes of an Ethernet payload. max_messages, section: how the host takes small frames."""

    mac: bytes
    mtu: int
    nvsp: str
    ndis: str
    link: bool
    bits_per_second: int
    queues: int
    checksum_offload: bool
    max_messages: int
    section: int
    receive_sections: int
    isolation: str


class Netvsc:
    """A network card that this process drives over `device` (which stays the caller's).

    mtu: 68 to 9000. packet_filter: NDIS bits (wire.oid.PACKET_TYPE_*). max_version: newest NVSP version to ask for. timeout: seconds
    that an answer may take. `queues[0]` sends and receives. Raises RefusedError when the host has no version in common or refuses a
    buffer, ProtocolError when it breaks the protocol, WaitTimeout when it says nothing.
    """

    def __init__(
        self,
        device: VmbusDevice,
        *,
        mtu: int = 1500,
        packet_filter: int = DEFAULT_FILTER,
        max_version: int = nvsp.VERSION_6_1,
        ring_pages: int = RING_PAGES,
        receive_buffer: int = RECEIVE_BUFFER,
        send_buffer: int = SEND_BUFFER,
        burst: int = 64,
        timeout: float = 5.0,
    ) -> None:
        if device.class_guid != CLASS_NETWORK:
            raise UsageError(f"{device.name} is no network card")
        if not 68 <= mtu <= MAX_MTU:
            raise UsageError(f"MTU {mtu}: take 68 to {MAX_MTU} bytes")
        self.device = device
        self.link = False
        self._mtu = mtu
        self._filter = packet_filter
        self._closed = False
        self._version = nvsp.VERSION_1  # until another one is agreed on
        self._channel = device.open(ring_pages)
        self._shared: list[SharedBuffer | DmaBuffer] = []
        self.queues = [Queue(self._channel, self.check, burst)]
        self._rpc = Rpc(self.queues[0], timeout, self.check, self._on_mail, self._on_control)
        try:
            self._version = self._agree(max_version)
            self._configure()
            self._receive_sections = self._share_receive_buffer(receive_buffer)
            self._section = self._share_send_buffer(send_buffer)
            self._initialise()
            self._check_mtu()
            self.mac = self.query(oid.OID_802_3_CURRENT_ADDRESS, 6)
            self.link = self._query32(oid.OID_GEN_MEDIA_CONNECT_STATUS) == oid.MEDIA_STATE_CONNECTED
            self._speed = self._query32(oid.OID_GEN_LINK_SPEED) * 100
            self._checksums = self._enable_checksums()
            self.set_filter(packet_filter)
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> NicInfo:
        """The card as it is now."""
        major, minor = self._ndis
        return NicInfo(
            mac=self.mac,
            mtu=self._mtu,
            nvsp=nvsp.version_text(self._version),
            ndis=f"{major}.{minor}",
            link=self.link,
            bits_per_second=self._speed,
            queues=len(self.queues),
            checksum_offload=self._checksums,
            max_messages=self._max_messages,
            section=self._section,
            receive_sections=self._receive_sections,
            isolation=self.device.isolation,
        )

    @property
    def queue(self) -> Queue:
        """The first queue."""
        return self.queues[0]

    def counters(self) -> Counters:
        """The first queue's counters."""
        return self.queue.counters()

    def checksum_wish(self, *, ipv6: bool = False, udp: bool = False, l4_offset: int = 34) -> int:
        """The `checksum` field of a frame whose checksums the host is to compute. l4_offset: bytes before its TCP or UDP header.

        Raises UsageError when this host does not.
        """
        if not self._checksums:
            raise UsageError("this host computes no checksums: do it in software")
        l3 = CHECKSUM_IPV6 if ipv6 else CHECKSUM_IPV4 | CHECKSUM_IP_HEADER
        return l3 | (CHECKSUM_UDP if udp else CHECKSUM_TCP) | l4_offset << 16

    def poll(self) -> None:
        """Take in what the host said between frames (link changes). Call it now and then; `link` is then as of now.

        Raises ProtocolError where the host broke a rule, RescindedError when it has taken the card away, as `check`.
        """
        self._rpc.poll()

    def check(self) -> None:
        """Raise RescindedError when the host has taken the card away; ClosedError, PeerError for what else has become of the way to it.

        The rings of such a card look empty for ever, so whoever waits calls this now and then; kernels may run on the queue meanwhile.
        """
        if self.device.rescinded:
            raise RescindedError(f"{self.device.name} was taken away by its host")

    def query(self, number: int, size: int = 0) -> bytes:
        """The value of an object; exactly `size` bytes, if given. Raises RefusedError, ProtocolError."""
        answer, value = self._rpc.ask_rndis(rndis.QueryRequest(oid=number), rndis.QueryComplete)
        if answer.status != oid.STATUS_SUCCESS:
            raise RefusedError(f"query of object {number:#010x}", answer.status)
        if size and len(value) < size:
            raise ProtocolError(f"object {number:#010x} has {len(value)} bytes, need {size}")
        return value[:size] if size else value

    def set(self, number: int, value: bytes) -> None:
        """Set an object. Raises RefusedError."""
        answer, _ = self._rpc.ask_rndis(rndis.SetRequest(oid=number), rndis.SetComplete, value)
        if answer.status != oid.STATUS_SUCCESS:
            raise RefusedError(f"setting of object {number:#010x}", answer.status)

    def set_filter(self, packet_filter: int) -> None:
        """Which frames are to come: NDIS bits. 0 stops reception."""
        self.set(oid.OID_GEN_CURRENT_PACKET_FILTER, struct.pack("<I", packet_filter))
        self._filter = packet_filter

    def close(self) -> None:
        """Stop, give the buffers back and close the channel: the device can be driven again. Whoever runs kernels on a queue ends first."""
        if self._closed:
            return
        self._closed = True
        if not self._is_gone():  # else there is nobody to say good-bye to
            self._rpc.leave(
                [
                    lambda: self.set_filter(0),
                    lambda: self._rpc.tell_rndis(rndis.HaltRequest()),
                    lambda: self._rpc.tell_nvsp(nvsp.RevokeReceiveBuffer(buffer_id=nvsp.RECEIVE_BUFFER_ID)),
                    lambda: self._rpc.tell_nvsp(nvsp.RevokeSendBuffer(buffer_id=nvsp.SEND_BUFFER_ID)),
                ]
            )
        self.queue.close()
        self._channel.close()
        for buffer in self._shared:
            buffer.close()

    def __enter__(self) -> Netvsc:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _is_gone(self) -> bool:
        """Was the device closed first, taken away by its host, or has the host failed?"""
        try:
            return self._channel.outgoing.mapping.closed or self.device.rescinded
        except (PeerError, ClosedError):
            return True

    def _agree(self, max_version: int) -> int:
        """NVSP Init, newest version first, as Linux: one version a question."""
        for version in (known for known in nvsp.SUPPORTED_VERSIONS if known <= max_version):
            answer = self._rpc.ask_nvsp(nvsp.Init(min_version=version, max_version=version), nvsp.InitComplete)
            if answer.status == nvsp.STATUS_SUCCESS and answer.negotiated_version in (version, 0):
                return version
        raise RefusedError("the host speaks no NVSP version that this driver knows")

    def _configure(self) -> None:
        if self._version >= nvsp.VERSION_2:
            capabilities = nvsp.Capabilities.of(ieee8021q=1)
            self._rpc.tell_nvsp(nvsp.SendNdisConfig(mtu=self._mtu + 14, capabilities=capabilities))
        elif self._mtu > 1500:
            raise RefusedError(f"MTU {self._mtu}: a host with NVSP 1 takes 1500 bytes at most")
        self._ndis = (6, 30) if self._version > nvsp.VERSION_4 else (6, 1)
        self._rpc.tell_nvsp(nvsp.SendNdisVersion(major=self._ndis[0], minor=self._ndis[1]))

    def _share_receive_buffer(self, size: int) -> int:
        limit = nvsp.MAX_RECEIVE_BUFFER_SIZE if self._version > nvsp.VERSION_2 else nvsp.MAX_RECEIVE_BUFFER_SIZE_LEGACY
        buffer = self.device.share(min(size, limit), READ | WRITE, "receive-buffer")
        self._shared.append(buffer)
        request = nvsp.SendReceiveBuffer(gpadl=buffer.handle, buffer_id=nvsp.RECEIVE_BUFFER_ID)
        answer = self._rpc.ask_nvsp(request, nvsp.SendReceiveBufferComplete)
        if answer.status != nvsp.STATUS_SUCCESS:
            raise RefusedError("the host refused the receive buffer", answer.status)
        if answer.section_count != 1 or answer.sections[0].offset != 0:
            raise ProtocolError(
                f"receive buffer in {answer.section_count} groups of sections; one that begins at 0 is understood"
            )
        sections = answer.sections[0]
        if sections.sub_allocation_size == 0 or sections.sub_allocation_size * sections.sub_allocation_count > buffer.size:
            raise ProtocolError(
                f"{sections.sub_allocation_count} receive sections of {sections.sub_allocation_size} bytes, limit {buffer.size}"
            )
        self.queue.use_receive_buffer(buffer, self._mtu + 14 + 4)
        return sections.sub_allocation_count

    def _share_send_buffer(self, size: int) -> int:
        buffer = self.device.share(min(size, nvsp.MAX_SEND_BUFFER_SIZE), READ, "send-buffer")
        self._shared.append(buffer)
        request = nvsp.SendSendBuffer(gpadl=buffer.handle, buffer_id=nvsp.SEND_BUFFER_ID)
        answer = self._rpc.ask_nvsp(request, nvsp.SendSendBufferComplete)
        if answer.status != nvsp.STATUS_SUCCESS:
            raise RefusedError("the host refused the send buffer", answer.status)
        if not 128 <= answer.section_size <= buffer.size:
            raise ProtocolError(f"send sections of {answer.section_size} bytes, limit 128 to {buffer.size}")
        pool = self.device.dma_buffer(POOL_SLOT * POOL_SLOTS, READ, "send-pool")
        self._shared.append(pool)
        self.queue.use_send_buffer(buffer, answer.section_size & -8, pool, POOL_SLOT)
        return answer.section_size

    def _initialise(self) -> None:
        request = rndis.InitializeRequest(max_transfer_size=0x4000)
        answer, _ = self._rpc.ask_rndis(request, rndis.InitializeComplete)
        if answer.status != oid.STATUS_SUCCESS:
            raise RefusedError("RNDIS initialisation", answer.status)
        if answer.alignment_shift > 12:
            raise ProtocolError(f"RNDIS messages aligned to 1 << {answer.alignment_shift} bytes, limit 1 << 12")
        self._max_messages = min(max(answer.max_packets_per_message, 1), 64)
        self.queue.set_limits(self._max_messages, 1 << answer.alignment_shift)

    def _check_mtu(self) -> None:
        """The host was told ours before it could say the most that it takes (NVSP has no answer to it)."""
        try:
            most = self._query32(oid.OID_GEN_MAXIMUM_FRAME_SIZE)
        except RefusedError:
            return  # it does not say
        if most < self._mtu:
            raise RefusedError(f"MTU {self._mtu}: this card takes {most} bytes at most")

    def _enable_checksums(self) -> bool:
        """Let the host compute and check checksums, if it can."""
        try:
            wanted = ndis.Offload(
                header=ndis.ObjectHeader(
                    object_type=ndis.OBJECT_OFFLOAD, revision=ndis.OFFLOAD_REVISION_3, size=ndis.Offload.SIZE
                )
            )
            answer, value = self._rpc.ask_rndis(
                rndis.QueryRequest(oid=oid.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES), rndis.QueryComplete, wanted.pack()
            )
            if answer.status != oid.STATUS_SUCCESS:
                return False
            offered = ndis.parse_offload(value).checksum
            if not (offered.ipv4_tx.tcp and offered.ipv4_tx.udp):
                return False
            both = ndis.TX_RX_ENABLED
            parameters = ndis.OffloadParameters(
                ipv4_checksum=both, tcp_ipv4_checksum=both, udp_ipv4_checksum=both, tcp_ipv6_checksum=both, udp_ipv6_checksum=both
            ).pack()
            old = self._version <= nvsp.VERSION_4
            self.set(oid.OID_TCP_OFFLOAD_PARAMETERS, parameters[: ndis.OFFLOAD_PARAMETERS_SIZE_OLD] if old else parameters)
        except RefusedError:
            return False
        return True

    def _query32(self, number: int) -> int:
        return int.from_bytes(self.query(number, 4), "little")

    def _on_mail(self, data: bytes) -> None:
        """An RNDIS message that answers nothing: a change of the link."""
        message, _ = rndis.parse_message(data, sender=Side.HOST)
        if not isinstance(message, rndis.IndicateStatus):
            raise ProtocolError(f"netvsc: {type(message).__name__} answers nothing that was asked")
        if message.status in (oid.STATUS_MEDIA_CONNECT, oid.STATUS_MEDIA_DISCONNECT):
            self.link = message.status == oid.STATUS_MEDIA_CONNECT
            log.info("%s: link %s", self.device.name, "up" if self.link else "down")

    def _on_control(self, packet: Packet) -> None:
        """An NVSP message that answers nothing."""
        if packet.packet_type != PACKET_INBAND:
            raise ProtocolError(f"netvsc: packet type {packet.packet_type} from the host")
        message = nvsp.parse_message(packet.payload, sender=Side.HOST, version=self._version)
        if not isinstance(message, nvsp.SendVfAssociation | nvsp.SendIndirectionTable):
            raise ProtocolError(f"netvsc: {type(message).__name__} answers nothing that was asked")
