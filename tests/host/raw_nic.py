"""A network card's driver as DPDK's netvsc PMD is one on uio_hv_generic: its buffers are shared before the channel opens, and outlive it.

Every step is one call, so that a test can leave some out, repeat them, or do something else in between.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

from tests.host.raw_client import eventually
from vfio_vmbus.memory.mapping import PAGE, Mapping
from vfio_vmbus.ring.pair import RingPair
from vfio_vmbus.wire import nvsp, oid, rndis
from vfio_vmbus.wire import vmbus as wire
from vfio_vmbus.wire.gpa import PageRange
from vfio_vmbus.wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND, PACKET_XFER_PAGES, Packet
from vfio_vmbus.wire.table import Side

AnswerT = TypeVar("AnswerT", bound=nvsp.NvspMessage)

RING = 16
"""Pages of each ring."""
BUFFER = 256
"""Pages of each buffer."""


class Buffer(Protocol):
    """Memory that a client can share."""

    size: int

    @property
    def pfns(self) -> tuple[int, ...]: ...
    @property
    def mapping(self) -> Mapping: ...
    def close(self) -> None: ...


class Client(Protocol):
    """What a driver needs of a client that is connected: RawClient, or a guest."""

    def memory(self, pages: int, *, name: str) -> Any: ...
    def rings(self, buffer: Any, downstream: int, relid: int) -> RingPair: ...
    def share(self, pfns: Sequence[int], relid: int) -> wire.GpadlCreated: ...
    def unshare(self, handle: int, relid: int) -> None: ...
    def open(self, gpadl: int, downstream: int, relid: int) -> int: ...
    def say(self, *messages: wire.Message | bytes) -> None: ...


class RawNic:
    """Receive and send buffer are GPADLs from the beginning on; the channel is closed until `open`."""

    def __init__(self, client: Client, relid: int = 1) -> None:
        self.client = client
        self.relid = relid
        self.rings = client.memory(2 * RING, name="rings")
        self.receive = client.memory(BUFFER, name="receive")
        self.send = client.memory(BUFFER, name="send")
        self.pages = client.memory(64, name="pages")
        self.receive_gpadl = client.share(self.receive.pfns, relid).gpadl
        self.send_gpadl = client.share(self.send.pfns, relid).gpadl
        self.section = self.sections = self.send_section = 0
        self.packets: list[Packet] = []
        """What came, and nobody has asked for yet."""
        self.pair: RingPair | None = None
        self._ring_gpadl = 0

    def open(self) -> RawNic:
        """As vmbus_open: a GPADL of fresh rings, then the channel."""
        self.pair = self.client.rings(self.rings, RING * PAGE, self.relid)
        self._ring_gpadl = self.client.share(self.rings.pfns, self.relid).gpadl
        assert self.client.open(self._ring_gpadl, RING, self.relid) == 0
        return self

    def close_channel(self) -> None:
        """CLOSECHANNEL, and the rings' GPADL: nothing is halted or revoked before, and the buffers stay."""
        self.client.say(wire.CloseChannel(child_relid=self.relid))
        self.client.unshare(self._ring_gpadl, self.relid)
        self._pair.close()
        self.pair = None
        self.packets.clear()

    def handshake(self, version: int = nvsp.VERSION_6_1, mtu: int = 1514) -> rndis.InitializeComplete:
        """From NVSP's version to RNDIS' INITIALIZE, whose answer is returned."""
        assert self.ask(nvsp.Init(min_version=version, max_version=version), nvsp.InitComplete).negotiated_version == version
        self.inband(nvsp.SendNdisConfig(mtu=mtu))
        self.inband(nvsp.SendNdisVersion(major=6, minor=30))
        got = self.ask(
            nvsp.SendReceiveBuffer(gpadl=self.receive_gpadl, buffer_id=nvsp.RECEIVE_BUFFER_ID), nvsp.SendReceiveBufferComplete
        )
        assert got.status == nvsp.STATUS_SUCCESS
        self.section, self.sections = got.sections[0].sub_allocation_size, got.sections[0].sub_allocation_count
        sent = self.ask(nvsp.SendSendBuffer(gpadl=self.send_gpadl), nvsp.SendSendBufferComplete)
        assert sent.status == nvsp.STATUS_SUCCESS
        self.send_section = sent.section_size
        complete, _ = self.control(rndis.InitializeRequest(request_id=1, major_version=1, max_transfer_size=0x4000))
        assert isinstance(complete, rndis.InitializeComplete)
        return complete

    # Packets.

    @property
    def _pair(self) -> RingPair:
        assert self.pair is not None
        return self.pair

    def post(self, packet: Packet) -> None:
        eventually(lambda: self._pair.outgoing.send_packet(packet), "room in the ring")

    def inband(self, message: nvsp.NvspMessage, transaction: int = 0, *, completion: bool = False) -> None:
        self.post(
            Packet(
                packet_type=PACKET_INBAND,
                transaction_id=transaction,
                completion_requested=completion,
                payload=nvsp.encode_message(message),
            )
        )

    def next(self, kind: int) -> Packet:
        """Wait for the next packet of a type, and take it out of `packets`."""

        def there() -> bool:
            while (packet := self._pair.incoming.receive()) is not None:
                self.packets.append(packet)
            return any(packet.packet_type == kind for packet in self.packets)

        eventually(there, f"a packet of type {kind}")
        found = next(packet for packet in self.packets if packet.packet_type == kind)
        self.packets.remove(found)
        return found

    def ask(self, message: nvsp.NvspMessage, answer: type[AnswerT], transaction: int = 7) -> AnswerT:
        """A request and its completion, which is a whole message and echoes the transaction."""
        self.inband(message, transaction, completion=True)
        packet = self.next(PACKET_COMPLETION)
        assert packet.transaction_id == transaction
        assert len(packet.payload) >= nvsp.MESSAGE_SIZE
        got = nvsp.parse_message(packet.payload, sender=Side.HOST)
        assert isinstance(got, answer)
        return got

    def say(self, data: bytes, transaction: int = 0) -> None:
        """RNDIS control as DPDK sends it: GPA-direct, one page range, transaction id 0."""
        self.pages.mapping.write(0, data)
        pages = (PageRange(len(data), 0, (self.pages.pfns[0],)),)
        announce = nvsp.SendRndisPacket(channel_type=nvsp.CHANNEL_CONTROL)
        self.post(
            Packet(
                packet_type=PACKET_GPA_DIRECT,
                transaction_id=transaction,
                completion_requested=True,
                pages=pages,
                payload=nvsp.encode_message(announce),
            )
        )
        self.completed(transaction)

    def completed(self, transaction: int, status: int = nvsp.STATUS_SUCCESS) -> None:
        """Wait for the completion of an RNDIS packet: 40 bytes of type 108."""
        packet = self.next(PACKET_COMPLETION)
        assert packet.transaction_id == transaction
        assert len(packet.payload) == nvsp.MESSAGE_SIZE
        assert struct.unpack_from("<II", packet.payload) == (nvsp.SEND_RNDIS_PACKET_COMPLETE, status)

    def hear(self) -> tuple[rndis.RndisMessage, bytes]:
        """The host's next RNDIS control message, and its information; its section is given back."""
        packet = self.next(PACKET_XFER_PAGES)
        assert packet.transaction_id < self.sections
        announced = nvsp.parse_message(packet.payload, sender=Side.HOST)
        assert isinstance(announced, nvsp.SendRndisPacket)
        assert announced.channel_type == nvsp.CHANNEL_CONTROL
        (where,) = packet.ranges
        data = self.receive.mapping.read(where.byte_offset, where.byte_count)
        self.give_back(packet)
        return rndis.parse_message(data, sender=Side.HOST)

    def give_back(self, packet: Packet) -> None:
        payload = nvsp.encode_message(nvsp.SendRndisPacketComplete())
        self.post(Packet(packet_type=PACKET_COMPLETION, transaction_id=packet.transaction_id, payload=payload))

    def control(self, message: rndis.RndisMessage, info: bytes = b"") -> tuple[rndis.RndisMessage, bytes]:
        """A control request, and its answer."""
        self.say(rndis.encode_message(message, info))
        return self.hear()

    def query(self, number: int, room: bytes = b"") -> tuple[int, bytes]:
        """Status and value of an object, asked with an information buffer."""
        answer, value = self.control(rndis.QueryRequest(request_id=2, oid=number), room)
        assert isinstance(answer, rndis.QueryComplete)
        assert answer.request_id == 2
        return answer.status, value

    def set(self, number: int, value: bytes) -> int:
        answer, _ = self.control(rndis.SetRequest(request_id=3, oid=number), value)
        assert isinstance(answer, rndis.SetComplete)
        return answer.status

    def listen(self) -> None:
        """Let everything in."""
        assert self.set(oid.OID_GEN_CURRENT_PACKET_FILTER, struct.pack("<I", oid.PACKET_TYPE_PROMISCUOUS)) == 0

    def frames(self, count: int) -> list[bytes]:
        """The next `count` data messages."""
        found: list[bytes] = []
        while len(found) < count:
            packet = self.next(PACKET_XFER_PAGES)
            assert packet.transaction_id < self.sections
            found += [self.receive.mapping.read(where.byte_offset, where.byte_count) for where in packet.ranges]
            self.give_back(packet)
        return found

    def close(self) -> None:
        if self.pair is not None:
            self.pair.close()
        for buffer in (self.rings, self.receive, self.send, self.pages):
            buffer.close()

    def __enter__(self) -> RawNic:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
