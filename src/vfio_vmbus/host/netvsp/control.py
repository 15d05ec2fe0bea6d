"""netvsp's control plane: NVSP (versions, buffers) and RNDIS control messages of one channel.

It runs on the host's loop. The worker hands the guest's ring over (`owner`) when there is something in it that is not a data frame, and
goes on delivering frames meanwhile: so whatever it uses for that (the ring to the guest, the receive sections, `ready`) is touched here
only while it is parked, `exclusive`, once data may flow.
Order of messages as in Linux drivers/net/hyperv/netvsc.c; a message out of order or malformed ends the channel's use.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ...errors import IsolationFault, ProtocolError
from ...iommu.translation import READ, WRITE
from ...memory.block import Block
from ...wire import nvsp, oid, rndis
from ...wire.gpa import PageRange
from ...wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND, PACKET_XFER_PAGES, Packet, TransferRange
from ...wire.table import Side
from ..vsp import ChannelContext, HostGpadl
from .objects import Objects
from .receive import give_back_one
from .state import MAX_MESSAGES

MAX_TRANSACTION = (1 << 63) - 1
MAX_CONTROL = 4096
"""Bytes of a control transfer."""
MAX_WISH = 65535
"""Bytes of the longest frame that a guest may ask for; Linux lets an MTU of 65521 be set."""
MAX_WAITING = 16
"""Answers that may wait for room while more packets are taken."""
MAX_TRANSFER = 0x4000
"""Bytes of one RNDIS transfer, as promised to guests."""
ALIGNMENT_SHIFT = 3
_OVERHEAD = 64 + 4
"""Bytes of a receive section besides the frame: RNDIS header with per-packet information, and a VLAN tag in the frame."""


class Control:
    """The conversation on one open channel. `nic` is its record; answers wait in an outbox until ring and receive buffer have room.

    paused: a context in which the worker is parked; it does not nest.
    """

    def __init__(
        self,
        context: ChannelContext,
        nic: Block,
        objects: Objects,
        versions: tuple[int, ...],
        max_mtu: int,
        paused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.context = context
        self._paused = paused
        self.version: int | None = None
        self.receive: HostGpadl | None = None
        self.send: HostGpadl | None = None
        self.ready = False
        self._nic = nic
        self._objects = objects
        self._versions = versions
        self._max_frame = max_mtu + 14
        self._frame = 1514
        self._outbox: list[Callable[[], bool]] = []
        self._tables: dict[str, Block] = {}
        self._handlers: dict[type[nvsp.NvspMessage], Callable[..., nvsp.NvspMessage | None]] = {
            nvsp.Init: self._on_init,
            nvsp.SendNdisVersion: lambda message: None,
            nvsp.SendNdisConfig: self._on_config,
            nvsp.SendReceiveBuffer: self._on_receive_buffer,
            nvsp.RevokeReceiveBuffer: lambda message: self._revoke(self.drop_receive_buffer),
            nvsp.SendSendBuffer: self._on_send_buffer,
            nvsp.RevokeSendBuffer: lambda message: self._revoke(self.drop_send_buffer),
            nvsp.SwitchDataPath: lambda message: None,
            nvsp.SubchannelRequest: lambda message: nvsp.SubchannelComplete(status=nvsp.STATUS_SUCCESS, count=0),
            nvsp.PdApiRequest: lambda message: nvsp.PdApiComplete(operation=message.operation, status=nvsp.STATUS_FAIL),
        }

    @property
    def full(self) -> bool:
        """Do so many answers wait for room that nothing more is taken?"""
        return len(self._outbox) > MAX_WAITING

    def work(self, budget: int) -> bool:
        """Take up to `budget` packets, one only once data may flow. True when answers wait for room. Raises ProtocolError.

        A few may wait: among the packets behind may be the completion that makes room for them.
        """
        self.context.pair.outgoing.check()
        for _ in range(budget):
            if not self.flush() and self.full:
                return True
            packet = self.context.pair.incoming.receive()
            if packet is None:
                break
            self._take(packet)
            if self.ready:
                break
        return not self.flush()

    def flush(self) -> bool:
        """Send what waits. True when nothing waits any more."""
        if not self._outbox:
            return True
        with self._exclusive():
            while self._outbox and self._outbox[0]():
                self._outbox.pop(0)
        return not self._outbox

    def _exclusive(self) -> AbstractContextManager[None]:
        """The worker is parked, or has no business with this channel because no data may flow."""
        return self._paused() if self.ready else nullcontext()

    def _revoke(self, drop: Callable[[], None]) -> None:
        with self._exclusive():
            drop()

    def indicate(self, status: int) -> None:
        """Tell the guest of a change of the link."""
        if self.ready:
            self._send_rndis(rndis.encode_message(rndis.IndicateStatus(status=status)))

    def _take(self, packet: Packet) -> None:
        if packet.packet_type == PACKET_COMPLETION:
            with self._exclusive():
                give_back_one(self._nic.address, min(packet.transaction_id, MAX_TRANSACTION))
            return
        if packet.packet_type not in (PACKET_INBAND, PACKET_GPA_DIRECT):
            raise ProtocolError(f"netvsp: packet type {packet.packet_type}; in-band, GPA-direct and completions are understood")
        message = nvsp.parse_message(packet.payload, sender=Side.GUEST, version=self.version)
        if self.version is None and not isinstance(message, nvsp.Init):
            raise ProtocolError(f"netvsp: {type(message).__name__} before a version was agreed on")
        if isinstance(message, nvsp.SendRndisPacket):
            self._on_rndis(packet, message)
            return
        answer = self._handlers[type(message)](message)
        if answer is not None:
            self._complete(packet.transaction_id, answer)
        elif packet.completion_requested:
            self._complete(packet.transaction_id, None)

    def _complete(self, transaction: int, message: nvsp.NvspMessage | None) -> None:
        payload = nvsp.encode_message(message) if message else b""
        packet = Packet(packet_type=PACKET_COMPLETION, transaction_id=transaction, payload=payload)
        self._outbox.append(lambda: self.context.pair.outgoing.send_packet(packet))

    def _on_init(self, message: nvsp.Init) -> nvsp.NvspMessage:
        if self.version is not None:
            raise ProtocolError("netvsp: Init a second time")
        common = [known for known in self._versions if message.min_version <= known <= message.max_version]
        if not common:
            return nvsp.InitComplete(status=nvsp.STATUS_PROTOCOL_TOO_NEW, negotiated_version=nvsp.INVALID_VERSION)
        self.version = max(common)
        return nvsp.InitComplete(negotiated_version=self.version, max_mdl_chain_length=34, status=nvsp.STATUS_SUCCESS)

    def _on_config(self, message: nvsp.SendNdisConfig) -> None:
        """The guest's wish. Where that is more than the card takes it stands, as Linux asks for the card's maximum only later (an object),
        and is content with that then (rndis_filter_device_add)."""
        if not 14 + 68 <= message.mtu <= MAX_WISH:
            raise ProtocolError(f"netvsp: frames of {message.mtu} bytes; 82 to {MAX_WISH} can be asked for")
        self._frame = min(message.mtu, self._max_frame)

    def _on_receive_buffer(self, message: nvsp.SendReceiveBuffer) -> nvsp.NvspMessage:
        gpadl = self.context.gpadl(message.gpadl)
        section = -(-(self._frame + _OVERHEAD) // 256) * 256
        count = gpadl.mapping.size // section
        if self.receive is not None or gpadl.access & WRITE == 0 or count == 0:
            return nvsp.SendReceiveBufferComplete(status=nvsp.STATUS_FAIL)
        self.receive = gpadl
        self._nic["longest"] = self._frame + 4
        self._nic["receive"] = gpadl.mapping.address
        self._nic["receive_section"] = section
        self._nic["receive_sections"] = count
        self._tables = {name: Block("i8", count) for name in ("free", "chain", "head")}
        for name, table in self._tables.items():
            self._nic[name] = table.address
        self._tables["free"].array[:] = range(count - 1, -1, -1)  # the first section on top of the stack
        self._nic["free_count"] = count
        sections = (
            nvsp.ReceiveSection(offset=0, sub_allocation_size=section, sub_allocation_count=count, end_offset=section * count),
        )
        return nvsp.SendReceiveBufferComplete(status=nvsp.STATUS_SUCCESS, section_count=1, sections=sections)

    def _on_send_buffer(self, message: nvsp.SendSendBuffer) -> nvsp.NvspMessage:
        gpadl = self.context.gpadl(message.gpadl)
        section = nvsp.DEFAULT_SEND_SECTION_SIZE
        if self.send is not None or gpadl.access & READ == 0 or gpadl.mapping.size < section:
            return nvsp.SendSendBufferComplete(status=nvsp.STATUS_FAIL)
        self.send = gpadl
        self._nic["send"] = gpadl.mapping.address
        self._nic["send_section"] = section
        self._nic["send_sections"] = gpadl.mapping.size // section
        return nvsp.SendSendBufferComplete(status=nvsp.STATUS_SUCCESS, section_size=section)

    def drop_receive_buffer(self) -> None:
        """Use the receive buffer no more. With the worker parked."""
        self.ready = False
        self._nic["ready"] = 0
        self._nic["free_count"] = 0
        self._nic["receive_sections"] = 0
        self.receive = None

    def drop_send_buffer(self) -> None:
        """Use the send buffer no more. With the worker parked."""
        self._nic["send_sections"] = 0
        self.send = None

    def _on_rndis(self, packet: Packet, message: nvsp.SendRndisPacket) -> None:
        if message.channel_type == nvsp.CHANNEL_DATA:
            raise ProtocolError("netvsp: a data frame while RNDIS is not initialised")
        if message.channel_type != nvsp.CHANNEL_CONTROL:
            raise ProtocolError(f"netvsp: channel type {message.channel_type:#x}, limit {nvsp.CHANNEL_CONTROL}")
        status = nvsp.STATUS_SUCCESS
        try:
            data = self._control_bytes(packet, message)
        except IsolationFault:
            status, data = nvsp.STATUS_FAIL, b""
        if packet.completion_requested:
            self._complete(packet.transaction_id, nvsp.SendRndisPacketComplete(status=status))
        for part in rndis.split_messages(data):
            self._on_rndis_message(*rndis.parse_message(part, sender=Side.GUEST))

    def _control_bytes(self, packet: Packet, message: nvsp.SendRndisPacket) -> bytes:
        """A copy of what a control transfer carries, in a send section or in pages. Raises IsolationFault, ProtocolError."""
        if message.section_index != nvsp.NO_SECTION:
            sections = self._nic["send_sections"]
            if self.send is None or message.section_index >= sections or message.section_size > self._nic["send_section"]:
                raise ProtocolError(f"netvsp: {message.section_size} bytes of send section {message.section_index} of {sections}")
            return self.send.mapping.read(message.section_index * self._nic["send_section"], message.section_size)
        total = sum(item.byte_count for item in packet.pages)
        if total > MAX_CONTROL:
            raise ProtocolError(f"netvsp: control transfer of {total} bytes, limit {MAX_CONTROL}")
        return b"".join(self._read_range(item) for item in packet.pages)

    def _read_range(self, item: PageRange) -> bytes:
        out = bytearray()
        offset, left = item.byte_offset, item.byte_count
        for pfn in item.pfns:
            step = min(left, 4096 - offset)
            out += self.context.domain.read((pfn << 12) + offset, step)
            left -= step
            offset = 0
        return bytes(out)

    def _on_rndis_message(self, message: rndis.RndisMessage, info: bytes) -> None:
        match message:
            case rndis.InitializeRequest(request_id=request):
                self._initialise(request)
            case rndis.QueryRequest(request_id=request, oid=number, info_length=room):
                status, value = self._objects.query(number, room)
                self._send_rndis(rndis.encode_message(rndis.QueryComplete(request_id=request, status=status), value))
            case rndis.SetRequest(request_id=request, oid=number):
                status = self._objects.set(number, info)
                self._nic["filter"] = self._objects.packet_filter
                self._send_rndis(rndis.encode_message(rndis.SetComplete(request_id=request, status=status)))
            case rndis.KeepaliveRequest(request_id=request):
                self._send_rndis(rndis.encode_message(rndis.KeepaliveComplete(request_id=request)))
            case rndis.ResetRequest():
                self._objects.packet_filter = self._nic["filter"] = 0
                self._send_rndis(rndis.encode_message(rndis.ResetComplete(addressing_reset=1)))
            case rndis.HaltRequest():
                with self._exclusive():
                    self.ready = False
                    self._nic["ready"] = 0
                self._objects.packet_filter = self._nic["filter"] = 0
            case rndis.PacketMessage():
                raise ProtocolError("netvsp: a frame among control messages")

    def _initialise(self, request: int) -> None:
        if self.receive is None or self.send is None:
            raise ProtocolError("netvsp: RNDIS was initialised before both buffers were shared")
        self._nic["max_messages"] = MAX_MESSAGES
        self._nic["ready"] = 1
        self.ready = True
        answer = rndis.InitializeComplete(
            request_id=request,
            status=oid.STATUS_SUCCESS,
            device_flags=oid.DEVICE_CONNECTIONLESS,
            medium=oid.MEDIUM_802_3,
            max_packets_per_message=MAX_MESSAGES,
            max_transfer_size=MAX_TRANSFER,
            alignment_shift=ALIGNMENT_SHIFT,
        )
        self._send_rndis(rndis.encode_message(answer))

    def _send_rndis(self, data: bytes) -> None:
        self._outbox.append(lambda: self._try_rndis(data))

    def _try_rndis(self, data: bytes) -> bool:
        """Send a control message through the receive buffer; False while there is no section or no room in the ring."""
        free = self._nic["free_count"]
        if self.receive is None:
            return True  # nowhere to put it any more
        if free == 0:
            return False
        section = int(self._tables["free"].array[free - 1])
        offset = section * self._nic["receive_section"]
        self.receive.mapping.write(offset, data[: self._nic["receive_section"]])
        packet = Packet(
            packet_type=PACKET_XFER_PAGES,
            transaction_id=section,
            completion_requested=True,
            pageset_id=nvsp.RECEIVE_BUFFER_ID,
            ranges=(TransferRange(byte_count=len(data), byte_offset=offset),),
            payload=nvsp.encode_message(nvsp.SendRndisPacket(channel_type=nvsp.CHANNEL_CONTROL)),
        )
        if not self.context.pair.outgoing.send_packet(packet):
            return False
        self._nic["free_count"] = free - 1
        self._tables["chain"].array[section] = -1
        self._tables["head"].array[section] = 1
        return True
