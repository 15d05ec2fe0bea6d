"""RNDIS and NVSP messages that lie about their lengths, come out of order, or come from the wrong side."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from ...wire import nvsp, oid, rndis
from ...wire.frame import Frame, PacketInfo, encode_packet
from ...wire.rndis import PacketMessage
from ..attacker import BROADCAST, ETHERTYPE, MARK, Attack, Attacker, Outcome, marked_message


def _lies(*changes: dict[str, int]) -> Callable[[Attacker], Outcome]:
    """Data messages that would pass, but for these fields of their headers. A transfer each."""

    def run(attacker: Attacker) -> Outcome:
        good = marked_message(attacker.mac)
        for index, change in enumerate(changes):
            head = replace(PacketMessage.unpack(good), **change)
            attacker.fill_section(index, head.pack() + good[PacketMessage.SIZE :])
            attacker.in_section(index, len(good))
        return attacker.outcome()

    return run


BIG = (0x80000000, 0xFFFFFFFF, 0xFFFFFFF8)


def information(attacker: Attacker) -> Outcome:
    """Per-packet information that goes round in circles, out of its area, or has no room for itself."""
    frame = Frame(BROADCAST + attacker.mac + struct.pack(">H", ETHERTYPE) + MARK, (PacketInfo.word(0, 0), PacketInfo.word(6, 0)))
    good = encode_packet(frame, align=8)
    for index, (size, kind, offset) in enumerate(
        [
            (0, 0, 12),
            (8, 0, 8),
            (12, 0, 16),
            (16, 0, 4),
            (16, 6, 0xFFFFFFFF),
            (0xFFFFFFFF, 0, 12),
            (36, 0, 12),
            (0x80000000, 6, 12),
        ]
    ):
        forged = good[: PacketMessage.SIZE] + struct.pack("<III", size, kind, offset) + good[PacketMessage.SIZE + 12 :]
        attacker.fill_section(index, forged)
        attacker.in_section(index, len(good))
    return attacker.outcome()


def too_many(attacker: Attacker) -> Outcome:
    """More messages in a section than the host takes: none of them may pass."""
    head = BROADCAST + attacker.mac + struct.pack(">H", ETHERTYPE)
    tiny = encode_packet(Frame(head + MARK[:16]), align=8)
    count = attacker.section // len(tiny)
    attacker.say(tiny * count)
    attacker.say(tiny * (attacker.nic.info.max_messages + 1))
    return attacker.outcome()


def last_is_bad(attacker: Attacker) -> Outcome:
    """Good messages with a bad one behind them, or the beginning of one, or other bytes."""
    good = marked_message(attacker.mac)
    bad = bytearray(good)
    bad[4:8] = struct.pack("<I", len(good) + 8)
    for index, tail in enumerate((bytes(bad), good[:40], good[:4], b"\0" * 8, MARK)):
        attacker.fill_section(index, good + tail)
        attacker.in_section(index, len(good + tail))
    return attacker.outcome()


def bad_frames(attacker: Attacker) -> Outcome:
    """Frames without a whole header, and longer than agreed."""
    for size in (0, 1, 13, 1519, 3000, 5800):
        head = PacketMessage(message_length=PacketMessage.SIZE + size, data_offset=36, data_length=size)
        attacker.say(head.pack() + marked_message(attacker.mac, size=6000)[PacketMessage.SIZE :][:size])
    return attacker.outcome()


def nothing(attacker: Attacker) -> Outcome:
    """Transfers that hold no message at all."""
    attacker.in_section(0, 0)
    attacker.inband(nvsp.SendRndisPacket())
    return attacker.outcome()


def spoofed(attacker: Attacker) -> Outcome:
    """Frames that claim to come from others."""
    for source in (b"\x00\x15\x5d\x00\x00\x01", BROADCAST, bytes(6), attacker.mac[:5] + bytes([attacker.mac[5] ^ 1])):
        attacker.say(marked_message(source))
    return attacker.outcome()


def _control(*messages: bytes) -> Callable[[Attacker], Outcome]:
    """Control messages, a transfer each."""

    def run(attacker: Attacker) -> Outcome:
        for index, message in enumerate(messages):
            attacker.fill_section(index, message)
            attacker.in_section(index, len(message), channel=nvsp.CHANNEL_CONTROL)
        return attacker.outcome()

    return run


def _forged(message: rndis.RndisMessage, **fields: int) -> bytes:
    """A message with these fields as they are given, lengths too."""
    return replace(message, **({"message_length": message.SIZE} | fields)).pack()


def _nvsp(message: nvsp.NvspMessage | bytes) -> Callable[[Attacker], Outcome]:
    def run(attacker: Attacker) -> Outcome:
        attacker.inband(message)
        return attacker.outcome()

    return run


_QUERY = rndis.QueryRequest(request_id=1 << 30, oid=oid.OID_GEN_LINK_SPEED)
_SET = rndis.SetRequest(request_id=1 << 30, oid=oid.OID_GEN_CURRENT_PACKET_FILTER)

MESSAGES = (
    Attack(
        "rndis/length",
        "message lengths of nothing, less than a header, and too much",
        _lies(*({"message_length": value} for value in (0, 4, 8, 43, 4096, 6145, *BIG))),
    ),
    Attack(
        "rndis/type",
        "control messages and unknown ones among frames",
        _lies(*({"message_type": value} for value in (0, 2, 4, 9, 0x80000001, 0xFFFFFFFF))),
    ),
    Attack(
        "rndis/data-offset",
        "frames inside their header or outside their message",
        _lies(*({"data_offset": value} for value in (0, 8, 35, 100, 560, 6144, *BIG))),
    ),
    Attack(
        "rndis/data-length",
        "frames longer than their message",
        _lies(*({"data_length": value} for value in (0, 13, 560, 1519, 6144, *BIG))),
    ),
    Attack(
        "rndis/offset-and-length",
        "offset and length whose sum wraps around 32 bits",
        _lies(
            {"data_offset": 0xFFFFFFFF, "data_length": 64},
            {"data_offset": 0xFFFFFFC0, "data_length": 0x60},
            {"data_offset": 36, "data_length": 0xFFFFFFDC},
            {"ppi_offset": 0xFFFFFFF0, "ppi_length": 0x20},
        ),
    ),
    Attack(
        "rndis/info-area",
        "an area of per-packet information outside the message",
        _lies(
            {"ppi_offset": 0, "ppi_length": 16},
            {"ppi_offset": 8, "ppi_length": 16},
            {"ppi_offset": 36, "ppi_length": 4096},
            {"ppi_offset": 36, "ppi_length": 0xFFFFFFFC},
            {"ppi_offset": 0xFFFFFFFC, "ppi_length": 16},
            {"ppi_offset": 37, "ppi_length": 16},
            {"ppi_offset": 36, "ppi_length": 15},
        ),
    ),
    Attack("rndis/info", "per-packet information that goes in circles or out of its area", information),
    Attack("rndis/too-many", "more messages in a section than agreed", too_many),
    Attack("rndis/last-bad", "good messages with a bad one behind them", last_is_bad),
    Attack("rndis/frames", "frames without a header, and longer than the MTU", bad_frames),
    Attack("rndis/nothing", "transfers without a message", nothing),
    Attack("rndis/spoofed", "frames from others' MAC addresses", spoofed),
    Attack(
        "control/length", "a control message that is longer than its transfer", _control(_forged(_QUERY, message_length=4096))
    ),
    Attack("control/no-length", "a control message of length 0", _control(_forged(_QUERY, message_length=0))),
    Attack("control/information", "information outside its message", _control(_forged(_SET, info_offset=20, info_length=4))),
    Attack(
        "control/wrapped",
        "information whose place wraps around 32 bits",
        _control(_forged(_SET, info_offset=0xFFFFFFF8, info_length=16)),
    ),
    Attack("control/frame", "a frame among control messages", _control(PacketMessage(message_length=44, data_offset=36).pack())),
    Attack("control/answer", "an answer that only a host gives", _control(_forged(rndis.QueryComplete(request_id=1)))),
    Attack("control/type", "a control message of no known type", _control(struct.pack("<III", 0x77, 12, 0))),
    Attack("nvsp/type", "an NVSP message of no known type", _nvsp(struct.pack("<I", 9999).ljust(40, b"\0"))),
    Attack("nvsp/short", "an NVSP message of 8 bytes", _nvsp(struct.pack("<II", nvsp.SEND_SEND_BUFFER, 0))),
    Attack(
        "nvsp/twice", "a version agreed a second time", _nvsp(nvsp.Init(min_version=nvsp.VERSION_5, max_version=nvsp.VERSION_5))
    ),
    Attack("nvsp/side", "an NVSP message that only a host sends", _nvsp(nvsp.InitComplete(status=1))),
    Attack("nvsp/mtu", "an MTU of 4 GiB", _nvsp(nvsp.SendNdisConfig(mtu=0xFFFFFFFF))),
    Attack("nvsp/channel", "a transfer that is neither data nor control", _nvsp(nvsp.SendRndisPacket(channel_type=7))),
)
