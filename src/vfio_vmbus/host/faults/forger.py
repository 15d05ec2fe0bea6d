"""What a hostile host says: malformed packets, messages and numbers, drawn from a seeded source.

Forged packets stand beside the lawful ones, so traffic goes on as far as the driver lets it. Transfers among them carry transaction ids
that no VSP uses, so that the guest's completions of them can be told apart; kind "transactions" is the exception.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...wire import nvsp, rndis, vmbus
from ...wire.ring import (
    FLAG_COMPLETION_REQUESTED,
    PACKET_COMPLETION,
    PACKET_INBAND,
    PACKET_XFER_PAGES,
    Packet,
    PacketHeader,
    TransferPagesHeader,
    TransferRange,
)

T = TypeVar("T")

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    16,
    24,
    40,
    64,
    255,
    256,
    4096,
    0x7FFF,
    0x8000,
    0xFFFF,
    1 << 20,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFF8,
    0xFFFFFFFF,
)
"""Where checks go wrong."""
_FORGED = 0x4F52_4745 << 32
_NVSP_TYPES = (*range(4), *range(100, 110), 125, 128, 129, 133, 134, 135)
_RNDIS_TYPES = tuple(kind | answer for kind in range(1, 9) for answer in (0, rndis.COMPLETION))
_MESSAGE_TYPES = tuple(kind.NUMBER for kind in vmbus.TABLE)
_RNDIS_WORDS = rndis.PacketMessage.SIZE // 4
_MOST_RANGES = 375
"""Of one transfer: what a driver has to expect (Linux: NETVSC_MAX_XFER_PAGE_RANGES, by which hv_netvsc's copy of a packet is sized)."""
_OVERSIZE_RANGES = 600


def is_forged(transaction: int) -> bool:
    """Does a completion answer one of the forged transfers, which no VSP knows of?"""
    return transaction & ~0xFFFFFFFF == _FORGED


def pick(how: random.Random, choices: Sequence[T]) -> T:
    """One of them. By `random()` alone, whose sequence Python promises to keep."""
    return choices[int(how.random() * len(choices))]


def word(how: random.Random) -> int:
    """32 bits: a number from where checks go wrong, one beside it, or any."""
    if how.random() < 0.2:
        return int(how.random() * (1 << 32))
    return (pick(how, NUMBERS) + pick(how, (-1, 0, 0, 0, 1))) & 0xFFFFFFFF


class Forger:
    """Forges packets for one channel, after the model of the lawful ones that it `saw`. All packets with descriptor, without footer."""

    def __init__(self) -> None:
        self._forged = 0
        self._transfer = Packet(
            packet_type=PACKET_XFER_PAGES,
            completion_requested=True,
            pageset_id=nvsp.RECEIVE_BUFFER_ID,
            ranges=(TransferRange(byte_count=104, byte_offset=0),),
            payload=nvsp.encode_message(nvsp.SendRndisPacket()),
        ).pack()
        self._completion = Packet(
            packet_type=PACKET_COMPLETION, payload=nvsp.encode_message(nvsp.SendRndisPacketComplete())
        ).pack()
        self._kinds: dict[str, Callable[[random.Random, bytes], bytes]] = {
            "headers": self._header,
            "oversize": self._oversize,
            "ranges": self._ranges,
            "transactions": self._transaction,
            "nvsp": self._nvsp,
        }

    def saw(self, packet: bytes) -> None:
        """A lawful packet to the guest."""
        kind = PacketHeader.unpack(packet).packet_type
        if kind == PACKET_XFER_PAGES:
            self._transfer = packet
        elif kind == PACKET_COMPLETION:
            self._completion = packet

    def packet(self, kind: str, how: random.Random, lawful: bytes) -> bytes:
        """A malformed packet: kind "headers", "oversize", "ranges", "transactions" or "nvsp". lawful: the one that it comes before."""
        return self._kinds[kind](how, lawful)

    def _own(self) -> int:
        self._forged += 1
        return _FORGED | self._forged & 0xFFFFFFFF

    def _header(self, how: random.Random, lawful: bytes) -> bytes:
        """A descriptor that contradicts its packet. The reader of a ring can go on only where the length is right."""
        kind, offset, length, flags, _ = struct.unpack_from("<HHHHQ", lawful)
        match pick(how, ("kind", "offset", "length", "flags")):
            case "kind":
                kind = pick(how, (*range(16), 0x77, 0xFFFF))
            case "offset":
                offset = pick(how, (0, 1, 2, 3, length, length + 1, 0x7FFF, 0xFFFF))
            case "length":
                length = pick(how, (0, 1, 2, 3, length - 1, length + 1, 0x7FFF, 0xFFFF))
            case _:
                flags = word(how) & 0xFFFF
        return struct.pack("<HHHHQ", kind, offset, length & 0xFFFF, flags, self._own()) + lawful[16:]

    def _oversize(self, how: random.Random, lawful: bytes) -> bytes:
        """A transfer that says the same frames again and again: right in itself, and longer than any that a host sends."""
        head, ranges = self._ranges_seen()
        return self._announcement(head.pageset_id, _repeated(ranges, _OVERSIZE_RANGES))

    def _ranges(self, how: random.Random, lawful: bytes) -> bytes:
        """A transfer whose ranges, their number or their buffer cannot be."""
        head, ranges = self._ranges_seen()
        pageset, count = head.pageset_id, len(ranges)
        match pick(how, ("range", "range", "range", "count", "pageset", "many")):
            case "range":
                index = int(how.random() * len(ranges))
                size, offset = ranges[index]
                ranges[index] = pick(how, ((word(how), offset), (size, word(how)), (word(how), word(how))))
            case "count":
                count = pick(how, (0, count - 1, count + 1, 0xFFFF, word(how)))
            case "pageset":
                pageset = word(how) & 0xFFFF
            case _:
                ranges = _repeated(ranges, _MOST_RANGES)
                count = len(ranges)
        return self._announcement(pageset, ranges, count)

    def _ranges_seen(self) -> tuple[TransferPagesHeader, list[tuple[int, int]]]:
        head = TransferPagesHeader.unpack(self._transfer)
        return head, [(item.byte_count, item.byte_offset) for item in head.ranges] or [(104, 0)]

    def _announcement(self, pageset: int, ranges: list[tuple[int, int]], count: int | None = None) -> bytes:
        """The last transfer with other ranges, and a number of them that may be another one."""
        said = len(ranges) if count is None else count
        lists = struct.pack("<HBBI", pageset, 0, 0, said & 0xFFFFFFFF) + b"".join(struct.pack("<II", *item) for item in ranges)
        payload = self._transfer[TransferPagesHeader.unpack(self._transfer).header.offset8 * 8 :]
        return self._laid_out(PACKET_XFER_PAGES, self._own(), lists, payload)

    def _transaction(self, how: random.Random, lawful: bytes) -> bytes:
        """A completion of what was not sent, or was completed already; a transfer whose number is in use."""
        model = pick(how, (self._completion, self._completion, self._transfer))
        (number,) = struct.unpack_from("<Q", model, 8)
        if model is self._completion:
            number = pick(how, (number, number, number ^ 1 << int(how.random() * 64), word(how), word(how) << 32 | word(how)))
        return model[:8] + struct.pack("<Q", number) + model[16:]

    def _nvsp(self, how: random.Random, lawful: bytes) -> bytes:
        """An NVSP message of any kind, length and contents, as a completion or by itself."""
        kind = word(how) if how.random() < 0.2 else pick(how, _NVSP_TYPES)
        words = [kind, *(word(how) for _ in range(int(how.random() * 16)))]
        payload = struct.pack(f"<{len(words)}I", *words)
        if how.random() < 0.2:
            payload = payload[:0]
        if how.random() < 0.5:
            (number,) = struct.unpack_from("<Q", self._completion, 8)
            return self._laid_out(PACKET_COMPLETION, pick(how, (number, word(how), 1 << 32 | word(how) & 0xF)), b"", payload)
        return self._laid_out(PACKET_INBAND, self._own(), b"", payload)

    @staticmethod
    def _laid_out(kind: int, transaction: int, lists: bytes, payload: bytes) -> bytes:
        """A packet whose descriptor is right."""
        payload = payload.ljust(len(payload) + 7 & ~7, b"\0")
        offset = 2 + len(lists) // 8
        asked = FLAG_COMPLETION_REQUESTED if kind == PACKET_XFER_PAGES else 0
        return struct.pack("<HHHHQ", kind, offset, offset + len(payload) // 8, asked, transaction) + lists + payload


def _repeated(ranges: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """As many of them as there may be, by repeating all."""
    return ranges * (most // len(ranges))


def forge_rndis(how: random.Random) -> list[tuple[int, bytes]]:
    """What to write over an RNDIS message: (offset, bytes)."""
    if how.random() < 0.3:  # a control message
        words = [pick(how, _RNDIS_TYPES), pick(how, (8, 12, 16, 20, 24, 28, 52, word(how))), *(word(how) for _ in range(11))]
        return [(0, struct.pack(f"<{len(words)}I", *words))]
    places = [1 + int(how.random() * (_RNDIS_WORDS - 1)) for _ in range(1 + int(how.random() * 3))]
    return [(4 * place, struct.pack("<I", word(how))) for place in places]


def forge_message(how: random.Random, lawful: bytes) -> bytes:
    """A VMBus control message that comes before a lawful one, and contradicts itself or the connection's state."""
    match pick(how, ("kind", "words", "short", "any")):
        case "kind":
            return struct.pack("<I", pick(how, (0, *_MESSAGE_TYPES, word(how)))) + lawful[4:]
        case "words":
            changed = bytearray(lawful)
            for _ in range(1 + int(how.random() * 3)):
                struct.pack_into("<I", changed, 4 * int(how.random() * (len(lawful) // 4)), word(how))
            return bytes(changed)
        case "short":
            return lawful[: int(how.random() * len(lawful))]
        case _:
            return struct.pack("<10I", *(word(how) for _ in range(10)))
