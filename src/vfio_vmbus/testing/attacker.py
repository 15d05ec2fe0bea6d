"""A driver that turns on its host: it takes a network card into use as any driver does, then sends what it likes.

Nothing here is checked before it is sent; that the host checks is what the attacks (`hostile.ATTACKS`) are there to show.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..channel.connection import VmbusConnection
from ..channel.device import Channel, SharedBuffer, VmbusDevice
from ..channel.offered import OfferedDevice
from ..drivers.netvsc.driver import Netvsc
from ..errors import PeerError, UsageError, VfioVmbusError
from ..iommu.dma import DmaBuffer
from ..iommu.translation import READ, WRITE
from ..memory.block import Block
from ..memory.mapping import PAGE
from ..ring import bursts
from ..wire import nvsp
from ..wire.frame import Frame, encode_packet
from ..wire.ring import PACKET_COMPLETION, PACKET_GPA_DIRECT, PACKET_INBAND, PACKET_XFER_PAGES, Packet

MARK = b"<this frame holds memory that its sender must not reach>"
"""What forbidden memory is full of. Seen in a frame, it was read."""
BROADCAST = b"\xff" * 6
ETHERTYPE = 0x88B5
"""Local experiments (IEEE 802)."""

FIRST_TRANSACTION = 1 << 40
"""Above all that the driver itself uses."""
_BUFFERS: dict[str, Any] = {"ring_pages": 16, "receive_buffer": 1 << 20, "send_buffer": 1 << 19}


def marked_message(source: bytes, destination: bytes = BROADCAST, size: int = 512) -> bytes:
    """A data message that any host would forward: a frame of `size` bytes, full of MARK."""
    head = destination + source + struct.pack(">H", ETHERTYPE)
    return encode_packet(Frame((head + MARK * (size // len(MARK) + 1))[:size]), align=8)


WHOLE = len(marked_message(bytes(6)))
"""Bytes of a marked message as they begin each page of marked memory."""
PART = 304
"""Bytes of one that end each page: with the next page's bytes behind them they are a message, too."""


def marked_memory(source: bytes, size: int) -> bytes:
    """Content for forbidden memory: reading a page from its beginning or across its end gives what would be forwarded and seen."""
    message = marked_message(source)
    page = (message + MARK * (PAGE // len(MARK)))[: PAGE - PART] + message[:PART]
    return page * (size // PAGE)


@dataclass(frozen=True)
class Prey:
    """What belongs to others, as an attacker may come to know it: numbers."""

    iovas: tuple[int, ...] = ()
    """Pages that another client has mapped, and the attacker has not."""
    addresses: tuple[int, ...] = ()
    """Pages of the host's own memory."""
    handles: tuple[int, ...] = ()
    """GPADLs of another client."""


@dataclass(frozen=True)
class Outcome:
    """What the attacker saw of its requests: completed with success, with failure, not at all, or not taken from it (no room)."""

    tried: int
    succeeded: int = 0
    failed: int = 0
    unanswered: int = 0
    no_room: int = 0
    refused: tuple[str, ...] = ()
    """Refusals in words: errors that the host's answers became."""


@dataclass(frozen=True)
class Attack:
    """One thing to try. `run(attacker)` does it and says what it saw; the attacker is of no more use afterwards.

    lawful: every single request is allowed, only their number is not; then nobody needs to refuse anything.
    bus: it needs a VMBus connection of the attacker's own, to make GPADLs with.
    """

    name: str
    description: str
    run: Callable[[Attacker], Outcome]
    lawful: bool = False
    bus: bool = False


class _Noted(VmbusDevice):
    """A device that remembers what its driver made, so that it can be misused."""

    def __init__(self, device: VmbusDevice) -> None:
        self._device = device
        self.class_guid = device.class_guid
        self.instance_guid = device.instance_guid
        self.name = device.name
        self.isolation = device.isolation
        self.channels: list[Channel] = []
        self.shared: dict[str, SharedBuffer] = {}
        self.buffers: dict[str, DmaBuffer] = {}

    def open(self, ring_pages: int, user_data: bytes = b"") -> Channel:
        self.channels.append(self._device.open(ring_pages, user_data))
        return self.channels[-1]

    def share(self, size: int, access: int, name: str) -> SharedBuffer:
        self.shared[name] = self._device.share(size, access, name)
        return self.shared[name]

    def dma_buffer(self, size: int, access: int, name: str) -> DmaBuffer:
        self.buffers[name] = self._device.dma_buffer(size, access, name)
        return self.buffers[name]

    @property
    def rescinded(self) -> bool:
        return self._device.rescinded

    def close(self) -> None:
        self._device.close()


@dataclass
class _Tally:
    """Requests under way and how they ended."""

    tried: int = 0
    no_room: int = 0
    waiting: set[int] = field(default_factory=set)
    statuses: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class Attacker:
    """A client that has brought a card up over `device`, which stays the caller's: closing it ends the attacker, without a good-bye.

    prey: what belongs to others. patience: seconds to wait for answers that may never come; gone: says that none will, earlier.
    options: as of Netvsc, whose buffers are small here.
    Its own memory: `trap` (for the host to read), `deaf` (the host may only write), `mute` (the host may only read); all full of
    what `marked_memory` gives, so that none of it should ever be seen in a frame, and neither `deaf` nor `mute` should change.
    """

    def __init__(
        self,
        device: VmbusDevice,
        prey: Prey | None = None,
        *,
        patience: float = 0.3,
        gone: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> None:
        self.device = device
        self.prey = prey or Prey()
        self.patience = patience
        self.gone = gone
        self.listening = True
        """False: let answers pile up in the ring until the end."""
        self._noted = _Noted(device)
        self._tally = _Tally()
        self._due: list[int] = []
        self.last_transaction = FIRST_TRANSACTION
        self.nic = Netvsc(self._noted, **(_BUFFERS | options))
        self.mac = self.nic.mac
        self.channel = self._noted.channels[0]
        self.receive_buffer = self._noted.shared["receive-buffer"]
        self.send_buffer = self._noted.shared["send-buffer"]
        self.section = self.nic.info.section
        self.sections = self.send_buffer.size // self.section
        self.trap = self._memory(READ, "trap")
        self.deaf = self._memory(WRITE, "deaf")
        self.mute = self._memory(READ, "mute")
        self.forbidden = (self.deaf, self.mute)

    @property
    def connection(self) -> VmbusConnection:
        """Its VMBus connection. Raises UsageError for a device that was opened for it."""
        if not isinstance(self.device, OfferedDevice):
            raise UsageError(f"{self.device.name} has no VMBus connection of its own")
        return self.device.connection

    def _memory(self, access: int, name: str) -> DmaBuffer:
        buffer = self.device.dma_buffer(4 * PAGE, access, name)
        buffer.mapping.write(0, marked_memory(self.mac, buffer.size))
        return buffer

    # Sending what one likes.

    def post(self, packet: bytes) -> bool:
        """Put raw bytes into the ring as a packet (a multiple of 8 bytes). False, counted, when there is no room for long."""
        self._tally.tried += 1
        staged = Block("u1", len(packet))
        staged.array[:] = list(packet)
        end = time.monotonic() + self.patience
        while not bursts.send_packet(self.channel.outgoing.address, staged.address, len(packet)):
            if self.listening:
                self.take_answers()
            if self.gone() or time.monotonic() > end:
                self._tally.no_room += 1
                self._tally.waiting.discard(int.from_bytes(packet[8:16], "little"))
                return False
            time.sleep(0.0005)
        return True

    def packet(
        self,
        kind: int,
        lists: bytes = b"",
        payload: bytes = b"",
        *,
        offset8: int | None = None,
        length8: int | None = None,
        flags: int = 1,
        transaction: int | None = None,
    ) -> bytes:
        """A packet's bytes; the header lies where it is told to. With flag 1 its answer is waited for."""
        if transaction is None:
            self.last_transaction += 1
            transaction = self.last_transaction
            if flags & 1:
                self._tally.waiting.add(transaction)
        body = lists + payload.ljust(-(-len(payload) // 8) * 8, b"\0")
        offset8 = (16 + len(lists)) // 8 if offset8 is None else offset8
        length8 = (16 + len(body)) // 8 if length8 is None else length8
        return struct.pack("<HHHHQ", kind, offset8, length8, flags, transaction) + body

    def pages(
        self,
        words: Sequence[int],
        *,
        ranges: int = 1,
        channel: int = nvsp.CHANNEL_DATA,
        offset8: int | None = None,
        section: tuple[int, int] = (nvsp.NO_SECTION, 0),
    ) -> bool:
        """A GPA-direct packet with this list, word by word (see `range_words`), and the beginning of its message in a section."""
        lists = struct.pack("<II", 0, ranges) + b"".join(struct.pack("<Q", word) for word in words)
        index, size = section
        payload = nvsp.encode_message(nvsp.SendRndisPacket(channel_type=channel, section_index=index, section_size=size))
        return self.post(self.packet(PACKET_GPA_DIRECT, lists, payload, offset8=offset8))

    def in_section(self, index: int, size: int, *, channel: int = nvsp.CHANNEL_DATA) -> bool:
        """An in-band packet that announces `size` bytes in a send section."""
        return self.inband(nvsp.SendRndisPacket(channel_type=channel, section_index=index, section_size=size))

    def say(self, data: bytes) -> bool:
        """Send these bytes as RNDIS data, by way of send section 0."""
        self.fill_section(0, data)
        return self.in_section(0, len(data))

    def fill_section(self, index: int, data: bytes) -> None:
        """Write into a send section, before or after announcing it."""
        data = data[: self.section]
        _memory_at(self.send_buffer.address + index * self.section, len(data))[:] = data

    def inband(self, message: nvsp.NvspMessage | bytes) -> bool:
        """Any NVSP message, or any bytes."""
        payload = message if isinstance(message, bytes) else nvsp.encode_message(message)
        return self.post(self.packet(PACKET_INBAND, payload=payload))

    def complete(self, transaction: int) -> bool:
        """A completion, due or not."""
        payload = nvsp.encode_message(nvsp.SendRndisPacketComplete())
        return self.post(self.packet(PACKET_COMPLETION, payload=payload, flags=0, transaction=transaction))

    def forge(self, offset: int, value: int, *, outgoing: bool) -> None:
        """Write 32 bits into a ring's control page, and ring the doorbell."""
        self._tally.tried += 1
        ring = self.channel.outgoing if outgoing else self.channel.incoming
        ring.mapping.write(offset, struct.pack("<I", value))
        os.eventfd_write(self.channel.doorbell, 1)

    def ask(self, request: Callable[[], object]) -> None:
        """Do something that waits for the host's answer; note its refusal."""
        self._tally.tried += 1
        try:
            request()
        except VfioVmbusError as error:
            self._tally.refused.append(str(error))

    # Seeing what comes of it.

    def take_answers(self) -> None:
        """Take what the host sent: completions are noted, transfers of frames given back."""
        try:
            while (packet := self.channel.incoming.receive()) is not None:
                self._note(packet)
            while self._due and self._give_back(self._due[0]):
                self._due.pop(0)
        except PeerError as error:
            self._tally.refused.append(str(error))

    def _note(self, packet: Packet) -> None:
        if packet.packet_type == PACKET_COMPLETION and packet.transaction_id in self._tally.waiting:
            self._tally.waiting.discard(packet.transaction_id)
            status = int.from_bytes(packet.payload[4:8], "little") if packet.payload else nvsp.STATUS_SUCCESS
            self._tally.statuses.append(status)
        elif packet.packet_type == PACKET_XFER_PAGES:
            self._due.append(packet.transaction_id)

    def _give_back(self, transaction: int) -> bool:
        payload = nvsp.encode_message(nvsp.SendRndisPacketComplete())
        return self.channel.outgoing.send(payload, packet_type=PACKET_COMPLETION, transaction_id=transaction)

    def outcome(self) -> Outcome:
        """Wait until everything is answered, or patience is at its end."""
        tally = self._tally
        end = time.monotonic() + self.patience
        while True:
            if self.listening:
                self.take_answers()
            if not tally.waiting or self.gone() or time.monotonic() > end:
                break
            time.sleep(0.0005)
        self.take_answers()
        good = sum(status == nvsp.STATUS_SUCCESS for status in tally.statuses)
        return Outcome(
            tried=tally.tried,
            succeeded=good,
            failed=len(tally.statuses) - good,
            unanswered=len(tally.waiting),
            no_room=tally.no_room,
            refused=tuple(tally.refused),
        )

    def received(self) -> bytes:
        """All that the host ever wrote into the receive buffer."""
        return bytes(_memory_at(self.receive_buffer.address, self.receive_buffer.size))


def _memory_at(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B")


def range_words(size: int, offset: int, pfns: Iterable[int]) -> list[int]:
    """One range of a page list as 64-bit words, whatever the numbers: size and offset in the first page, then page numbers."""
    return [(size & 0xFFFFFFFF) | (offset & 0xFFFFFFFF) << 32, *pfns]
