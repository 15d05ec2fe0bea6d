"""A host that says what it is told to: a VmbusDevice over real rings whose other end is a script, for tests of drivers.

    host = ScriptedHost()
    host.nvsp[nvsp.Init] = lambda message: b"nonsense"      # what it answers, by type of message
    nic = Netvsc(ScriptedDevice(host))

There is no thread: the host takes its turn whenever the driver waits, or when a test calls `turn`. By default it is lawful.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from ..channel.device import Channel, SharedBuffer, VmbusDevice
from ..errors import RefusedError
from ..iommu.dma import DmaBuffer, DmaSpace
from ..memory.block import Block
from ..memory.mapping import PAGE, Piece
from ..memory.shared import SharedMemory
from ..ring import bursts
from ..ring.pair import RingPair
from ..wire import nvsp, oid, rndis
from ..wire.frame import Frame, encode_packet, parse_packet
from ..wire.guids import CLASS_NETWORK
from ..wire.ring import PACKET_COMPLETION, PACKET_INBAND, PACKET_XFER_PAGES, Packet
from ..wire.table import Side

RECEIVE_SECTION = 2048
SEND_SECTION = 6144
MAC = bytes.fromhex("00155d5c0001")

NvspAnswer = nvsp.NvspMessage | bytes | None
RndisAnswer = Sequence[bytes]


@dataclass
class _Map:
    """Memory that the driver mapped: where, and a descriptor of our own for it."""

    iova: int
    size: int
    fd: int


class ScriptedBuffer(SharedBuffer):
    """Shared memory, at the same address for both ends."""

    def __init__(self, handle: int, size: int) -> None:
        self.handle = handle
        self._memory = SharedMemory(-(-size // PAGE) * PAGE, "scripted")
        self.mapping = self._memory.map()
        self.address = self.mapping.address
        self.size = self.mapping.size

    def close(self) -> None:
        self.mapping.close()
        self._memory.close()


class ScriptedChannel(Channel):
    """Rings for both ends in one memory."""

    def __init__(self, host: ScriptedHost, ring_pages: int) -> None:
        size = ring_pages * PAGE
        self.relid = 1
        self.interrupt = -1
        self._host = host
        self._memory = SharedMemory(2 * size, "scripted")
        self._pair = RingPair.fresh(self._memory, 0, size, 2 * size, name="scripted channel")
        self.incoming = self._pair.incoming
        self.outgoing = self._pair.outgoing
        self.far = RingPair([Piece(self._memory.fd, 0, 2 * size)], size, Side.HOST, name="scripted host")

    def wait(self, seconds: float) -> bool:
        """The host's turn; a short sleep when it has nothing to say."""
        if self._host.turn():
            return True
        time.sleep(min(seconds, 0.001))
        return False

    def close(self) -> None:
        self._pair.close()
        self.far.close()
        self._memory.close()


class ScriptedDevice(VmbusDevice):
    """A network card of `host`; one channel at a time."""

    def __init__(self, host: ScriptedHost) -> None:
        self.class_guid = CLASS_NETWORK
        self.instance_guid = uuid4()
        self.name = "scripted card"
        self.isolation = ""
        self._host = host
        self._space = DmaSpace(host)
        self._channels: list[ScriptedChannel] = []

    def open(self, ring_pages: int, user_data: bytes = b"") -> Channel:
        channel = ScriptedChannel(self._host, ring_pages)
        self._channels.append(channel)
        self._host.pair = channel.far
        return channel

    def share(self, size: int, access: int, name: str) -> SharedBuffer:
        if len(self._host.buffers) >= self._host.most_buffers:
            raise RefusedError("scripted host: no more buffers")
        buffer = ScriptedBuffer(0xE1E10 + len(self._host.buffers), size)
        self._host.buffers[buffer.handle] = buffer
        return buffer

    def dma_buffer(self, size: int, access: int, name: str) -> DmaBuffer:
        return self._space.buffer(size, access, name)

    @property
    def rescinded(self) -> bool:
        return False

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for buffer in self._host.buffers.values():
            buffer.close()
        self._space.close()


class ScriptedHost:
    """The far end. `frames`, `completed` and `heard` note what the driver sent: frames, transactions completed, control messages."""

    def __init__(self, version: int = nvsp.VERSION_6_1) -> None:
        self.pair: RingPair | None = None
        self.buffers: dict[int, ScriptedBuffer] = {}
        self.most_buffers = 100
        self.completes = True
        """False: transfers are taken, noted in `outstanding`, and not completed."""
        self.outstanding: list[int] = []
        self.status = nvsp.STATUS_SUCCESS
        """What transfers are completed with."""
        self.max_messages = 8
        self.alignment_shift = 3
        self.frames: list[Frame] = []
        self.transfers: list[bytes] = []
        self.completed: list[int] = []
        self.heard: list[nvsp.NvspMessage | rndis.RndisMessage] = []
        self.objects: dict[int, bytes] = {
            oid.OID_802_3_CURRENT_ADDRESS: MAC,
            oid.OID_GEN_MEDIA_CONNECT_STATUS: bytes(4),
            oid.OID_GEN_LINK_SPEED: struct.pack("<I", 100_000),
        }
        self.receive: ScriptedBuffer | None = None
        self.send: ScriptedBuffer | None = None
        self._maps: list[_Map] = []
        self._section = 0
        self.nvsp: dict[type[nvsp.NvspMessage], Callable[..., NvspAnswer]] = {
            nvsp.Init: lambda message: self._init(message, version),
            nvsp.SendReceiveBuffer: self._receive_buffer,
            nvsp.SendSendBuffer: self._send_buffer,
        }
        self.rndis: dict[type[rndis.RndisMessage], Callable[..., RndisAnswer]] = {
            rndis.InitializeRequest: self._initialise,
            rndis.QueryRequest: self._query,
            rndis.SetRequest: lambda message, info: [rndis.encode_message(rndis.SetComplete(request_id=message.request_id))],
        }

    # What a lawful host answers.

    def _init(self, message: nvsp.Init, version: int) -> NvspAnswer:
        if message.max_version > version:
            return nvsp.InitComplete(status=nvsp.STATUS_PROTOCOL_TOO_NEW, negotiated_version=nvsp.INVALID_VERSION)
        return nvsp.InitComplete(status=nvsp.STATUS_SUCCESS, negotiated_version=message.max_version, max_mdl_chain_length=34)

    def _receive_buffer(self, message: nvsp.SendReceiveBuffer) -> NvspAnswer:
        self.receive = self.buffers[message.gpadl]
        count = self.receive.size // RECEIVE_SECTION
        section = nvsp.ReceiveSection(
            sub_allocation_size=RECEIVE_SECTION, sub_allocation_count=count, end_offset=count * RECEIVE_SECTION
        )
        return nvsp.SendReceiveBufferComplete(status=nvsp.STATUS_SUCCESS, section_count=1, sections=(section,))

    def _send_buffer(self, message: nvsp.SendSendBuffer) -> NvspAnswer:
        self.send = self.buffers[message.gpadl]
        return nvsp.SendSendBufferComplete(status=nvsp.STATUS_SUCCESS, section_size=SEND_SECTION)

    def _initialise(self, message: rndis.InitializeRequest, info: bytes) -> RndisAnswer:
        answer = rndis.InitializeComplete(
            request_id=message.request_id,
            max_packets_per_message=self.max_messages,
            max_transfer_size=0x4000,
            alignment_shift=self.alignment_shift,
        )
        return [rndis.encode_message(answer)]

    def _query(self, message: rndis.QueryRequest, info: bytes) -> RndisAnswer:
        value = self.objects.get(message.oid)
        status = oid.STATUS_NOT_SUPPORTED if value is None else oid.STATUS_SUCCESS
        return [rndis.encode_message(rndis.QueryComplete(request_id=message.request_id, status=status), value or b"")]

    # Taking what the driver sends.

    @property
    def _far(self) -> RingPair:
        if self.pair is None:
            raise RefusedError("scripted host: no channel is open")
        return self.pair

    def turn(self) -> bool:
        """Take everything that the driver has sent, and answer. True when there was anything."""
        some = False
        while (packet := self._far.incoming.receive()) is not None:
            some = True
            self.take(packet)
        return some

    def take(self, packet: Packet) -> None:
        """One packet of the driver's."""
        if packet.packet_type == PACKET_COMPLETION:
            self.completed.append(packet.transaction_id)
            return
        message = nvsp.parse_message(packet.payload, sender=Side.GUEST)
        if not isinstance(message, nvsp.SendRndisPacket):
            self.heard.append(message)
            speak = self.nvsp.get(type(message))
            answer = speak(message) if speak else None
            if answer is not None:
                self.complete(packet.transaction_id, answer)
            return
        data = self._transfer(packet, message)
        if not self.completes:
            self.outstanding.append(packet.transaction_id)
        elif packet.completion_requested:
            self.complete(packet.transaction_id, nvsp.SendRndisPacketComplete(status=self.status))
        if message.channel_type == nvsp.CHANNEL_DATA:
            self.transfers.append(data)
            self.frames += [parse_packet(part) for part in rndis.split_messages(data)]
            return
        for part in rndis.split_messages(data):
            request, info = rndis.parse_message(part, sender=Side.GUEST)
            self.heard.append(request)
            handler = self.rndis.get(type(request))
            for answer in handler(request, info) if handler else ():
                self.say(answer)

    def _transfer(self, packet: Packet, message: nvsp.SendRndisPacket) -> bytes:
        """The bytes that a transfer announces: in a send section, then in pages."""
        data = b""
        if message.section_index != nvsp.NO_SECTION and self.send is not None:
            data = self.send.mapping.read(message.section_index * SEND_SECTION, message.section_size)
        for item in packet.pages:
            data += self.read(item.pfns[0] * PAGE + item.byte_offset, item.byte_count)
        return data

    def read(self, iova: int, size: int) -> bytes:
        """Memory that the driver mapped, in one map."""
        for entry in self._maps:
            if entry.iova <= iova and iova + size <= entry.iova + entry.size:
                return os.pread(entry.fd, size, iova - entry.iova)
        raise RefusedError(f"scripted host: {size} bytes at IOVA {iova:#x} are not mapped")

    def map(self, iova: int, fd: int, offset: int, size: int, access: int) -> None:
        """The driver maps memory for us."""
        self._maps.append(_Map(iova, size, fd))

    def unmap(self, iova: int, size: int) -> None:
        """The driver takes it back."""
        self._maps = [entry for entry in self._maps if entry.iova != iova]

    # Saying what one likes.

    def post(self, packet: bytes) -> bool:
        """Put raw bytes into the ring as a packet (a multiple of 8 bytes). False when there is no room."""
        staged = Block("u1", len(packet))
        staged.array[:] = list(packet)
        return bool(bursts.send_packet(self._far.outgoing.address, staged.address, len(packet)))

    def complete(self, transaction: int, answer: nvsp.NvspMessage | bytes) -> bool:
        """A completion, due or not."""
        payload = answer if isinstance(answer, bytes) else nvsp.encode_message(answer)
        return self._far.outgoing.send(payload, packet_type=PACKET_COMPLETION, transaction_id=transaction)

    def inband(self, message: nvsp.NvspMessage | bytes) -> bool:
        """A message that answers nothing."""
        payload = message if isinstance(message, bytes) else nvsp.encode_message(message)
        return self._far.outgoing.send(payload, packet_type=PACKET_INBAND)

    def transfer(
        self,
        ranges: Sequence[tuple[int, int]],
        *,
        transaction: int = 0,
        pageset: int = nvsp.RECEIVE_BUFFER_ID,
        channel: int = nvsp.CHANNEL_DATA,
        count: int | None = None,
        offset8: int | None = None,
        length8: int | None = None,
        flags: int = 1,
    ) -> bool:
        """Announce (size, offset) ranges of the receive buffer, true or not; the header lies where it is told to."""
        lists = struct.pack("<HBBI", pageset, 0, 0, len(ranges) if count is None else count)
        lists += b"".join(struct.pack("<II", size & 0xFFFFFFFF, offset & 0xFFFFFFFF) for size, offset in ranges)
        payload = nvsp.encode_message(nvsp.SendRndisPacket(channel_type=channel))
        offset8 = (16 + len(lists)) // 8 if offset8 is None else offset8
        length8 = (16 + len(lists) + len(payload)) // 8 if length8 is None else length8
        return self.post(struct.pack("<HHHHQ", PACKET_XFER_PAGES, offset8, length8, flags, transaction) + lists + payload)

    def place(self, data: bytes, offset: int | None = None) -> tuple[int, int]:
        """Write into the receive buffer, at `offset` or in the next section: the range (size, offset)."""
        if self.receive is None:
            raise RefusedError("scripted host: the driver shared no receive buffer")
        if offset is None:
            offset = self._section * RECEIVE_SECTION
            self._section = (self._section + 1) % (self.receive.size // RECEIVE_SECTION)
        ctypes.memmove(self.receive.address + offset, data, len(data))
        return len(data), offset

    def say(self, message: bytes) -> bool:
        """Send an RNDIS message through the receive buffer."""
        where = self.place(message)
        return self.transfer([where], transaction=where[1] // RECEIVE_SECTION, channel=nvsp.CHANNEL_CONTROL)

    def deliver(self, frames: Sequence[Frame], *, transaction: int | None = None) -> bool:
        """Send frames, all in one transfer."""
        ranges = [self.place(encode_packet(frame)) for frame in frames]
        return self.transfer(ranges, transaction=ranges[0][1] // RECEIVE_SECTION if transaction is None else transaction)
